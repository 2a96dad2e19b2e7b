"""The same engine with dense attention over contiguous caches: what per-head paging costs at CR 1 (E7).

Everything but decode attention is the engine's own: a request's keys and values lie one after the other, head by
head, in storage for its longest sequence, to which a block table of consecutive pages leads the same append
and prefill. On a GPU decoding runs PyTorch's variable-length flash attention; it does not split a sequence, so
a batch with fewer sequences x heads than multiprocessors leaves some idle. On a CPU it is scaled-dot-product
attention, padded to the longest request. Page accounting still runs, over pages that stay empty:
the cache's memory is needed twice, so measure at a batch that leaves room.

Dimension letters: L layers, R rows of per-request storage, M pages of a row's head, S slots per page, G key/value
heads, D head dim, T packed tokens of a step, N query heads, B requests that decode, E entries.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_dmc.cache.strategies import Step, Storage
from megatron_dmc.cache.strategies.merging import MergingStore
from megatron_dmc.engine.chunk import Chunk
from megatron_dmc.engine.context import PagedContext
from megatron_dmc.errors import DMCError
from megatron_dmc.ops.paged import decode
from megatron_dmc.ops.paged import pages as page_ops
from megatron_dmc.ops.paged.layer_cache import LayerCache
from megatron_dmc.ops.testing.yardstick import errors_within_twice_the_yardstick


class DenseStore(MergingStore):
    """The plain cache in the context's contiguous keys and values."""

    def __init__(self, storage: Storage, context: "DenseContext"):
        super().__init__(storage, None)
        self.context = context

    def layer(self, layer_index: int) -> LayerCache:
        """As `GatedStore`."""
        context = self.context
        return LayerCache(
            context.k_LPSD[layer_index], context.v_LPSD[layer_index], context.table_RGM,
            self.tables.num_entries_LRG[layer_index],
        )  # fmt: skip

    def decode(
        self,
        step: Step,
        layer_index: int,
        q_BND: Tensor,
        k_BGD: Tensor,
        v_BGD: Tensor,
        freqs_SF: Tensor | None,
        softmax_scale: float,
    ) -> Tensor:
        """As `GatedStore`."""
        rotated = decode.gate_and_append(
            self.layer(layer_index), step.rows_B, q_BND, k_BGD, v_BGD,
            self.angles(freqs_SF, q_BND), step.positions_B, alpha_offset=None,
            backend=self.backend,
        )  # fmt: skip
        return self.context.attend_to_rows(layer_index, rotated, softmax_scale)


