"""Megatron's process groups for one process that was not started by torchrun."""

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dmc.errors import UnsupportedConfig


def ensure_single_process() -> None:
    """Start torch.distributed (gloo, in memory, one rank) and Megatron's groups where not running.

    Raises:
        UnsupportedConfig: several processes are running.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if dist.get_world_size() != 1:
        raise UnsupportedConfig(
            f"checkpoints are converted and loaded for inference in one process, not in "
            f"{dist.get_world_size()}; run without torchrun"
        )
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
