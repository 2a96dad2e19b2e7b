"""Attention that also returns its weights, and evicts one entry after each token. Plain PyTorch.

Dimension letters: X requests, T tokens of each (padded), N query heads, G key/value heads, R = N / G,
D head dim, E columns of the cache that is being worked on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dmc.ops.tensors import accumulator_dtype

Rank = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Update = Callable[[Tensor, Tensor], Tensor]


@dataclass
class WorkingCache:
    """Entries of some requests, copied out of their pages. A head's entries occupy any columns; one is
    always free.

    Attributes:
        k_XGED, v_XGED: rotated keys, and values.
        position_XGE: int64, of each entry's token in its sequence; -1 where the column is free.
        score_XGE: the policy's score of each entry; float32, or float64.
    """

    k_XGED: Tensor
    v_XGED: Tensor
    position_XGE: Tensor
    score_XGE: Tensor

    @property
    def first_free_XG(self) -> Tensor:
        """The free column of lowest index."""
        return (self.position_XGE < 0).int().argmax(-1)

    def put(
        self, column_XG: Tensor, k_XGD: Tensor, v_XGD: Tensor, position_XG: Tensor, score_XG: Tensor
    ) -> None:
        """Write one column of each head. Mutates all four tensors."""
        x, g = _indices(column_XG)
        self.k_XGED[x, g, column_XG], self.v_XGED[x, g, column_XG] = k_XGD, v_XGD
        self.position_XGE[x, g, column_XG] = position_XG
        self.score_XGE[x, g, column_XG] = score_XG.to(self.score_XGE.dtype)

    def compact(self, num_entries_X: Tensor) -> None:
        """Bring the entries to columns 0 to `num_entries - 1`, where one at most is missing. Mutates all
        four tensors."""
        free_XG = self.first_free_XG
        last_XG = num_entries_X[:, None].expand_as(free_XG)
        x, g = _indices(free_XG)
        column = (x, g, last_XG)
        self.put(free_XG, self.k_XGED[column], self.v_XGED[column], self.position_XGE[column],
                 self.score_XGE[column])  # fmt: skip
        self.position_XGE[column] = -1


def _indices(like_XG: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.arange(like_XG.shape[0], device=like_XG.device)[:, None]
    return x, torch.arange(like_XG.shape[1], device=like_XG.device)


def attention_with_weights(
    q_XND: Tensor, k_XGED: Tensor, v_XGED: Tensor, is_entry_XGE: Tensor, *, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """One query per request over the entries of each head.

    Args:
        q_XND: rotated queries, heads ordered by group.
        is_entry_XGE: bool; every head has an entry.

    Returns:
        out_XND in the queries' dtype, and weights_XGRE in float32 (float64), 0 where no entry is.
    """
    acc = accumulator_dtype(q_XND.dtype)
    q = q_XND.unflatten(1, (k_XGED.shape[1], -1)).to(acc)
    scores = softmax_scale * (q @ k_XGED.to(acc).transpose(2, 3))
    weights = scores.masked_fill(~is_entry_XGE[:, :, None], float("-inf")).softmax(-1)
    out = weights @ v_XGED.to(acc)
    return out.flatten(1, 2).to(q_XND.dtype), weights


def attend_and_evict(
    q_XTND: Tensor,
    k_XTGD: Tensor,
    v_XTGD: Tensor,
    first_X: Tensor,
    num_tokens_X: Tensor,
    budget_X: Tensor,
    cache: WorkingCache,
    *,
    update: Update,
    rank: Rank,
    softmax_scale: float,
) -> Tensor:
    """Token by token: a new entry, attention over all entries of the head, and, where there is one entry
    more than the budget, the one of lowest rank goes. Mutates `cache`.

    Args:
        q_XTND, k_XTGD: rotated at the tokens' positions; v_XTGD: values.
        first_X: int64, position of each request's first token.
        num_tokens_X: int64; what is beyond is padding and changes nothing.
        budget_X: int64, entries that a head may keep; at most E - 1.
        update, rank: `cache.policies.base.EvictionPolicy`.

    Returns:
        out_XTND; padding undefined.
    """
    out_XTND = torch.empty_like(q_XTND)
    for t in range(q_XTND.shape[1]):
        is_live_X11 = (t < num_tokens_X)[:, None, None]
        newest_X = first_X + t
        column_XG = cache.first_free_XG
        position_XG = torch.where(is_live_X11[..., 0], newest_X[:, None], -1).expand_as(column_XG)
        score_XG = torch.zeros_like(column_XG)
        cache.put(column_XG, k_XTGD[:, t], v_XTGD[:, t], position_XG, score_XG)
        is_entry_XGE = cache.position_XGE >= 0
        out_XTND[:, t], weights_XGRE = attention_with_weights(
            q_XTND[:, t], cache.k_XGED, cache.v_XGED, is_entry_XGE, softmax_scale=softmax_scale
        )
        updated = update(cache.score_XGE, weights_XGRE)
        cache.score_XGE = torch.where(is_live_X11, updated, cache.score_XGE)
        rank_XGE = rank(cache.score_XGE, cache.position_XGE, newest_X, budget_X)
        lowest_XG1 = rank_XGE.masked_fill(~is_entry_XGE, float("inf")).argmin(-1, keepdim=True)
        is_over_XG1 = (is_entry_XGE.sum(-1, keepdim=True) > budget_X[:, None, None]) & is_live_X11
        kept_XG1 = cache.position_XGE.gather(-1, lowest_XG1)
        cache.position_XGE.scatter_(-1, lowest_XG1, torch.where(is_over_XG1, -1, kept_XG1))
    return out_XTND
