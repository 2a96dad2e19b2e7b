"""How an `LLM` comes to its ranks: by itself, or because a launcher made them."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron_dmc.engine.config import EngineConfig
from megatron_dmc.engine.parallel.group import TensorParallel
from megatron_dmc.engine.parallel.processes import WorkerProcesses, join_group
from megatron_dmc.engine.sizes import check_memory
from megatron_dmc.errors import UnsupportedConfig


def is_launched() -> bool:
    """Whether torchrun (or a launcher that sets the same variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start_ranks(
    arguments: tuple[Any, Any, Any], config: EngineConfig, device: torch.device
) -> TensorParallel:
    """Start the ranks of `build_engine`, or join those of a launcher. On a GPU, also choose this rank's.

    Args:
        arguments: model, tokenizer and `make_context` of `build_engine`.

    Raises:
        UnsupportedConfig: the model cannot be split so, or the processes are not as many.
    """
    size = config.tensor_parallel_size
    if device.index is not None and device.type != "cpu":
        raise UnsupportedConfig(
            f"device={device} with tensor_parallel_size={size}: every rank has a GPU of its own; use "
            f"device={device.type!r}, and CUDA_VISIBLE_DEVICES to choose them"
        )
    launched = is_launched() or dist.is_initialized()
    workers = None
    if not launched:
        _check(arguments, config, device)
        workers = WorkerProcesses(size, (*arguments, config), device=device)
    if device.type == "cuda" and device.index is None:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if workers is not None:
        workers.wait_until_connected()
        join_group(0, size, workers.store, device)
    return TensorParallel(
        size, device=device, timeout_s=config.distributed_timeout_seconds, workers=workers
    )


@contextmanager
def ended_on_failure(parallel: TensorParallel | None) -> Iterator[None]:
    """If this rank fails here, the ranks that it started end; if another one is gone, say so.

    Raises:
        EngineDead: another rank is gone.
    """
    try:
        yield
    except BaseException as error:
        if parallel is not None:
            explained = parallel.explain(error) if isinstance(error, RuntimeError) else error
            parallel.abandon()
            if explained is not error:
                raise explained from error
        raise


def _check(arguments: tuple[Any, Any, Any], config: EngineConfig, device: torch.device) -> None:
    """Refuse what cannot work before there are processes."""
    from megatron_dmc.checkpoint.convert import open_checkpoint
    from megatron_dmc.checkpoint.load import check_divisible

    model, size = arguments[0], config.tensor_parallel_size
    if hasattr(model, "description"):
        raise UnsupportedConfig(
            f"tensor_parallel_size={size} with a model that is loaded already: every rank loads its "
            "own share; give the checkpoint's path"
        )
    description, *_ = open_checkpoint(
        model, allow_pickle=config.allow_pickle, verify_checkpoint=False,
        trust_remote_code=config.trust_remote_code,
    )  # fmt: skip
    check_divisible(description, size)
    check_memory(description, config, device)
    try:
        pickle.dumps(arguments)
    except Exception as error:
        raise UnsupportedConfig(
            f"tensor_parallel_size={size}: the arguments cannot be sent to the other processes "
            f"({error}); give the tokenizer as a path"
        ) from error
