"""Memory for outputs of the extension's operators."""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

_in_use = threading.local()


class Outputs:
    """Memory for the outputs of recorded work, which stays where it is. The parts of the work take turns with its
    two halves: all of them need as much of it as two."""

    def __init__(self) -> None:
        self._halves: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._outgrown: list[Tensor] = []
        self._num_parts = self._num_taken = 0

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Take this thread's outputs from here."""
        _in_use.outputs = self
        self._num_parts = self._num_taken = 0
        try:
            yield
        finally:
            _in_use.outputs = None

    def next_part(self) -> None:
        """Reuse the memory of the part before the last one."""
        self._num_parts, self._num_taken = self._num_parts + 1, 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """As `torch.empty`."""
        half, at = self._halves[self._num_parts % 2], self._num_taken
        size = math.prod(shape) * dtype.itemsize
        self._num_taken += 1
        if at == len(half):
            half.append(torch.empty(0, dtype=torch.uint8))
        if half[at].numel() < size:  # smaller work may have been recorded with it
            self._outgrown.append(half[at])
            half[at] = torch.empty(1 << max(size - 1, 63).bit_length(), dtype=torch.uint8)
        return half[at][:size].view(dtype).view(*shape)


def output(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for the output of an operator."""
    outputs: Outputs | None = getattr(_in_use, "outputs", None)
    return torch.empty(*shape, dtype=dtype) if outputs is None else outputs.take(shape, dtype)


def next_part() -> None:
    """While work is recorded: its next part begins, which reads nothing of the part before the last one."""
    outputs: Outputs | None = getattr(_in_use, "outputs", None)
    if outputs is not None:
        outputs.next_part()
