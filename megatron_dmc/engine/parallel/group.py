"""Collectives of the tensor-parallel ranks.

Every rank has a whole engine with its share of the heads, and all run one schedule: each scheduler knows every
rank's entry counts after each step. Rank 0 samples and sends the tokens (`parallel.engine`).

Dimension letters: X rows of logits, V vocabulary, K ranks, L layers, B requests, G key/value heads.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout

from megatron_dmc.engine.parallel.children import ChildRanks
from megatron_dmc.engine.parallel.monitor import RankMonitor
from megatron_dmc.errors import UnsupportedConfig

_IDLE = timedelta(days=365)


class Command(NamedTuple):
    """A call of the engine's method `name` on every rank."""

    name: str
    arguments: tuple
    keywords: dict[str, Any]


class TensorParallel:
    """This rank among all. Every rank makes one, at the same time.

    Attributes:
        size, rank: of the tensor-parallel group, which is all processes.
        monitor: of the other ranks.
        children: on rank 0, the ranks that it spawned.
    """

    def __init__(
        self,
        size: int,
        *,
        device: torch.device,
        timeout_s: float = 60.0,
        children: ChildRanks | None = None,
    ):
        """Join the group that is running, or that a launcher describes in the environment.

        Args:
            timeout_s: longest time for a rank's part of a step.

        Raises:
            UnsupportedConfig: not `size` processes are running.
        """
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if dist.get_world_size() != size:
            raise UnsupportedConfig(
                f"tensor_parallel_size={size}, but torch.distributed runs {dist.get_world_size()} "
                f"processes here; start torchrun --nproc-per-node {size}, or make this LLM in a process "
                "that has not loaded another model"
            )
        timeout = timedelta(seconds=timeout_s)
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
        self.size, self.rank, self.children = size, dist.get_rank(), children
        self._group = parallel_state.get_tensor_model_parallel_group()
        # Megatron's own argument is in whole minutes
        _set_pg_timeout(timeout, self._group)
        # the other ranks of an idle engine wait for rank 0 without a limit
        self._command_group = dist.new_group(backend="gloo", timeout=_IDLE)
        self._host_group = dist.new_group(backend="gloo", timeout=timeout)
        store = dist.PrefixStore("megatron_dmc", _get_default_store())
        self.monitor = RankMonitor(
            store, self.rank, size, timeout_s=timeout_s, children=children
        )  # fmt: skip

    def close(self) -> None:
        """On rank 0, after the command "close": wait for its children, leave the group."""
        self.monitor.stop()
        if self.children is not None:
            self.children.join()
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()

    def abandon(self) -> None:
        """After a failure: kill the children."""
        self.monitor.stop()
        if self.children is not None:
            self.children.kill()

    # Collectives.

    def exchange(self, counts_LBG: np.ndarray) -> np.ndarray:
        """Gather the ranks' entry counts, (K, L, B, G)."""
        own = torch.from_numpy(np.ascontiguousarray(counts_LBG))
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own, group=self._host_group)
        return torch.stack(parts).numpy()

    def least(self, value: int) -> int:
        """The smallest of the ranks' numbers."""
        tensor = torch.tensor([value])
        dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self._host_group)
        return int(tensor)

    def gather_logits(self, logits_XV: Tensor) -> Tensor:
        """Concatenate the ranks' parts of the vocabulary, on every rank."""
        parts = [torch.empty_like(logits_XV) for _ in range(self.size)]
        dist.all_gather(parts, logits_XV.contiguous(), group=self._group)
        return torch.cat(parts, dim=-1)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' tensors."""
        total = x.clone()
        dist.all_reduce(total, group=self._group)
        return total

    def from_first[T](self, make: Callable[[], T]) -> T:
        """The result of `make` on rank 0, on every rank."""
        box: list[Any] = [make() if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, group=self._host_group)
        return box[0]

    def send(self, commands: list[Command]) -> None:
        """On rank 0: send calls to the other ranks."""
        dist.broadcast_object_list([commands], src=0, group=self._command_group)

    def receive(self) -> list[Command]:
        """On the other ranks: wait for calls from rank 0."""
        box: list[Any] = [None]
        dist.broadcast_object_list(box, src=0, group=self._command_group)
        return box[0]
