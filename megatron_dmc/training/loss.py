"""The compression loss. docs/method.md, section 4.

Dimension letters: B batch, L layers of the whole model.
"""

from typing import Literal

import torch
from torch import Tensor

from megatron_dmc.schedule import target_merge_rate


def merge_rate(
    counts_LB: Tensor, *, num_tokens: int, num_kv_heads: int, num_documents_B: Tensor | None = None
) -> Tensor:
    """Merge rate of each sequence over all layers, KV heads and tokens that may merge.

    Args:
        counts_LB: merges, summed over heads (of all ranks) and tokens.
        num_tokens: T of the sequences.
        num_kv_heads: KV heads of a layer, over all ranks.
        num_documents_B: documents packed into each sequence; their first tokens cannot merge.
            None: one.

    Returns:
        merge_rate_B.
    """
    if num_documents_B is None:
        num_documents_B = torch.ones_like(counts_LB[0])
    mergeable_B = (num_tokens - num_documents_B.to(counts_LB)).clamp_min(1)
    return counts_LB.sum(0) / (counts_LB.shape[0] * num_kv_heads * mergeable_B)


def compression_loss(
    merge_rate_B: Tensor,
    *,
    target_cr: float,
    hinge: Literal["sequence", "batch", "none"] = "sequence",
) -> Tensor:
    """What the merge rates lack of their target, a scalar. With `target = 1 - 1 / target_cr`:

        sequence    mean over sequences of max(0, target - merge_rate)
        batch       max(0, target - mean over sequences of merge_rate)
        none        mean over sequences of target - merge_rate; negative beyond the target

    Args:
        hinge: "batch" is over the sequences given. Training gives those of one microbatch on one
            data-parallel rank, so the loss depends on `--micro-batch-size` and the data-parallel
            size; that of the other two does not.
    """
    target = target_merge_rate(target_cr)
    if hinge == "batch":
        return torch.relu(target - merge_rate_B.mean())
    short_B = target - merge_rate_B
    return (short_B if hinge == "none" else torch.relu(short_B)).mean()


def measured_cr(counts_LB: Tensor, *, num_tokens: int, num_kv_heads: int) -> tuple[Tensor, Tensor]:
    """(tokens, entries) over all sequences, layers and KV heads; their quotient is the CR.

    Returns:
        two float32 scalars, to be summed over microbatches and ranks before dividing.
    """
    tokens = torch.tensor(
        float(num_tokens * num_kv_heads * counts_LB.numel()), device=counts_LB.device
    )
    return tokens, tokens - counts_LB.detach().sum()
