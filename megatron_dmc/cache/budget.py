"""The paged cache under an eviction policy.

Every token is appended, attended from, and followed by an eviction where the head holds more than its
budget, in a prompt as in decoding: so a prompt in any chunks gives what decoding its tokens one at a time
gives. A head holds `min(tokens, budget)` entries; the slot of an evicted entry takes a later one. Keys are
cached rotated at the positions of the text; the order of slots means nothing.

Dimension letters: L layers, R rows, G key/value heads, N query heads, D head dim, T packed tokens of a step,
X requests computed together, E cache entries, M block-table width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_dmc.cache import BlockTables
from megatron_dmc.cache.policies.base import EvictionPolicy
from megatron_dmc.ops.paged.budget import WorkingCache, attend_and_evict
from megatron_dmc.ops.tensors import accumulator_dtype


@dataclass(frozen=True)
class EvictingChunk:
    """Tokens of one request within a step's packed tokens."""

    row: int
    start: int
    """Position of the first one in its sequence."""
    num_tokens: int


class EvictingCache:
    """Positions and scores of the entries, beside the block tables.

    Args:
        most_entries: largest budget of a row.
        dtype: the model's.

    Attributes:
        budget_R: entries that a head of the row may keep.
    """

    def __init__(
        self,
        policy: EvictionPolicy,
        tables: BlockTables,
        *,
        most_entries: int,
        dtype: torch.dtype,
    ):
        self.policy, self.tables = policy, tables
        device = tables.num_entries_LRG.device
        num_layers, num_rows, num_kv_heads = tables.num_entries_LRG.shape
        shape = (num_layers, num_rows, num_kv_heads, most_entries)
        self.budget_R = [most_entries] * num_rows
        self._position_LRGE = torch.zeros(shape, dtype=torch.int32, device=device)
        self._score_LRGE = torch.zeros(shape, dtype=accumulator_dtype(dtype), device=device)

    def attend(
        self,
        layer_index: int,
        q_TND: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        chunks: Sequence[EvictingChunk],
        *,
        softmax_scale: float,
    ) -> Tensor:
        """Cache the chunks' tokens and attend over their caches, token by token.

        Args:
            q_TND, k_TGD: rotated. The chunks lie one behind the other.

        Returns:
            out_TND.
        """
        sizes = [chunk.num_tokens for chunk in chunks]
        parts = [tuple(x.split(sizes)) for x in (q_TND, k_TGD, v_TGD)]
        pieces: list[Tensor | None] = [None] * len(chunks)
        for members in _alike(sizes):
            q, k, v = ([part[i] for i in members] for part in parts)
            out = self._attend_together(
                layer_index, q, k, v, [chunks[i] for i in members], softmax_scale
            )
            for i, piece in zip(members, out, strict=True):
                pieces[i] = piece[: sizes[i]]
        return torch.cat([piece for piece in pieces if piece is not None])

    def _attend_together(
        self,
        layer: int,
        q: list[Tensor],
        k: list[Tensor],
        v: list[Tensor],
        chunks: list[EvictingChunk],
        softmax_scale: float,
    ) -> Tensor:
        """Out of the pages, through the tokens, and back what is new: out_XTND."""
        pages, device = self.tables.layer(layer), q[0].device

        def index(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        budgets = [self.budget_R[c.row] for c in chunks]
        after = [min(c.start + c.num_tokens, b) for c, b in zip(chunks, budgets, strict=True)]
        rows_X, budget_X = index([c.row for c in chunks]), index(budgets)
        first_X = index([c.start for c in chunks])
        before_X, after_X = torch.minimum(first_X, budget_X), index(after)
        # one column is free at any time
        num_columns = max(after) + 1
        num_kv_heads = pages.num_kv_heads
        before_XG, after_XG = (x[:, None].expand(-1, num_kv_heads) for x in (before_X, after_X))
        k_old, v_old, _ = pages.load(rows_X, k[0].dtype, before_XG)
        pad = (0, 0, 0, num_columns - k_old.shape[2])
        k_XGED, v_XGED = (torch.nn.functional.pad(x, pad) for x in (k_old, v_old))
        width = min(num_columns, self._position_LRGE.shape[-1])
        column_E = torch.arange(num_columns, device=device)
        padding = (0, num_columns - width)
        position_XGE, score_XGE = (
            torch.nn.functional.pad(x[layer, rows_X, :, :width], padding)
            for x in (self._position_LRGE, self._score_LRGE)
        )
        position_XGE = position_XGE.long().masked_fill(column_E >= before_XG[..., None], -1)
        cache = WorkingCache(k_XGED, v_XGED, position_XGE, score_XGE)
        out_XTND = attend_and_evict(
            pad_sequence(q, batch_first=True), pad_sequence(k, batch_first=True),
            pad_sequence(v, batch_first=True), first_X, index([c.num_tokens for c in chunks]),
            budget_X, cache, update=self.policy.update, rank=self.policy.rank,
            softmax_scale=softmax_scale,
        )  # fmt: skip
        cache.compact(after_X)

        pages.num_entries_RG[rows_X] = after_XG
        pages.take_pages(rows_X, after_XG)
        is_new_XGE = cache.position_XGE >= first_X[:, None, None]
        columns = column_E[:-1].expand(len(chunks), num_kv_heads, -1)
        slots_XGE = torch.where(is_new_XGE[..., :-1], pages.slots(rows_X, columns), -1)
        pages.store(
            slots_XGE.flatten(), cache.k_XGED[:, :, :-1].flatten(0, 2),
            cache.v_XGED[:, :, :-1].flatten(0, 2),
        )  # fmt: skip
        kept = slice(0, num_columns - 1)
        self._position_LRGE[layer, rows_X, :, kept] = cache.position_XGE[..., kept].int()
        self._score_LRGE[layer, rows_X, :, kept] = cache.score_XGE[..., kept]
        return out_XTND


def _alike(sizes: list[int]) -> list[list[int]]:
    """Indices in groups: in each the largest size is at most twice the smallest, so that padding costs
    little."""
    groups: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if groups and sizes[groups[-1][0]] <= 2 * sizes[i]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
