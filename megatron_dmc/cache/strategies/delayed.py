"""Merging or eviction (DMS) after a delay: the latest tokens of a head stay raw in a ring of slots.
docs/method.md, sections 8 and 9."""

from dataclasses import replace

import torch
from torch import Tensor

from megatron_dmc.cache.strategies.base import Storage
from megatron_dmc.cache.strategies.merging import MergingStore, segment_bytes
from megatron_dmc.cache.strategies.rules import CompressionRule
from megatron_dmc.ops.paged.chunks import Chunks
from megatron_dmc.ops.paged.decode import Gates
from megatron_dmc.ops.paged.delayed import prefill_delayed
from megatron_dmc.ops.paged.layer_cache import DelayedDecisions, LayerCache
from megatron_dmc.ops.tensors import accumulator_dtype


class DelayedStore(MergingStore):
    """In the kernels of merging at once. The rings' slots are written again: a cached prefix has copies of their
    pages, and of the decisions about their tokens."""

    def __init__(self, storage: Storage, rule: CompressionRule):
        super().__init__(storage, rule)
        self.num_ring_slots = rule.num_ring_slots
        entries_LRG = storage.tables.num_entries_LRG
        shape, device = (*entries_LRG.shape, rule.num_ring_slots), entries_LRG.device
        is_merge = torch.zeros(shape, dtype=torch.bool, device=device)
        omega = None
        if rule.merges:
            omega = torch.zeros(shape, dtype=accumulator_dtype(storage.dtype), device=device)
        self.decisions = DelayedDecisions(is_merge, omega)
        self.row_state += [is_merge] if omega is None else [is_merge, omega]

    @classmethod
    def state_bytes(cls, rule: CompressionRule | None, head_dim: int) -> int:
        assert rule is not None
        if not rule.merges:
            return rule.num_ring_slots
        return segment_bytes(rule, head_dim) + rule.num_ring_slots * 5  # decision and importance

    @property
    def grows_by_decision(self) -> bool:
        return False

    def layer(self, layer_index: int) -> LayerCache:
        return replace(super().layer(layer_index), delayed=self.decisions[layer_index])

    def prefill(
        self,
        chunks: Chunks,
        layer_index: int,
        q_TND: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        gates_TG: Gates | None,
        freqs_SF: Tensor | None,
        softmax_scale: float,
    ) -> Tensor:
        assert gates_TG is not None
        return prefill_delayed(
            self.layer(layer_index), chunks, q_TND, k_TGD, v_TGD, gates_TG, freqs_SF,
            softmax_scale=softmax_scale, merge_window=self.window, backend=self.backend,
        )  # fmt: skip
