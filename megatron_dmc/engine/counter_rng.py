"""Counter-based random numbers: a pure function of (seed, position), computed on the logits' device."""

import torch
from torch import Tensor

_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)
_SECOND = 0x94D049BB133111EB - (1 << 64)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix_seeds(*parts_B: Tensor) -> Tensor:
    """`ops.gates.mix_seed` of every row: int64 in, 63-bit int64 out. Relies on int64 overflow."""
    state = torch.zeros_like(parts_B[0])
    for part in parts_B:
        state = state + part + _STEP
        state = (state ^ _shifted(state, 30)) * _FIRST
        state = (state ^ _shifted(state, 27)) * _SECOND
        state = state ^ _shifted(state, 31)
    return _shifted(state, 1)


def uniforms(seed_B: Tensor, position_B: Tensor) -> Tensor:
    """One number in [0, 1) per row, float64, from (seed, position): the same in every batch.

    Args:
        seed_B, position_B: int64.
    """
    return _shifted(mix_seeds(seed_B, position_B), 10).double() * 2.0**-53
