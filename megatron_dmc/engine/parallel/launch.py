"""Spawn the tensor-parallel ranks, or join those of a launcher (torchrun, Slurm)."""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from megatron_dmc.engine.config import EngineConfig
from megatron_dmc.engine.parallel.children import ChildRanks
from megatron_dmc.engine.parallel.group import TensorParallel
from megatron_dmc.engine.sizes import check_memory
from megatron_dmc.errors import UnsupportedConfig


def start_ranks(
    arguments: tuple[Any, Any, Any], config: EngineConfig, device: torch.device
) -> TensorParallel:
    """Start the ranks of `build_engine`, or join those of a launcher. On a GPU, also select this rank's.

    Args:
        arguments: model, tokenizer and `make_context` of `build_engine`.

    Raises:
        UnsupportedConfig: the model cannot be divided, or another number of processes is running.
    """
    size = config.tensor_parallel_size
    if device.index is not None and device.type != "cpu":
        raise UnsupportedConfig(
            f"device={device} with tensor_parallel_size={size}: every rank has a GPU of its own; use "
            f"device={device.type!r}, and CUDA_VISIBLE_DEVICES to choose them"
        )
    children = None
    if not (_is_launched() or dist.is_initialized()):
        _check(arguments, config, device)
        children = ChildRanks(size, (*arguments, config), device=device)
    if device.type == "cuda" and device.index is None:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if children is not None:
        children.join_group(device)
    return TensorParallel(
        size, device=device, timeout_s=config.distributed_timeout_seconds, children=children
    )


@contextmanager
def ended_on_failure(parallel: TensorParallel | None) -> Iterator[None]:
    """Kill this rank's children if the block raises.

    Raises:
        EngineDead: instead of the block's exception, where another rank is lost.
    """
    try:
        yield
    except BaseException as error:
        if parallel is None:
            raise
        diagnosed = parallel.monitor.diagnose(error)
        parallel.abandon()
        if diagnosed is not error:
            raise diagnosed from error
        raise


def _is_launched() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _check(arguments: tuple[Any, Any, Any], config: EngineConfig, device: torch.device) -> None:
    """Refuse what cannot work, before there are processes."""
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
        pickle.dumps((arguments, config))
    except Exception as error:
        raise UnsupportedConfig(
            f"tensor_parallel_size={size}: the arguments cannot be sent to the other processes "
            f"({error}); give the tokenizer as a path"
        ) from error
