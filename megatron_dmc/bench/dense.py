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

from megatron_dmc.engine.context import PackedChunk, PagedContext
from megatron_dmc.errors import DMCError
from megatron_dmc.ops import page_ops
from megatron_dmc.ops.cache_ops import apply_rope


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
            options["num_layers"], options["max_num_seqs"], options["max_model_len"],
            options["num_kv_heads"], options["head_dim"],
        )  # fmt: skip
        device = torch.device(options.get("device", "cpu"))
        self.k_LRSGD, self.v_LRSGD = (
            torch.empty(shape, dtype=options["dtype"], device=device) for _ in "kv"
        )
        self._flash = _flash_with_cache(device)

    def begin_step(self, chunks: Sequence[PackedChunk], *args: Any, **kwargs: Any) -> Any:
        """As `PagedContext.begin_step`."""
        result = super().begin_step(chunks, *args, **kwargs)
        self._now = list(chunks)
        device = self.k_LRSGD.device
        starts: list[int] = []
        rows: list[int] = []
        first = 0
        decoding: list[tuple[int, int, int]] = []
        for chunk in chunks:
            starts += range(chunk.start, chunk.start + chunk.num_tokens)
            rows += [chunk.row] * chunk.num_tokens
            if chunk.num_tokens == 1:
                decoding.append((first, chunk.row, chunk.start))
            first += chunk.num_tokens
        self._positions_T = torch.tensor(starts, device=device)
        self._rows_T = torch.tensor(rows, device=device)
        self._decoding_3B = torch.tensor(decoding, dtype=torch.int64, device=device).view(-1, 3).T
        self._longest = 1 + max((start for _, _, start in decoding), default=0)
        return result

    def end_step(self, *args: Any, **kwargs: Any) -> Any:
        """As `PagedContext.end_step`; every token is an entry, with a page that stays empty."""
        rows = [chunk.row for chunk in self._now]
        sizes = torch.tensor([chunk.num_tokens for chunk in self._now], device=self.k_LRSGD.device)
        entries_LRG = self.tables.num_entries_LRG
        entries_LRG[:, rows] += sizes[None, :, None]
        for chunk in self._now:
            full, rest = divmod(chunk.start, self.page_size)
            if chunk.start + chunk.num_tokens > (full + (rest > 0)) * self.page_size:
                page_ops.take_for_entries(
                    self.tables.page_ids_LRGM[:, chunk.row], entries_LRG[:, chunk.row],
                    self.page_size, self.pool.free_pages,
                )  # fmt: skip
        return super().end_step(*args, **kwargs)

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
        freqs_TF = None if freqs_SF is None else freqs_SF[self._positions_T]
        q_TND, k_TGD = apply_rope(q_TND, freqs_TF), apply_rope(k_TGD, freqs_TF)
        k_RSGD[self._rows_T, self._positions_T] = k_TGD
        v_RSGD[self._rows_T, self._positions_T] = v_TGD
        out = torch.empty_like(q_TND)
        at, rows_B, starts_B = self._decoding_3B
        if at.numel():
            out[at] = self._decode(q_TND[at], k_RSGD, v_RSGD, rows_B, starts_B + 1, softmax_scale)
        first = 0
        for chunk in self._now:
            if chunk.num_tokens > 1:
                span = slice(first, first + chunk.num_tokens)
                end = chunk.start + chunk.num_tokens
                out[span] = self._prefill(
                    q_TND[span], k_RSGD[chunk.row, :end], v_RSGD[chunk.row, :end], softmax_scale
                )
            first += chunk.num_tokens
        return out

    def _decode(
        self,
        q_BND: Tensor,
        k_RSGD: Tensor,
        v_RSGD: Tensor,
        rows_B: Tensor,
        lengths_B: Tensor,
        softmax_scale: float,
    ) -> Tensor:
        if self._flash is not None:
            return self._flash(
                q_BND[:, None], k_RSGD, v_RSGD, cache_seqlens=lengths_B.int(),
                cache_batch_idx=rows_B.int(), softmax_scale=softmax_scale,
            )[:, 0]  # fmt: skip
        k, v = (x[rows_B, : self._longest].transpose(1, 2) for x in (k_RSGD, v_RSGD))
        seen_BS = torch.arange(self._longest, device=q_BND.device) < lengths_B[:, None]
        out = scaled_dot_product_attention(
            q_BND[:, :, None], k, v, attn_mask=seen_BS[:, None, None], scale=softmax_scale,
            enable_gqa=True,
        )  # fmt: skip
        return out[:, :, 0]

    @staticmethod
    def _prefill(q_TND: Tensor, k_SGD: Tensor, v_SGD: Tensor, softmax_scale: float) -> Tensor:
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