class DenseContext(PagedContext):
    """`PagedContext` whose keys and values are contiguous; for plain models.

    Raises:
        DMCError: with a compression rule, cached prefixes or 8-bit pages; or on a GPU without half precision.
    """

    def __init__(self, **options: Any) -> None:
        if options.get("rule") is not None or options.get("prefix_block_size") is not None:
            raise DMCError("dense attention knows neither merging nor cached prefixes")
        if options.get("cache_dtype") is not None:
            raise DMCError(
                "dense attention has entries of the model's dtype: kv_cache_dtype='auto'"
            )
        device, dtype = torch.device(options.get("device", "cpu")), options["dtype"]
        if device.type == "cuda" and dtype not in (torch.float16, torch.bfloat16):
            raise DMCError(f"dense attention in {dtype} on a GPU: use bfloat16 or float16")
        super().__init__(**options)
        size, num_heads, dim = self.page_size, options["num_kv_heads"], options["head_dim"]
        shape_RGM = (options["max_num_seqs"], num_heads, -(-options["max_model_len"] // size))
        num_pages = shape_RGM[0] * shape_RGM[1] * shape_RGM[2]
        pages = torch.arange(num_pages, dtype=torch.int32, device=device)
        self.table_RGM = pages.view(shape_RGM)
        # zeros: a masked value that is NaN would still be NaN times no weight
        self.k_LPSD, self.v_LPSD = (
            torch.zeros(options["num_layers"], num_pages, size, dim, dtype=dtype, device=device)
            for _ in "kv"
        )
        self._longest = 1
        storage = Storage(self.tables, dtype, options["max_model_len"], options.get("backend"))
        self.store = DenseStore(storage, self)

    def begin_step(self, chunks: Sequence[Chunk]) -> None:
        """As `PagedContext.begin_step`."""
        super().begin_step(chunks)
        self._longest = max((chunk.end for chunk in chunks if chunk.num_tokens == 1), default=1)

    def set_decode(self, rows_B: Tensor, positions_B: Tensor) -> None:
        """As `PagedContext.set_decode`; also where the requests' keys begin and how many they are."""
        super().set_decode(rows_B, positions_B)
        _, num_heads, width = self.table_RGM.shape
        rows = rows_B.clamp_min(0)
        self._starts_X = torch.cat([rows, rows[:1]]).int() * (num_heads * width * self.page_size)
        self._lengths_B = torch.where(rows_B < 0, 0, positions_B + 1).int()
        self._queries_X = torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device)

    def end_step(self) -> None:
        """As `PagedContext.end_step`; every token has become an entry, whose page stays empty."""
        for chunk in self._chunks:
            if -(-chunk.end // self.page_size) > -(-chunk.start // self.page_size):
                page_ops.take_for_entries(
                    self.tables.page_ids_LRGM[:, chunk.row],
                    self.tables.num_entries_LRG[:, chunk.row], self.page_size, self.pool.free_pages,
                )  # fmt: skip
        super().end_step()

    def attend_to_rows(self, layer_index: int, q_BND: Tensor, softmax_scale: float) -> Tensor:
        """Attention of one token of each request, `set_decode`'s, over its row."""
        pages = self.k_LPSD[layer_index], self.v_LPSD[layer_index]
        if not q_BND.is_cuda:
            shape = (*self.table_RGM.shape[:2], -1, q_BND.shape[-1])
            k, v = (x.view(shape)[self._step.rows_B, :, : self._longest] for x in pages)
            seen_BE = torch.arange(self._longest, device=q_BND.device) < self._lengths_B[:, None]
            out = scaled_dot_product_attention(
                q_BND[:, :, None], k, v, attn_mask=seen_BE[:, None, None], scale=softmax_scale,
                enable_gqa=True,
            )  # fmt: skip
            return out[:, :, 0]
        k, v = self.flat_rows(layer_index)
        out, *_ = torch.ops.aten._flash_attention_forward(
            q_BND.contiguous(), k, v, self._queries_X, self._starts_X, 1, self.max_sequence_length, 0.0, False,
            False, scale=softmax_scale, seqused_k=self._lengths_B,
        )  # fmt: skip
        return out

    def flat_rows(self, layer_index: int) -> list[Tensor]:
        """A layer's keys and values as one run of tokens, (tokens, G, D): key e of a head is e rows of D
        behind the first key of its row."""
        _, num_heads, width = self.table_RGM.shape
        positions = width * self.page_size
        pages = self.k_LPSD[layer_index], self.v_LPSD[layer_index]
        return [
            x.as_strided(
                (x.numel() // x.shape[-1] - (num_heads - 1) * positions, num_heads, x.shape[-1]),
                (x.shape[-1], positions * x.shape[-1], 1), x.storage_offset(),
            )
            for x in pages
        ]  # fmt: skip

    def check(self, q_BND: Tensor, rows_B: Tensor, positions_B: Tensor, checked: slice) -> float:
        """Relative error of the first layer's decode attention, of the requests `checked`.

        Raises:
            DMCError: it is wrong.
        """
        self.set_decode(rows_B, positions_B)
        self._longest = int(positions_B.max()) + 1
        scale = q_BND.shape[-1] ** -0.5
        ours = self.attend_to_rows(0, q_BND, scale)[checked]
        exact: list[Tensor] = []
        honest: list[Tensor] = []
        for q_ND, row, position in zip(
            q_BND[checked], rows_B[checked].tolist(), positions_B[checked].tolist(), strict=True
        ):
            k, v = (
                x[0][self.table_RGM[row].long()].flatten(1, 2)[:, : position + 1]
                for x in (self.k_LPSD, self.v_LPSD)
            )
            for of, dtype in ((exact, torch.float64), (honest, q_ND.dtype)):
                args = (q_ND[None, :, None].to(dtype), k[None].to(dtype), v[None].to(dtype))
                of.append(
                    scaled_dot_product_attention(*args, scale=scale, enable_gqa=True)[0, :, 0]
                )
        return errors_within_twice_the_yardstick(
            ["dense attention"], [ours], [torch.stack(exact)], [torch.stack(honest)]
        )["dense attention"]
