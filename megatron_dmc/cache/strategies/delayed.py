"""Merging after a delay: the latest tokens of a head stay raw in a ring of slots. docs/method.md, section 9."""

import torch
from torch import Tensor

from megatron_dmc.cache.strategies.base import GatedStore, Step, Storage
from megatron_dmc.cache.strategies.merging import open_segments, segment_bytes
from megatron_dmc.cache.strategies.rules import CompressionRule
from megatron_dmc.ops.paged import delayed
from megatron_dmc.ops.paged.chunks import Chunks
from megatron_dmc.ops.paged.decode import Gates
from megatron_dmc.ops.tensors import accumulator_dtype


class DelayedStore(GatedStore):
    """PyTorch, except for decode attention. The rings' slots are written again, so their pages are not shared."""

    shares_pages = False
    is_capturable = False

    def __init__(self, storage: Storage, rule: CompressionRule):
        super().__init__(storage, rule)
        self.window, self.segments = rule.merge_window, open_segments(storage, rule)
        entries_LRG = storage.tables.num_entries_LRG
        shape, device = (*entries_LRG.shape, rule.merge_delay), entries_LRG.device
        self.decisions = delayed.DelayedDecisions(
            torch.zeros(shape, dtype=torch.bool, device=device),
            torch.zeros(shape, dtype=accumulator_dtype(storage.dtype), device=device),
        )

    @classmethod
    def state_bytes(cls, rule: CompressionRule | None, head_dim: int) -> int:
        assert rule is not None
        return segment_bytes(rule, head_dim) + rule.merge_delay * 5  # decision and importance

    def append(
        self,
        step: Step,
        layer_index: int,
        k_BGD: Tensor,
        v_BGD: Tensor,
        gates_BG: Gates | None,
        freqs_SF: Tensor | None,
    ) -> None:
        assert gates_BG is not None
        delayed.decode_delayed(
            self.layer(layer_index), step.rows_B, k_BGD, v_BGD, gates_BG, freqs_SF,
            step.positions_B, self.decisions[layer_index], merge_window=self.window,
        )  # fmt: skip

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
        outs, cache = [], self.layer(layer_index)
        for row, start, at in chunks.spans():
            outs.append(
                delayed.prefill_delayed(
                    cache, row, q_TND[at], k_TGD[at], v_TGD[at], (gates_TG[0][at], gates_TG[1][at]),
                    freqs_SF, start, self.decisions[layer_index], softmax_scale=softmax_scale,
                    merge_window=self.window,
                )
            )  # fmt: skip
        return torch.cat(outs)
