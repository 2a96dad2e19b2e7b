"""Cut off unlikely tokens: top-k, top-p, min-p.

Dimension letters: B requests, V vocabulary, K tokens in order.
"""

import torch
from torch import Tensor


def truncate(
    scores_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor, *, most: int
) -> tuple[Tensor, Tensor]:
    """Cut off the unlikely tokens: top-k, of what is left top-p, of that min-p, as transformers' warpers
    do one after the other. A token that is as likely as the last one kept stays.

    Only the `most` likely tokens are put in order; of the others only the mass is used.

    Args:
        scores_BV: after temperature.
        top_k_B: int64; 0 or less: no limit.
        top_p_B: float64 in (0, 1].
        min_p_B: float64 in [0, 1], relative to the most likely token.

    Returns:
        scores with -inf where cut off; at least one is left. And bool (B,), whether this is the result: no token
        that was not put in order stays, except for those as likely as the last one that was.
    """
    top_BK = scores_BV.topk(most, -1).values
    is_limited_B1 = ((top_k_B > 0) & (top_k_B <= most))[:, None]
    k_B = torch.where(is_limited_B1[:, 0], top_k_B, most)
    last_B1 = top_BK.gather(1, k_B[:, None] - 1)
    is_cut_BK = top_BK < last_B1
    mass_BK = (top_BK.double() - top_BK[:, :1]).exp().masked_fill(is_cut_BK, 0)
    # of those not in order: as likely as the k-th, or any without a limit
    is_more_BV = (scores_BV >= last_B1) | ~is_limited_B1
    mass_BV = (scores_BV.double() - top_BK[:, :1]).exp().masked_fill(~is_more_BV, 0)
    more_B1 = (mass_BV.sum(-1, keepdim=True) - mass_BK.sum(-1, keepdim=True)).clamp_min(0)
    # a token goes if it and all that are less likely come to no more than 1 - top_p
    tail_BK = mass_BK.flip(-1).cumsum(-1).flip(-1) + more_B1
    is_cut_BK |= tail_BK <= (1 - top_p_B[:, None]) * tail_BK[:, :1]
    is_cut_BK |= mass_BK < min_p_B[:, None]
    is_cut_BK[:, 0] = False
    threshold_B1 = top_BK.masked_fill(is_cut_BK, float("inf")).amin(-1, keepdim=True)
    if most == scores_BV.shape[1]:
        is_done_B = torch.ones_like(top_k_B, dtype=torch.bool)
    else:
        is_done_B = (is_cut_BK[:, -1] & (top_k_B <= most)) | is_limited_B1[:, 0]
    return scores_BV.masked_fill(scores_BV < threshold_B1, float("-inf")), is_done_B
