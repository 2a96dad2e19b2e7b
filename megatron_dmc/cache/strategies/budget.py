"""Eviction policies (H2O, TOVA, window) within a budget of entries per head, for evaluation.

Every token is appended, attended from, and followed by an eviction where the head holds more than its
budget, in a prompt as in decoding: so a prompt in any chunks gives what decoding its tokens one at a time
gives. A head holds `min(tokens, budget)` entries; the slot of an evicted entry takes a later one. Keys are
cached rotated at the positions of the text; the order of slots means nothing.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megatron_dmc.cache.policies import make_policy
from megatron_dmc.cache.prefixes import PrefixCache
from megatron_dmc.cache.segments import OpenSegments
from megatron_dmc.cache.strategies.base import Step, Storage
from megatron_dmc.cache.strategies.rules import BudgetRule
from megatron_dmc.ops import rope
from megatron_dmc.ops.paged.budget import WorkingCache, attend_and_evict
from megatron_dmc.ops.paged.chunks import Chunks
from megatron_dmc.ops.paged.decode import Gates
from megatron_dmc.ops.tensors import accumulator_dtype


class BudgetStore:
    """The cache of a plain model in one process; what is evicted depends on the whole prompt, so cached
    prefixes are not shared. Prompts and single tokens take the same path."""

    shares_pages: ClassVar[bool] = False
    is_capturable: ClassVar[bool] = False

    def __init__(self, storage: Storage, rule: BudgetRule):
        self.rule, self.policy, self.tables = rule, make_policy(rule.policy), storage.tables
        self.segments: OpenSegments | None = None
        self.num_ring_slots = 0
        self.row_state: list[Tensor] = []
        self.prefixes: PrefixCache | None = None
        self.observe: Callable[[Tensor], None] | None = None
        self.impose: Callable[[int, int, int], Gates | None] | None = None
        entries_LRG, longest = self.tables.num_entries_LRG, storage.max_model_len
        shape = (*entries_LRG.shape, min(rule.budget(longest), longest))
        self._budget_R = [shape[-1]] * shape[1]
        self._position_LRGE = torch.zeros(shape, dtype=torch.int32, device=entries_LRG.device)
        self._score_LRGE = self._position_LRGE.to(accumulator_dtype(storage.dtype))

    @classmethod
    def state_bytes(cls, rule: BudgetRule | None, head_dim: int) -> int:
        return 0

    @property
    def grows_by_decision(self) -> bool:
        return False

    def most_entries(self, num_tokens: int, num_prompt_tokens: int) -> int:
        return min(num_tokens, self.rule.budget(num_prompt_tokens))

    def start(self, row: int, num_prompt_tokens: int) -> None:
        self._budget_R[row] = self.rule.budget(num_prompt_tokens)

    def attend(
        self,
        step: Step,
        layer_index: int,
        q_TND: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        freqs_SF: Tensor | None,
        *,
        softmax_scale: float,
    ) -> Tensor:
        """As `LayerStore`, token by token."""
        chunks = step.chunks
        if freqs_SF is not None:
            freqs_TF = freqs_SF[chunks.positions_T]
            q_TND, k_TGD = (rope.rotate_by(x, freqs_TF) for x in (q_TND, k_TGD))
        parts = [x.split(chunks.num_tokens) for x in (q_TND, k_TGD, v_TGD)]
        outs: list[Tensor] = [q_TND] * len(chunks.rows)
        for members in _alike(chunks.num_tokens):
            q, k, v = ([part[i] for i in members] for part in parts)
            out = self._attend_together(layer_index, q, k, v, chunks, members, softmax_scale)
            for i, of_chunk in zip(members, out, strict=True):
                outs[i] = of_chunk[: chunks.num_tokens[i]]
        return torch.cat(outs)

    def _attend_together(
        self,
        layer: int,
        q: list[Tensor],
        k: list[Tensor],
        v: list[Tensor],
        chunks: Chunks,
        members: list[int],
        softmax_scale: float,
    ) -> Tensor:
        """Out of the pages, through the tokens, and back what is new: out_XTND."""
        pages, device = self.tables.layer(layer), q[0].device

        def index(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        rows, starts, sizes = (
            [x[i] for i in members] for x in (chunks.rows, chunks.starts, chunks.num_tokens)
        )
        budgets = [self._budget_R[row] for row in rows]
        after = [min(s + n, b) for s, n, b in zip(starts, sizes, budgets, strict=True)]
        rows_X, budget_X, first_X = index(rows), index(budgets), index(starts)
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
            pad_sequence(v, batch_first=True), first_X, index(sizes),
            budget_X, cache, update=self.policy.update, rank=self.policy.rank,
            softmax_scale=softmax_scale,
        )  # fmt: skip
        cache.compact(after_X)

        pages.num_entries_RG[rows_X] = after_XG
        pages.take_pages(rows_X, after_XG)
        is_new_XGE = cache.position_XGE >= first_X[:, None, None]
        columns = column_E[:-1].expand(len(rows), num_kv_heads, -1)
        slots_XGE = torch.where(is_new_XGE[..., :-1], pages.slots(rows_X, columns), -1)
        pages.store(
            slots_XGE.flatten(), cache.k_XGED[:, :, :-1].flatten(0, 2),
            cache.v_XGED[:, :, :-1].flatten(0, 2),
        )  # fmt: skip
        kept = slice(0, num_columns - 1)
        self._position_LRGE[layer, rows_X, :, kept] = cache.position_XGE[..., kept].int()
        self._score_LRGE[layer, rows_X, :, kept] = cache.score_XGE[..., kept]
        return out_XTND


def _alike(sizes: Sequence[int]) -> list[list[int]]:
    """Indices in groups: in each the largest size is at most twice the smallest, so that padding costs
    little."""
    groups: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if groups and sizes[groups[-1][0]] <= 2 * sizes[i]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
