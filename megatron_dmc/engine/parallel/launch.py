"""How an `LLM` comes to its ranks: by itself, or because a launcher made them."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron_dmc.engine.parallel.group import TensorParallel
from megatron_dmc.engine.parallel.processes import WorkerProcesses, join_group
from megatron_dmc.engine.sizes import check_memory
from megatron_dmc.errors import UnsupportedConfig


def is_launched() -> bool:
    """Whether torchrun (or a launcher that sets the same variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start_ranks(arguments: dict[str, Any], device: torch.device) -> TensorParallel:
    """Start or join the ranks of `LLM(**arguments)`. On a GPU, also choose this rank's.

    Raises:
        UnsupportedConfig: the model cannot be split so, or the processes are not as many.
    """
    size, timeout_s = arguments["tensor_parallel_size"], arguments["distributed_timeout_seconds"]
    if not isinstance(size, int) or size < 1:
        raise UnsupportedConfig(f"tensor_parallel_size={size!r}: use a positive whole number")
    if not timeout_s > 0:
        raise UnsupportedConfig(f"distributed_timeout_seconds={timeout_s}: use a positive number")
    if device.index is not None and device.type != "cpu":
        raise UnsupportedConfig(
            f"device={device} with tensor_parallel_size={size}: every rank has a GPU of its own; use "
            f"device={device.type!r}, and CUDA_VISIBLE_DEVICES to choose them"
        )
    launched = is_launched() or dist.is_initialized()
    workers = None
    if not launched:
        _check(arguments, device)
        workers = WorkerProcesses(size, arguments, device=device)
    if device.type == "cuda" and device.index is None:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if workers is not None:
        workers.wait_until_connected()
        join_group(0, size, workers.store, device)
    return TensorParallel(size, device=device, timeout_s=timeout_s, workers=workers)


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


def _check(arguments: dict[str, Any], device: torch.device) -> None:
    """Tell what cannot be before there are processes."""
    from megatron_dmc.checkpoint.convert import open_checkpoint
    from megatron_dmc.checkpoint.load import check_divisible

    model, size = arguments["model"], arguments["tensor_parallel_size"]
    if hasattr(model, "description"):
        raise UnsupportedConfig(
            f"tensor_parallel_size={size} with a model that is loaded already: every rank loads its "
            "own share; give the checkpoint's path"
        )
    description, *_ = open_checkpoint(
        model, allow_pickle=arguments["allow_pickle"], verify_checkpoint=False,
        trust_remote_code=arguments["trust_remote_code"],
    )  # fmt: skip
    check_divisible(description, size)
    check_memory(description, arguments, device)
    try:
        pickle.dumps(arguments)
    except Exception as error:
        raise UnsupportedConfig(
            f"tensor_parallel_size={size}: the arguments cannot be sent to the other processes "
            f"({error}); give the tokenizer as a path"
        ) from error
