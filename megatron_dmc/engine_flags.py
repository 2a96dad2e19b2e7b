"""Flags of the engine, for every command that starts one: names and meaning as vLLM's."""

import argparse
import os
from pathlib import Path
from typing import Any

from megatron_dmc.errors import DMCError

_PASSED_ON = (
    "trust_remote_code",
    "generation_config",
    "dtype",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "num_pages",
    "kv_cache_memory_bytes",
    "gpu_memory_utilization",
    "kv_cache_dtype",
    "enable_dmc",
    "enable_prefix_caching",
    "prefix_block_size",
    "scheduling_policy",
    "tensor_parallel_size",
    "distributed_timeout_seconds",
    "enforce_eager",
    "cudagraph_capture_sizes",
    "seed",
    "device",
    "allow_pickle",
    "verify_checkpoint",
)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the sizes of its engine."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "model_path", metavar="MODEL", nargs="?", help="Hugging Face folder or Megatron checkpoint"
    )
    group.add_argument("--model", metavar="PATH", help="the same")
    group.add_argument("--tokenizer", metavar="PATH", help="default: the model's own")
    add_trust_remote_code(group)
    group.add_argument(
        "--generation-config", default="auto", metavar="PATH",
        help="folder or file with the sampling defaults and end-of-text tokens; auto: the model's "
        "generation_config.json; vllm: no sampling defaults from it (default: auto)",
    )  # fmt: skip
    group.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16, ...")
    group.add_argument("--device", help="default: the GPU if there is one")
    add_checkpoint_arguments(group)
    group.add_argument("--max-model-len", type=int, help="longest sequence; default: the model's")
    group.add_argument(
        "--max-num-seqs", type=int, default=64, help="requests that run at a time (default: 64)"
    )
    group.add_argument(
        "--max-num-batched-tokens", type=int, default=2048,
        help="tokens computed in a step (default: 2048)",
    )  # fmt: skip
    group.add_argument("--block-size", type=int, default=16, help="slots per page (default: 16)")
    group.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9,
        help="part of the GPU's memory to use, model included (default: 0.9)",
    )  # fmt: skip
    group.add_argument("--kv-cache-memory-bytes", type=int, help="size of the cache; or")
    group.add_argument("--num-pages", type=int, help="size of the cache in pages")
    add_kv_cache_dtype(group)
    group.add_argument(
        "--enable-dmc", action=argparse.BooleanOptionalAction, default=None,
        help="refuse a model that does not compress; --no-enable-dmc: append every token, whatever "
        "the model decides (default: as the model)",
    )  # fmt: skip
    group.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=False,
        help="share the pages of equal prefixes between requests (default: no)",
    )  # fmt: skip
    group.add_argument(
        "--prefix-block-size", type=int, default=256,
        help="tokens between two places at which a shared prefix can end (default: 256)",
    )  # fmt: skip
    group.add_argument(
        "--scheduling-policy", choices=["fcfs", "priority"], default="fcfs",
        help="priority: requests of lower priority go first (default: first come, first served)",
    )  # fmt: skip
    add_parallel_arguments(group)
    group.add_argument(
        "--enforce-eager", action="store_true", help="no CUDA graphs for decode steps"
    )
    group.add_argument(
        "--cudagraph-capture-sizes", type=int, nargs="+", metavar="N",
        help="batch sizes that get a CUDA graph (default: 1, 2, 4, 8, 16, ... up to --max-num-seqs)",
    )  # fmt: skip
    group.add_argument(
        "--seed", type=int, default=0, help="of requests that bring none (default: 0)"
    )


def add_checkpoint_arguments(group: argparse._ActionsContainer) -> None:
    """How far a checkpoint's files are trusted; for every command that reads one."""
    group.add_argument(
        "--allow-pickle", action="store_true",
        help="let a Megatron checkpoint run the code in its pickles; only if you trust it",
    )  # fmt: skip
    group.add_argument(
        "--verify-checkpoint", action=argparse.BooleanOptionalAction, default=True,
        help="compare the files with the checksums beside them, where there are any; reads them once "
        "more (default: yes)",
    )  # fmt: skip


def add_parallel_arguments(group: argparse._ActionsContainer) -> None:
    """Tensor parallelism."""
    group.add_argument(
        "--tensor-parallel-size", "-tp", type=int, default=1, metavar="N",
        help="processes that share the heads; started by this command, or by torchrun (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--distributed-timeout-seconds", type=float, default=60, metavar="S",
        help="a process that takes longer over its part of a step is given up, and the engine with it "
        "(default: 60)",
    )  # fmt: skip


def add_trust_remote_code(parser: Any) -> None:
    """`--trust-remote-code`, for a parser or a group."""
    parser.add_argument(
        "--trust-remote-code", action="store_true",
        help="run the code of a tokenizer that brings its own; a model's code is never run",
    )  # fmt: skip


def add_kv_cache_dtype(parser: Any) -> None:
    """`--kv-cache-dtype`, for a parser or a group."""
    parser.add_argument(
        "--kv-cache-dtype", default="auto", metavar="DTYPE",
        help="of the cache's pages: auto (the model's dtype), fp8 (or fp8_e4m3), int8",
    )  # fmt: skip


def model_path(args: argparse.Namespace) -> str:
    """The model, given either way.

    Raises:
        DMCError: it was given neither way, or twice.
    """
    given = [path for path in (args.model_path, args.model) if path is not None]
    if len(given) != 1:
        raise DMCError("give the model once: MODEL or --model PATH")
    return given[0]


def is_follower(args: argparse.Namespace) -> bool:
    """Whether this is a rank other than 0 that torchrun started: its part is `make_llm(args).follow()`.

    Raises:
        DMCError: torchrun started several processes that were not told to share the model.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if args.tensor_parallel_size == 1 < world_size:
        raise DMCError(
            f"{world_size} processes were started (WORLD_SIZE={world_size}), and each would load the "
            f"model for itself; add --tensor-parallel-size {world_size}"
        )
    return args.tensor_parallel_size > 1 and int(os.environ.get("RANK", "0")) > 0


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the flags say to `LLM`, but for model and tokenizer."""
    return {name: getattr(args, name) for name in _PASSED_ON}


def given_tokenizer(args: argparse.Namespace) -> str | None:
    """The place of --tokenizer; None: the model's own.

    Raises:
        DMCError: it is not there.
    """
    if args.tokenizer is not None and not Path(args.tokenizer).exists():
        raise DMCError(f"--tokenizer {args.tokenizer}: no such folder or file")
    return args.tokenizer


def make_llm(args: argparse.Namespace, **settings: Any) -> Any:
    """The `LLM` that the flags ask for.

    Args:
        settings: further arguments of `LLM`.

    Raises:
        DMCError: the model cannot be read, or a size cannot be had.
    """
    from megatron_dmc.engine import LLM

    return LLM(model_path(args), given_tokenizer(args), **engine_options(args), **settings)
