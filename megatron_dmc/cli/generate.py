"""`megatron-dmc generate`: stream a completion, then say what it cost."""

import argparse
import sys
import time

from megatron_dmc.engine_flags import (
    add_checkpoint_arguments,
    add_kv_cache_dtype,
    add_parallel_arguments,
    add_trust_remote_code,
    is_follower,
)
from megatron_dmc.errors import DMCError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command, named as vLLM's where it has them."""
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder or Megatron checkpoint")
    parser.add_argument("--prompt", help="text to continue; default: standard input")
    parser.add_argument("--max-tokens", type=int, default=128, help="most tokens to generate")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="0: no limit")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], help="text that ends it; repeatable")
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, ...")
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--max-model-len", type=int, help="longest sequence; default: the model's")
    parser.add_argument("--block-size", type=int, default=16, help="slots per page")
    add_kv_cache_dtype(parser)
    add_trust_remote_code(parser)
    parser.add_argument(
        "--no-dmc", action="store_true", help="append every token, whatever the model decides"
    )
    add_checkpoint_arguments(parser)
    add_parallel_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from megatron_dmc.engine import LLM, SamplingParams

    params = SamplingParams(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed,
        stop=args.stop, max_tokens=args.max_tokens, ignore_eos=args.ignore_eos,
    )  # fmt: skip
    follows = is_follower(args)
    prompt = sys.stdin.read() if args.prompt is None and not follows else args.prompt
    llm = LLM(
        args.model, dtype=args.dtype, device=args.device, max_model_len=args.max_model_len,
        max_num_seqs=1, block_size=args.block_size, kv_cache_dtype=args.kv_cache_dtype,
        enable_dmc=False if args.no_dmc else None, trust_remote_code=args.trust_remote_code,
        allow_pickle=args.allow_pickle, verify_checkpoint=args.verify_checkpoint,
        tensor_parallel_size=args.tensor_parallel_size,
        distributed_timeout_seconds=args.distributed_timeout_seconds,
    )  # fmt: skip
    if follows:
        llm.follow()
        return 0
    engine = llm.engine
    if engine.tokenizer is None:
        raise DMCError(
            f"{args.model}: no tokenizer beside the checkpoint; copy tokenizer.model there"
        )
    engine.add_request("0", prompt, params)
    print(prompt, end="", flush=True)
    shown, output = 0, None
    began = time.perf_counter()
    while engine.has_unfinished_requests:
        for output in engine.step():
            text = output.outputs[0].text
            print(text[shown:], end="", flush=True)
            shown = len(text)
    seconds = time.perf_counter() - began
    llm.close()
    assert output is not None
    print(flush=True)
    metrics = output.metrics
    first = (metrics.first_token_time or 0.0) - metrics.arrival_time
    new = len(output.outputs[0].token_ids)
    stats = engine.stats()
    held = metrics.num_pages * stats.page_bytes
    plain = metrics.num_cached_tokens * stats.plain_entry_bytes
    print(
        f"\n{len(output.prompt_token_ids)} prompt tokens, {new} generated in {seconds:.2f} s: "
        f"{new / seconds:.1f} tokens/s (first token after {first:.2f} s)\n"
        f"measured CR {output.cr or 1.0:.2f}: cache {held:,} bytes, uncompressed {plain:,} bytes",
        file=sys.stderr,
    )
    return 0
