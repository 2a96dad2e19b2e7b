"""The same engine with dense attention over contiguous caches: what per-head paging costs at CR 1 (E7).

Everything but attention is the engine's own, page accounting included, though the pages stay empty. Keys and
values of a request lie one after the other, rotated, in storage for its longest sequence. Decoding uses
flash-attn's kernel with a cache where it is installed, else PyTorch's scaled-dot-product attention, which
pads the requests to the longest. So the cache's memory is needed twice: measure at a batch that leaves room.

Dimension letters: L layers, R rows of per-request storage, S positions, G key/value heads, D head dim,
T packed tokens of a step, N query heads, B requests that decode, F rotary channels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_dmc.engine.chunks import PackedChunk
from megatron_dmc.engine.context import PagedContext
from megatron_dmc.errors import DMCError
from megatron_dmc.ops import page_ops
from megatron_dmc.ops.cache_ops import apply_rope
from megatron_dmc.ops.tensors import to_device


def _flash_with_cache(device: torch.device) -> Any | None:
    if device.type != "cuda":
        return None
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return None
    return flash_attn_with_kvcache


class DenseContext(PagedContext):
    """`PagedContext` whose keys and values are contiguous; for plain models.

    Raises:
        DMCError: with a compression rule or cached prefixes.
    """

    def __init__(self, **options: Any) -> None:
        if options.get("rule") is not None or options.get("prefix_block_size") is not None:
            raise DMCError("dense attention knows neither merging nor cached prefixes")
        super().__init__(**options)
        shape = (
            # padding is row -1, the last
            options["num_layers"], options["max_num_seqs"] + 1, options["max_model_len"],
            options["num_kv_heads"], options["head_dim"],
        )  # fmt: skip
        device = torch.device(options.get("device", "cpu"))
        # zeros: a masked value that is NaN would still be NaN times no weight
        self.k_LRSGD, self.v_LRSGD = (
            torch.zeros(shape, dtype=options["dtype"], device=device) for _ in "kv"
        )
        self._flash = _flash_with_cache(device)
        self._longest = 1

    @property
    def is_capturable(self) -> bool:
        """Whether CUDA graphs can hold decode steps: PyTorch's attention has shapes of the step's lengths."""
        return self._flash is not None

    def begin_step(self, chunks: Sequence[PackedChunk]) -> None:
        """As `PagedContext.begin_step`."""
        super().begin_step(chunks)
        self._longest = max((chunk.end for chunk in chunks if chunk.num_tokens == 1), default=1)

    def end_step(self) -> None:
        """As `PagedContext.end_step`; every token is an entry, with a page that stays empty."""
        rows, sizes = to_device(
            [[c.row for c in self._chunks], [c.num_tokens for c in self._chunks]],
            self.k_LRSGD.device,
        )  # fmt: skip
        entries_LRG = self.tables.num_entries_LRG
        entries_LRG[:, rows] += sizes[None, :, None]
        for chunk in self._chunks:
            full, rest = divmod(chunk.start, self.page_size)
            if chunk.end > (full + (rest > 0)) * self.page_size:
                page_ops.take_for_entries(
                    self.tables.page_ids_LRGM[:, chunk.row], entries_LRG[:, chunk.row],
                    self.page_size, self.pool.free_pages,
                )  # fmt: skip
        super().end_step()

    def attend(
        self,
        layer_index: int,
        q_TND: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        freqs_SF: Tensor | None,
        *,
        softmax_scale: float,
    ) -> Tensor:
        """As `PagedContext.attend`."""
        k_RSGD, v_RSGD = self.k_LRSGD[layer_index], self.v_LRSGD[layer_index]
        out = torch.empty_like(q_TND)
        rows_B, positions_B = self._rows_B, self._positions_B
        first = len(rows_B)
        if first:
            freqs = None if freqs_SF is None else freqs_SF[positions_B]
            k_RSGD[rows_B, positions_B] = apply_rope(k_TGD[:first], freqs)
            v_RSGD[rows_B, positions_B] = v_TGD[:first]
            q = apply_rope(q_TND[:first], freqs)
            out[:first] = self._attend_to_row(q, k_RSGD, v_RSGD, softmax_scale)
        for chunk in self._chunks:
            if chunk.num_tokens > 1:
                span, end = slice(first, first + chunk.num_tokens), chunk.end
                freqs = None if freqs_SF is None else freqs_SF[chunk.start : end]
                k_RSGD[chunk.row, chunk.start : end] = apply_rope(k_TGD[span], freqs)
                v_RSGD[chunk.row, chunk.start : end] = v_TGD[span]
                out[span] = _causal(
                    apply_rope(q_TND[span], freqs), k_RSGD[chunk.row, :end],
                    v_RSGD[chunk.row, :end], softmax_scale,
                )  # fmt: skip
                first = span.stop
        return out

    def _attend_to_row(
        self, q_BND: Tensor, k_RSGD: Tensor, v_RSGD: Tensor, softmax_scale: float
    ) -> Tensor:
        rows_B, lengths_B = self._rows_B, self._positions_B + 1
        if self._flash is not None:
            rows = torch.where(rows_B < 0, k_RSGD.shape[0] - 1, rows_B)
            return self._flash(
                q_BND[:, None], k_RSGD, v_RSGD, cache_seqlens=lengths_B.int(),
                cache_batch_idx=rows.int(), softmax_scale=softmax_scale,
            )[:, 0]  # fmt: skip
        k, v = (x[rows_B, : self._longest].transpose(1, 2) for x in (k_RSGD, v_RSGD))
        seen_BS = torch.arange(self._longest, device=q_BND.device) < lengths_B[:, None]
        out = scaled_dot_product_attention(
            q_BND[:, :, None], k, v, attn_mask=seen_BS[:, None, None], scale=softmax_scale,
            enable_gqa=True,
        )  # fmt: skip
        return out[:, :, 0]


def _causal(q_TND: Tensor, k_SGD: Tensor, v_SGD: Tensor, softmax_scale: float) -> Tensor:
    """Attention of the last T of S tokens."""
    num_new, num_seen = len(q_TND), len(k_SGD)
    q, k, v = (x.transpose(0, 1)[None] for x in (q_TND, k_SGD, v_SGD))
    mask = None
    if num_new < num_seen:
        mask = torch.ones(num_new, num_seen, dtype=torch.bool, device=q.device)
        mask = mask.tril(num_seen - num_new)
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=softmax_scale, enable_gqa=True
    )
    return out[0].transpose(0, 1)
