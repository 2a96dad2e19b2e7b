"""Work that consists of this extension's operators, recorded once and then repeated in one call: what a CUDA graph is
to a GPU. A decode step of few tokens otherwise spends as much time in Python as in the kernels.
"""

import functools
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.ops import cpu
from megatron_dmc.ops.cpu.outputs import Outputs

MAX_WATCHED = 4
"""Runs of one piece of work without two in a row that can be recorded: the first one may make tables."""
MAX_TOKENS = 256
"""Of recorded steps. For more of them Python is a small part of the time."""

logger = logging.getLogger(__name__)


@dataclass
class _Work:
    """One piece of work.

    Attributes:
        inputs: copies that stay where they are; what the work reads.
        watched: what the latest run gave to operators, until the work is recorded or abandoned.
        num_watched: watched runs so far.
        recording: what is replayed.
        output: of every replay.
    """

    inputs: list[Tensor]
    watched: Any = None
    num_watched: int = 0
    recording: Any = None
    output: Tensor | None = None
    is_abandoned: bool = False


class Recorder:
    """Pieces of work, each recorded once two runs in a row called the same operators on the same memory. Work that
    computes with anything else, or on memory that changes, is not recorded but runs as it is, every time.

    Parameters of the model and tables of the cache have to stay where they are, as for CUDA graphs.
    """

    def __init__(self) -> None:
        self._work: dict[Hashable, _Work] = {}
        self._outputs = Outputs()

    @property
    def num_recorded(self) -> int:
        """Pieces of work that are replayed."""
        return sum(work.recording is not None for work in self._work.values())

    @staticmethod
    def takes(x: Tensor) -> bool:
        """Whether work on these tokens is worth recording, and can be."""
        return x.device.type == "cpu" and len(x) <= MAX_TOKENS and not cpu.absence()

    def run(self, key: Hashable, inputs: Sequence[Tensor], work: Callable[..., Tensor]) -> Tensor:
        """work(*inputs), or its replay.

        Args:
            key: names the work, and shapes and dtypes of its inputs.
            inputs: all that differs from run to run.
            work: reads its inputs and writes nothing to them.

        Returns:
            Its output, valid until the next run of any work.
        """
        if (known := self._work.get(key)) is None:
            known = self._work[key] = _Work([x.clone() for x in inputs])
        if known.is_abandoned:
            return work(*inputs)
        for copy, given in zip(known.inputs, inputs, strict=True):
            copy.copy_(given)
        if known.recording is None:
            return self._watched(known, work)
        known.recording.replay()
        assert known.output is not None
        return known.output

    def _watched(self, known: _Work, work: Callable[..., Tensor]) -> Tensor:
        recording = torch.classes.megatron_dmc_cpu.Recording()
        with self._outputs.in_use(), _open(recording):
            output = work(*known.inputs)
        before, known.watched = known.watched, recording
        known.num_watched += 1
        foreign = recording.foreign()
        if not foreign and before is not None and recording.is_like(before):
            recording.settle()
            known.output, known.recording, known.watched = output, recording, None
        elif known.num_watched == MAX_WATCHED:
            _announce(f"they compute with {', '.join(foreign)}" if foreign else "memory moves")
            known.is_abandoned, known.watched = True, None
        return output


@functools.cache
def _announce(reason: str) -> None:
    logger.info("decode steps are not recorded: %s", reason)


@contextmanager
def _open(recording: Any) -> Iterator[None]:
    recording.begin()
    try:
        yield
    finally:
        recording.end()
