"""DMC whose decisions take effect n tokens later, in plain PyTorch: with a merge delay (n of them), or with
delayed eviction (DMS: one more than its delay, since a token's decision is about the token before it).

A query sees the last n tokens raw (near) and those before them as the cache holds them (far). The rows of a
`Ring` and the new tokens together are the *line*: a row's tokens one after the other, its padding behind them.

Dimension letters: T new tokens, U rows of a line, B batch, N query heads, G key/value heads, D head dim,
E far entries, P of them cached before.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops_dmc import QUERY_BLOCK


class Line(NamedTuple):
    """The tokens of a ring and the new ones behind them.

    Attributes:
        values: tensors (U, B, ...), as they were given.
        before_B: tokens of each row that were in the ring.
        late_TB: bool: the row's token leaves the ring. Such tokens come first.
    """

    values: list[Tensor]
    before_B: Tensor
    late_TB: Tensor


class Ring:
    """The last n tokens of every row of a batch: tensors (n, B, ...), oldest first."""

    def __init__(self, n: int):
        self.n = n
        self.values: list[Tensor] | None = None
        self.count_B: Tensor | None = None

    def pass_through(self, new: list[Tensor], real_TB: Tensor | None) -> Line:
        """Put new tokens (T, B, ...) behind those of the ring, which then holds the last ones."""
        num_tokens, batch = new[0].shape[:2]
        device, n = new[0].device, self.n
        if self.values is None or self.count_B is None:
            self.values = [x.new_zeros(n, *x.shape[1:]) for x in new]
            self.count_B = torch.zeros(batch, dtype=torch.int64, device=device)
        before_B = self.count_B
        length_B = torch.full_like(before_B, num_tokens) if real_TB is None else real_TB.sum(0)
        rows = torch.arange(batch, device=device)
        place = torch.arange(n + num_tokens, device=device)[:, None]
        at = torch.where(place < before_B, place, place - before_B + n)
        at = at.clamp_max(n + num_tokens - 1)
        line = [
            torch.cat([old, x.to(old.dtype)])[at, rows]
            for old, x in zip(self.values, new, strict=True)
        ]
        total_B = before_B + length_B
        self.count_B = total_B.clamp_max(n)
        kept = total_B - self.count_B + torch.arange(n, device=device)[:, None]
        kept = kept.clamp_max(n + num_tokens - 1)
        self.values = [x[kept, rows].detach() for x in line]
        late_TB = torch.arange(num_tokens, device=device)[:, None] < total_B - self.count_B
        return Line(line, before_B, late_TB)

    def select(self, rows: Tensor) -> None:
        """Keep the given rows, in this order and possibly more than once."""
        if self.values is not None and self.count_B is not None:
            self.values = [x[:, rows] for x in self.values]
            self.count_B = self.count_B[rows]


def keeps_next(log_keep_UBG: Tensor, num_rows: int) -> Tensor:
    """`log_keep` of the token behind each of the first rows; 0 where there is none."""
    return F.pad(log_keep_UBG[1:], (0, 0, 0, 0, 0, 1))[:num_rows]


def attend_delayed(
    q_TBND: Tensor,
    near: tuple[Tensor, Tensor],
    far: tuple[Tensor, Tensor],
    log_keep_UBG: Tensor,
    *,
    n: int,
    evicts: bool,
    softmax_scale: float,
    before_B: Tensor | None = None,
    cached_BGP: Tensor | None = None,
    document_TB: Tensor | None = None,
    implementation: str = "sdpa",
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of the line's last T tokens. For the query at row i of the line

        i - n < j <= i :  score_ij = q_i . k_j / sqrt(D)                       near: raw
        j = i - n      :  score_ij = q_i . y_j / sqrt(D)                       far; evicting: as below
        j < i - n      :  score_ij = q_i . y_j / sqrt(D) + log_keep_{j+1}      far

    Args:
        near: rotated raw keys and values of the line, (U, B, G, D).
        far: P cached entries, then the states of the line's first rows; evicting: the raw keys and values.
        log_keep_UBG: `log(1 - alpha)` of the line's rows.
        before_B: rows of the line before the first query; None: none.
        cached_BGP: bool, which of the cached entries exist and are visible.
        document_TB: number of each token's document, without a cache; other documents are invisible.
        implementation: "sdpa", or "eager", which also returns the weights.

    Returns:
        out_TBND, and weights_BNTX over far and near, or None.
    """
    num_tokens, num_heads = q_TBND.shape[0], q_TBND.shape[2]
    num_past = 0 if cached_BGP is None else cached_BGP.shape[-1]
    group = num_heads // near[0].shape[2]
    q, k, v = (
        x.permute(1, 2, 0, 3)
        for x in (q_TBND, torch.cat([far[0], near[0]]), torch.cat([far[1], near[1]]))
    )
    k, v = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k, v))
    num_states, num_rows = far[0].shape[0] - num_past, near[0].shape[0]
    keep = keeps_next(log_keep_UBG, num_states).permute(1, 2, 0)[:, :, None].to(q.dtype)
    state = torch.arange(num_states, device=q.device)
    row = torch.arange(num_rows, device=q.device)
    at_BT = torch.arange(num_tokens, device=q.device)[None]
    if before_B is not None:
        at_BT = at_BT + before_B[:, None]
    outs, all_weights = [], []
    for start in range(0, num_tokens, QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        at = at_BT[:, None, block, None]
        hidden_far, hidden_near = state > at - n, (row > at) | (row <= at - n)
        if document_TB is not None:
            of_row = document_TB.T[:, None]
            other = of_row[:, :, block, None] != of_row[:, :, None]
            hidden_far, hidden_near = hidden_far | other[..., :num_states], hidden_near | other
        bias_far = keep.expand(-1, -1, at.shape[2], -1)
        if not evicts:
            bias_far = bias_far.masked_fill(state == at - n, 0.0)
        bias_far = bias_far.masked_fill(hidden_far, float("-inf"))
        bias_near = torch.zeros_like(hidden_near, dtype=q.dtype).masked_fill(
            hidden_near, float("-inf")
        )
        parts = [bias_far, bias_near.expand(*bias_far.shape[:3], -1)]
        if cached_BGP is not None:
            past = torch.zeros_like(cached_BGP, dtype=q.dtype)
            past = past.masked_fill(~cached_BGP, float("-inf"))[:, :, None]
            parts.insert(0, past.expand(*bias_far.shape[:3], -1))
        bias = torch.cat(parts, dim=-1).repeat_interleave(group, dim=1)
        if implementation == "eager":
            scores = softmax_scale * q[:, :, block] @ k.transpose(2, 3) + bias
            wide = torch.promote_types(q.dtype, torch.float32)
            all_weights.append(scores.to(wide).softmax(-1).to(q.dtype))
            outs.append(all_weights[-1] @ v)
        else:
            outs.append(
                F.scaled_dot_product_attention(
                    q[:, :, block], k, v, attn_mask=bias, scale=softmax_scale
                )
            )
    out = torch.cat(outs, dim=2).permute(2, 0, 1, 3)
    return out, torch.cat(all_weights, dim=2) if all_weights else None
