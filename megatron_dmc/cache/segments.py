"""The open segment of every head of every request.

Dimension letters: L layers, R rows (one per running request), G key/value heads, D head dim, U weighted tokens kept
for an open segment, A = 2 D + 1 components of an accumulator.
"""

import torch

from megatron_dmc.ops.tensors import accumulator_dtype


class OpenSegments:
    """The open segment of every (layer, row, KV head): sums of unrotated keys and values.

    Attributes:
        state_LRGUA: float32 (float64 for a float64 model), `[omega k, omega v, omega]` of the U kept
            tokens; with unlimited merging U is 1 and holds their running sum.
    """

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_kept: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        shape = (num_layers, num_rows, num_kv_heads, num_kept, 2 * head_dim + 1)
        self.state_LRGUA = torch.zeros(shape, dtype=accumulator_dtype(dtype), device=device)

    def clear(self, row: int) -> None:
        """Clear a row's segments."""
        self.state_LRGUA[:, row] = 0.0
