"""What the ops and the host sides of their kernels share about tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums are kept in float32, for a float64 model in float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense_channels(x: Tensor) -> Tensor:
    """`x`, copied only if its channels (the last dimension) do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def to_device(
    values: Tensor | Sequence, device: torch.device | str, *, dtype: torch.dtype = torch.int64
) -> Tensor:
    """Numbers of the host on a device; on a GPU by a copy from pinned memory that nobody waits for."""
    x = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def take_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """The rows of `x` that the host names: a view where they lie side by side, else a copy. On a GPU
    nobody waits, as they would for `x[rows]` with a list."""
    first, end = (rows[0], rows[0] + len(rows)) if rows else (0, 0)
    if list(rows) == list(range(first, end)):
        return x[first:end]
    return x.index_select(0, to_device(rows, x.device))
