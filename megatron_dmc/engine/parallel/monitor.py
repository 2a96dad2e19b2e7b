"""Detect ranks that have ended or stopped responding."""

import threading
import time
import weakref
from typing import Any

from megatron_dmc.engine.parallel.children import ChildRanks
from megatron_dmc.errors import DMCError, EngineDead

_BEAT_S = 0.5
_SILENT_S = 2.5
"""A rank without a heartbeat for this long does not respond."""


class RankMonitor:
    """Heartbeats of all ranks in their common store, and exit codes of this rank's children.

    A process that is stopped sends no heartbeat; one that waits in a collective does.

    Args:
        store: of torch.distributed, with a prefix of its own.
        timeout_s: longest silence between steps.
        children: on rank 0, the ranks that it spawned.
    """

    def __init__(
        self, store: Any, rank: int, size: int, *, timeout_s: float, children: ChildRanks | None
    ):
        self._store, self._rank, self._size = store, rank, size
        self._timeout_s, self._children = timeout_s, children
        self._heard = dict.fromkeys(range(size), ("", time.monotonic()))
        self._stopping = threading.Event()
        thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        thread.start()
        weakref.finalize(self, _stop, self._stopping, thread)  # at exit, at the latest

    def check(self) -> None:
        """Raises:
        EngineDead: a rank has ended, or has been silent for `timeout_s`.
        """
        exited = None if self._children is None else self._children.exited()
        silent = time.monotonic() - min(last for _, last in self._heard.values())
        if exited is not None or silent > self._timeout_s + _SILENT_S:
            raise self._dead(exited or self._lost_rank() or "a rank does not respond")

    def diagnose(self, error: BaseException) -> BaseException:
        """The `EngineDead` of a lost rank, if there is one; otherwise the error. Waits up to 3.5 s for the
        heartbeats to show it.

        Args:
            error: what was raised here. torch.distributed raises a RuntimeError when a peer is lost.
        """
        if isinstance(error, DMCError) or not isinstance(error, RuntimeError):
            return error
        deadline = time.monotonic() + _SILENT_S + 2 * _BEAT_S
        while (lost := self._lost_rank()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return error if lost is None else self._dead(lost, " ".join(str(error).split())[:200])

    def wait_until_loaded(self) -> None:
        """Wait until every rank has called this, however long it loads.

        Raises:
            EngineDead: a child ended before.
        """
        self._store.set(f"loaded-{self._rank}", "1")
        names = [f"loaded-{rank}" for rank in range(self._size)]
        while not self._store.check(names):
            exited = None if self._children is None else self._children.exited()
            if exited is not None:
                raise self._dead(exited, "while the model was loaded")
            time.sleep(0.02)

    def stop(self) -> None:
        """Stop the heartbeats."""
        self._stopping.set()

    def _beat(self) -> None:
        count = 0
        while not self._stopping.wait(_BEAT_S):
            count += 1
            try:
                self._store.set(f"alive-{self._rank}", str(count))
                for rank, (before, _) in self._heard.items():
                    if self._store.check([f"alive-{rank}"]):
                        beat = self._store.get(f"alive-{rank}").decode()
                        if beat != before:
                            self._heard[rank] = (beat, time.monotonic())
            except RuntimeError:  # rank 0, which holds the store, is gone
                self._heard[0] = ("", -1e9)
                return

    def _lost_rank(self) -> str | None:
        """The first rank that has ended or does not respond, in words."""
        exited = None if self._children is None else self._children.exited()
        if exited is not None:
            return exited
        rank, (_, last) = min(self._heard.items(), key=lambda item: item[1][1])
        silent = time.monotonic() - last
        if rank == self._rank or silent < _SILENT_S:
            return None
        return f"rank {rank} does not respond" + (f" for {silent:.0f} s" if silent < 1e6 else "")

    def _dead(self, lost: str, detail: str = "") -> EngineDead:
        return EngineDead(
            f"tensor parallel: {lost}; the engine cannot continue without all {self._size} ranks, restart "
            f"it (seen by rank {self._rank}{': ' if detail else ''}{detail})"
        )


def _stop(stopping: threading.Event, thread: threading.Thread) -> None:
    """End the heartbeats before the interpreter ends: a thread that returns from the store to an interpreter
    that shuts down aborts the process."""
    stopping.set()
    if thread is not threading.current_thread():
        thread.join(_SILENT_S)
