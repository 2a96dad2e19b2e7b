"""Dynamic Memory Sparsification: tokens leave the cache after a delay instead of merging. docs/method.md,
section 8."""

import torch
from torch import Tensor

from megatron_dmc.cache.strategies.base import GatedStore, Step, Storage
from megatron_dmc.cache.strategies.rules import CompressionRule
from megatron_dmc.ops.paged import evict
from megatron_dmc.ops.paged.chunks import Chunks
from megatron_dmc.ops.paged.decode import Gates


class DMSStore(GatedStore):
    """PyTorch, except for decode attention. A token takes the slot of one that left, so pages are not shared."""

    shares_pages = False
    is_capturable = False

    def __init__(self, storage: Storage, rule: CompressionRule):
        super().__init__(storage, rule)
        assert rule.eviction_delay is not None
        entries_LRG = storage.tables.num_entries_LRG
        shape, device = (*entries_LRG.shape, rule.eviction_delay + 1), entries_LRG.device
        self.rings = evict.Rings(
            torch.zeros(shape, dtype=torch.int32, device=device),
            torch.zeros(shape, dtype=torch.bool, device=device),
        )

    @classmethod
    def state_bytes(cls, rule: CompressionRule | None, head_dim: int) -> int:
        assert rule is not None and rule.eviction_delay is not None
        return (rule.eviction_delay + 1) * 5  # entry and decision

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
        evict.decode_evict(
            self.layer(layer_index), step.rows_B, k_BGD, v_BGD, gates_BG[0],
            None if freqs_SF is None else freqs_SF[step.positions_B], step.positions_B,
            self.rings[layer_index],
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
        freqs_TF = None if freqs_SF is None else freqs_SF[chunks.positions_T]
        outs, cache = [], self.layer(layer_index)
        for row, start, at in chunks.spans():
            outs.append(
                evict.prefill_evict(
                    cache, row, q_TND[at], k_TGD[at], v_TGD[at], gates_TG[0][at],
                    None if freqs_TF is None else freqs_TF[at], start, self.rings[layer_index],
                    softmax_scale=softmax_scale,
                )
            )  # fmt: skip
        return torch.cat(outs)
