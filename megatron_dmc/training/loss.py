"""The compression loss. docs/method.md, section 4.

Dimension letters: B batch, L layers of the whole model.
"""

import torch
from torch import Tensor

from megatron_dmc.schedule import target_merge_rate


def merge_rate(counts_LB: Tensor, *, num_tokens: int, num_kv_heads: int) -> Tensor:
    """Merge rate of each sequence over all layers, KV heads and tokens but the first.

    Args:
        counts_LB: merges, summed over heads (of all ranks) and tokens.
        num_tokens: T of the sequences.
        num_kv_heads: KV heads of a layer, over all ranks.

    Returns:
        merge_rate_B.
    """
    possible = counts_LB.shape[0] * num_kv_heads * max(num_tokens - 1, 1)
    return counts_LB.sum(0) / possible


def compression_loss(merge_rate_B: Tensor, *, target_cr: float) -> Tensor:
    """`mean over sequences of max(0, (1 - 1 / target_cr) - merge_rate)`, a scalar."""
    return torch.relu(target_merge_rate(target_cr) - merge_rate_B).mean()


def measured_cr(counts_LB: Tensor, *, num_tokens: int, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """(tokens, entries) over all sequences, layers and KV heads; their quotient is the CR.

    Returns:
        two float32 scalars, to be summed over microbatches and ranks before dividing.
    """
    tokens = torch.tensor(
        float(num_tokens * num_kv_heads * counts_LB.numel()), device=counts_LB.device
    )
    return tokens, tokens - counts_LB.detach().sum()
