"""Small tensor utilities shared by the ops and the host sides of their kernels."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums are kept in float32, for a float64 model in float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense_channels(x: Tensor) -> Tensor:
    """`x`, copied only if its channels (the last dimension) are not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def empty_tokens_first(x_BHTD: Tensor) -> Tensor:
    """Like `x`, uninitialised, but tokens lead in memory: what the projection behind attention wants."""
    batch, heads, tokens, dim = x_BHTD.shape
    return x_BHTD.new_empty(tokens, batch, heads, dim).permute(1, 2, 0, 3)


def to_device(
    values: Tensor | Sequence | np.ndarray,
    device: torch.device | str,
    *,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Copy host numbers to a device; non-blocking, from pinned memory, on a GPU."""
    x = torch.as_tensor(values, dtype=dtype)
    if torch.device(device).type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def take_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of `x` named by the host: a view if they are consecutive, otherwise a copy. Non-blocking on a GPU,
    unlike `x[rows]` with a list."""
    first, end = (rows[0], rows[0] + len(rows)) if rows else (0, 0)
    if list(rows) == list(range(first, end)):
        return x[first:end]
    return x.index_select(0, to_device(rows, x.device))
