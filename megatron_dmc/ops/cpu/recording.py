"""Work that consists of this extension's operators, recorded once and then repeated in one call: what a CUDA graph is
to a GPU. A decode step of few tokens otherwise spends as much time in Python as in the kernels.
"""

import functools
import logging
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dmc.ops.cpu import absence
from megatron_dmc.ops.cpu.outputs import Outputs

RECORDED = frozenset(
    f"megatron_dmc_cpu::{name}"
    for name in (
        "copy", "decode_append", "linear", "matmul", "paged_decode_attention", "rms_norm", "swiglu",
    )
)  # fmt: skip
"""Operators that `csrc/cpu/recording.h` records."""
MAX_WATCHED = 4
"""Runs of one piece of work without two in a row that can be recorded: the first one may make tables."""
MAX_TOKENS = 256
"""Of recorded steps. For more of them Python is a small part of the time."""

logger = logging.getLogger(__name__)


class _Watch(TorchDispatchMode):
    """Notes all operators that compute.

    Attributes:
        calls: those that are recorded, with scalars and with the place of every tensor.
        tensors: theirs; as long as these live, equal places are equal tensors.
        foreign: names of others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.tensors: list[Tensor] = []
        self.foreign: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in RECORDED:
            self.calls.append((func, *(self._described(x) for x in args)))
        elif not _is_view(func):
            self.foreign.add(str(func))
        return func(*args, **kwargs or {})

    def _described(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        self.tensors.append(x)
        return x.data_ptr(), x.shape, x.stride(), x.dtype


def _is_view(func: Any) -> bool:
    aliases = [returned.alias_info for returned in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


@dataclass
class _Work:
    """One piece of work.

    Attributes:
        inputs: copies that stay where they are; what the work reads.
        watched: the latest watched run, until the work is recorded or abandoned.
        num_watched: watched runs so far.
        memory: one tensor of each memory that recorded work uses, which keeps it.
        output: of every replay.
    """

    inputs: list[Tensor]
    watched: _Watch | None = None
    num_watched: int = 0
    memory: list[Tensor] = field(default_factory=list, repr=False)
    output: Tensor | None = None
    recording: Any = field(default=None, repr=False)
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
        return x.device.type == "cpu" and len(x) <= MAX_TOKENS and not absence()

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
        watch, recording = _Watch(), torch.classes.megatron_dmc_cpu.Recording()
        with self._outputs.in_use(), _open(recording), watch:
            output = work(*known.inputs)
        before, known.watched = known.watched, watch
        known.num_watched += 1
        if not watch.foreign and before is not None and before.calls == watch.calls:
            known.output, known.recording, known.watched = output, recording, None
            known.memory = list({x.untyped_storage().data_ptr(): x for x in watch.tensors}.values())
        elif known.num_watched == MAX_WATCHED:
            _announce(
                f"they compute with {', '.join(sorted(watch.foreign))}"
                if watch.foreign
                else "memory moves"
            )
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
