"""Tensor parallelism: every rank has its share of the heads, and all run one schedule.

Each rank has a whole engine. Rank 0 is asked; it tells the others what it was asked, and every rank's
scheduler comes to the same schedule, because all are told every rank's entry counts after each step.
Rank 0 samples and tells the others. A rank that dies closes its connections, so that the others' next
collective fails at once; one that hangs is noticed after the timeout.

Dimension letters: X rows of logits, V vocabulary, K ranks, L layers, B requests, G key/value heads.
"""

import datetime
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_dmc.errors import EngineDead, UnsupportedConfig

Anything = TypeVar("Anything")
_IDLE = datetime.timedelta(days=365)
_SIGNS = ("gloo", "nccl", "connection", "timed out", "timeout")


class Command(NamedTuple):
    """A call of the engine's method `name` on every rank."""

    name: str
    arguments: tuple
    keywords: dict[str, Any]


class TensorParallel:
    """The ranks' collectives. Every rank makes one, at the same time.

    Attributes:
        size, rank: of the tensor-parallel group, which is all processes.
    """

    def __init__(self, size: int, *, device: torch.device, timeout_s: float = 60.0):
        """Join the group that torchrun describes in the environment.

        Args:
            timeout_s: how long a rank may take over its part of a step; in the model's own collectives
                it is rounded up to minutes.

        Raises:
            UnsupportedConfig: the processes that run are not `size`.
        """
        timeout = datetime.timedelta(seconds=timeout_s)
        if not dist.is_initialized():
            if "WORLD_SIZE" not in os.environ:
                raise UnsupportedConfig(
                    f"tensor_parallel_size={size}: start the program with "
                    f"torchrun --nproc-per-node {size}"
                )
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        if dist.get_world_size() != size:
            raise UnsupportedConfig(
                f"tensor_parallel_size={size} in {dist.get_world_size()} processes; start "
                f"torchrun --nproc-per-node {size}"
            )
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=size,
                distributed_timeout_minutes=max(1, math.ceil(timeout_s / 60)),
            )
        self.size, self.rank = size, dist.get_rank()
        self._group = parallel_state.get_tensor_model_parallel_group()
        # an idle engine's ranks wait for rank 0 as long as it takes
        self._commands = dist.new_group(backend="gloo", timeout=_IDLE)
        self._counts = dist.new_group(backend="gloo", timeout=timeout)

    def exchange(self, counts_LBG: np.ndarray) -> np.ndarray:
        """This rank's entry counts to all ranks', (K, L, B, G)."""
        own = torch.from_numpy(np.ascontiguousarray(counts_LBG))
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own, group=self._counts)
        return torch.stack(parts).numpy()

    def least(self, value: int) -> int:
        """The smallest of the ranks' numbers."""
        tensor = torch.tensor([value])
        dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self._counts)
        return int(tensor)

    def gather_logits(self, logits_XV: Tensor) -> Tensor:
        """Each rank's part of the vocabulary, put together on every rank."""
        parts = [torch.empty_like(logits_XV) for _ in range(self.size)]
        dist.all_gather(parts, logits_XV.contiguous(), group=self._group)
        return torch.cat(parts, dim=-1)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' tensors."""
        total = x.clone()
        dist.all_reduce(total, group=self._group)
        return total

    def from_first(self, make: Callable[[], Anything]) -> Anything:
        """What `make` gives on rank 0, on every rank."""
        box = [make() if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, group=self._counts)
        result: Any = box[0]
        return result

    def send(self, commands: list[Command]) -> None:
        """Rank 0: tell the others what to call."""
        dist.broadcast_object_list([commands], src=0, group=self._commands)

    def receive(self) -> list[Command]:
        """The others: wait for it."""
        box: list[Any] = [None]
        dist.broadcast_object_list(box, src=0, group=self._commands)
        return box[0]

    def explain(self, error: RuntimeError) -> RuntimeError:
        """The error of a lost rank, if this is one."""
        text = str(error).lower()
        if isinstance(error, dist.DistError) or any(sign in text for sign in _SIGNS):
            return EngineDead(
                f"tensor parallel: rank {self.rank} of {self.size} lost another rank, the engine "
                f"cannot go on; restart all ranks ({' '.join(str(error).split())[:200]})"
            )
        return error
