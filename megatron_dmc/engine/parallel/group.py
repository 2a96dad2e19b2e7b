"""Tensor parallelism: every rank has its share of the heads, and all run one schedule.

Each rank has a whole engine. Rank 0 is asked; it tells the others what it was asked, and every rank's
scheduler comes to the same schedule, because all are told every rank's entry counts after each step.
Rank 0 samples and tells the others. A rank that dies closes its connections, so that the others' next
collective fails at once; one that hangs is noticed after the timeout. Heartbeats in the common store tell
which one it was.

Dimension letters: X rows of logits, V vocabulary, K ranks, L layers, B requests, G key/value heads.
"""

import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store, _set_pg_timeout

from megatron_dmc.engine.parallel.processes import WorkerProcesses
from megatron_dmc.errors import EngineDead, UnsupportedConfig

Anything = TypeVar("Anything")
_IDLE = timedelta(days=365)
_SIGNS = ("gloo", "nccl", "connection", "timed out", "timeout")
_BEAT_S = 0.5
_SILENT_S = 2.5
"""A rank that has said nothing for so long is the one that is missing."""


class Command(NamedTuple):
    """A call of the engine's method `name` on every rank."""

    name: str
    arguments: tuple
    keywords: dict[str, Any]


def _stop(closing: threading.Event, heart: threading.Thread) -> None:
    """End a heartbeat while there still is an interpreter for it: a thread that comes back from the
    store to one that is shutting down takes the process with it (`terminate called ...`)."""
    closing.set()
    if heart is not threading.current_thread():
        heart.join(_SILENT_S)


class TensorParallel:
    """The ranks' collectives. Every rank makes one, at the same time.

    Attributes:
        size, rank: of the tensor-parallel group, which is all processes.
        timeout_s: how long a rank may take over its part of a step.
    """

    def __init__(
        self,
        size: int,
        *,
        device: torch.device,
        timeout_s: float = 60.0,
        workers: WorkerProcesses | None = None,
    ):
        """Join the group that is running, or that a launcher describes in the environment.

        Args:
            workers: on rank 0, the other ranks where they are its children.

        Raises:
            UnsupportedConfig: the processes that run are not `size`.
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
        self.size, self.rank, self.timeout_s = size, dist.get_rank(), timeout_s
        self._group = parallel_state.get_tensor_model_parallel_group()
        # Megatron takes whole minutes only
        _set_pg_timeout(timeout, self._group)
        # an idle engine's ranks wait for rank 0 as long as it takes
        self._commands = dist.new_group(backend="gloo", timeout=_IDLE)
        self._counts = dist.new_group(backend="gloo", timeout=timeout)
        self._workers = workers
        self._store = dist.PrefixStore("megatron_dmc", _get_default_store())
        self._heard = dict.fromkeys(range(size), ("", time.monotonic()))
        self._closing = threading.Event()
        heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        heart.start()
        weakref.finalize(self, _stop, self._closing, heart)  # when the process ends, at the latest

    # Whether the others live.

    def _beat(self) -> None:
        """Say in the common store that this rank lives, and note who else does. A stopped process is
        silent, one that waits in a collective is not."""
        count = 0
        own = f"alive-{self.rank}"
        while not self._closing.wait(_BEAT_S):
            count += 1
            try:
                self._store.set(own, str(count))
                for rank, (before, _) in self._heard.items():
                    if self._store.check([f"alive-{rank}"]):
                        said = self._store.get(f"alive-{rank}").decode()
                        if said != before:
                            self._heard[rank] = (said, time.monotonic())
            except RuntimeError:  # rank 0, which holds the store, is gone
                self._heard[0] = ("", -1e9)
                return

    def missing(self) -> str | None:
        """A rank that has ended or stopped, in words; None if all are there."""
        died = None if self._workers is None else self._workers.died()
        if died is not None:
            return died
        rank, (_, last) = min(self._heard.items(), key=lambda item: item[1][1])
        silent = time.monotonic() - last
        if rank == self.rank or silent < _SILENT_S:
            return None
        return f"rank {rank} does not respond" + (f" for {silent:.0f} s" if silent < 1e6 else "")

    def check(self) -> None:
        """Between two steps, at any time.

        Raises:
            EngineDead: a rank has ended, or has been silent for `timeout_s`.
        """
        died = None if self._workers is None else self._workers.died()
        silent = time.monotonic() - min(last for _, last in self._heard.values())
        if died is not None or silent > self.timeout_s + _SILENT_S:
            raise self._lost(died or self.missing() or "a rank does not respond", "")

    def wait_until_loaded(self) -> None:
        """Until every rank has come here, however long it loads.

        Raises:
            EngineDead: one has ended before.
        """
        self._store.set(f"loaded-{self.rank}", "1")
        names = [f"loaded-{rank}" for rank in range(self.size)]
        while not self._store.check(names):
            died = None if self._workers is None else self._workers.died()
            if died is not None:
                raise self._lost(died, "while the model was loaded")
            time.sleep(0.02)

    def close(self) -> None:
        """Rank 0, after the others were told to go: wait for those it started, leave the group."""
        self._closing.set()
        if self._workers is not None:
            self._workers.join()
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()

    def abandon(self) -> None:
        """The engine has failed: nobody is left behind."""
        self._closing.set()
        if self._workers is not None:
            self._workers.kill()

    # Collectives.

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
        """The error of a lost rank, if this is one; may take `_SILENT_S` to find out which."""
        text = str(error).lower()
        if not isinstance(error, dist.DistError) and not any(sign in text for sign in _SIGNS):
            return error
        deadline = time.monotonic() + _SILENT_S + 2 * _BEAT_S
        while (missing := self.missing()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if missing is None and "tim" in text:
            missing = f"a rank took more than {self.timeout_s:g} s over its part of a step"
        return self._lost(missing or "a rank is lost", " ".join(str(error).split())[:200])

    def _lost(self, what: str, detail: str) -> EngineDead:
        return EngineDead(
            f"tensor parallel: {what}; the engine cannot go on with its {self.size} ranks, start it "
            f"anew (seen by rank {self.rank}{': ' if detail else ''}{detail})"
        )
