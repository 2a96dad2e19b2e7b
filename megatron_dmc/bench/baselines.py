"""Baselines of the engine: itself with dense attention (E7), and transformers (E2).

Dense attention over contiguous caches in the same engine shows the cost of per-head paging at CR 1. Everything but
decode attention is the engine's own: a request's keys and values lie one after the other, head by
head, in storage for its longest sequence, to which a block table of consecutive pages leads the same append
and prefill. On a GPU decoding runs PyTorch's variable-length flash attention; it does not split a sequence, so
a batch with fewer sequences x heads than multiprocessors leaves some idle. On a CPU it is scaled-dot-product
attention, padded to the longest request. Page accounting still runs, over pages that stay empty:
the cache's memory is needed twice, so measure at a batch that leaves room.

transformers runs its paged continuous batching on the same model, lengths and machine: two passes over the same requests
with one manager, of which the second is timed (the first sizes the cache and captures graphs); greedy, full-length
completions, no prefix sharing.

Dimension letters: L layers, R rows of per-request storage, M pages of a row's head, S slots per page, G key/value
heads, D head dim, T packed tokens of a step, N query heads, B requests that decode, E entries.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_dmc.bench.measure import Settings, synchronize
from megatron_dmc.bench.output import Row
from megatron_dmc.cache.strategies import Step, Storage
from megatron_dmc.cache.strategies.merging import MergingStore
from megatron_dmc.checkpoint.hf_config import to_hf_config
from megatron_dmc.engine.chunk import Chunk
from megatron_dmc.engine.context import PagedContext
from megatron_dmc.engine.decode_batch import DecodeBatch
from megatron_dmc.errors import DMCError
from megatron_dmc.ops.paged import decode
from megatron_dmc.ops.paged import pages as page_ops
from megatron_dmc.ops.paged.layer_cache import LayerCache

logger = logging.getLogger(__name__)

Asked = Sequence[tuple[Any, int]]
"""Prompts, texts or token ids, with the number of tokens to generate."""


class DenseStore(MergingStore):
    """The plain cache in the context's contiguous keys and values."""

    def __init__(self, storage: Storage, context: "DenseContext"):
        super().__init__(storage, None)
        self.context = context

    def layer(self, layer_index: int) -> LayerCache:
        """As `GatedStore`."""
        return self.context.layer(layer_index)

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

    def layer(self, layer_index: int) -> LayerCache:
        """A layer's contiguous keys and values, as pages."""
        return LayerCache(
            self.k_LPSD[layer_index], self.v_LPSD[layer_index], self.table_RGM,
            self.tables.num_entries_LRG[layer_index],
        )  # fmt: skip

    def begin_step(self, chunks: Sequence[Chunk]) -> None:
        """As `PagedContext.begin_step`."""
        super().begin_step(chunks)
        self._longest = max((chunk.end for chunk in chunks if chunk.num_tokens == 1), default=1)

    def begin_decode(self, batch: DecodeBatch) -> None:
        """As `PagedContext.begin_decode`."""
        super().begin_decode(batch)
        self._longest = int(batch.starts_B.max()) + 1

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

    def attend_in_first_layer(
        self, cache: LayerCache, rows_B: Tensor, q_BND: Tensor, *, softmax_scale: float
    ) -> Tensor:
        """In place of `decode.paged_decode_attention` over `cache`, the first layer, for its check."""
        positions_B = cache.num_entries_RG[rows_B, 0] - 1
        self.set_decode(rows_B, positions_B)
        self._longest = int(positions_B.max()) + 1
        return self.attend_to_rows(0, q_BND, softmax_scale)


def transformers_row(
    description: Any,
    asked: Asked,
    settings: Settings,
    *,
    path: Path | None,
    cache_tokens: int | None,
) -> Row:
    """Figures of `generate_batch`, or `skipped` with the reason.

    Args:
        description: the model's sizes, for random weights.
        asked: prompts as token ids; all ask for as many tokens as the first.
        path: a Hugging Face folder with the weights; None: random ones.
        cache_tokens: size of the cache in tokens; None: as transformers chooses.
    """
    try:
        from transformers import (
            AutoConfig,
            AutoModelForCausalLM,
            ContinuousBatchingConfig,
            GenerationConfig,
        )
    except ImportError as e:
        return {"skipped": f"transformers has no continuous batching here: {e}"}
    if any(isinstance(prompt, str) for prompt, _ in asked):
        return {"skipped": "prompts are texts; compare with random token ids"}
    attention = "flash_attention_2" if _has_flash_attention(settings) else "sdpa"
    try:
        with torch.device(settings.device):
            if path is not None:
                model = AutoModelForCausalLM.from_pretrained(
                    path, dtype=settings.dtype, attn_implementation=attention,
                    trust_remote_code=False,
                )  # fmt: skip
            else:
                values = to_hf_config(description)
                config = AutoConfig.for_model(values.pop("model_type"), **values)
                model = AutoModelForCausalLM.from_config(
                    config, dtype=settings.dtype, attn_implementation=attention
                )
        model.eval().requires_grad_(False)
        page_size = 256 if settings.on_gpu else 16
        num_new = asked[0][1]
        options = {
            "generation_config": GenerationConfig(
                max_new_tokens=num_new, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            "continuous_batching_config": ContinuousBatchingConfig(
                page_size=page_size,
                num_blocks=None if cache_tokens is None else -(-cache_tokens // page_size),
                allow_block_sharing=False,
                max_batch_tokens=None if settings.on_gpu else 2048,
            ),
            "record_timestamps": True,
            "persistent_manager": True,
        }
        prompts = [list(prompt) for prompt, _ in asked]
        for _ in range(2):
            synchronize()
            began = time.perf_counter()
            outputs = model.generate_batch(prompts, **options)
            synchronize()
            seconds = time.perf_counter() - began
        model.destroy_cached_continuous_batching_manager()
    except Exception as e:  # another package's fault is a line in the table, not the end of the run
        logger.info("transformers failed", exc_info=True)
        return {"skipped": f"failed: {type(e).__name__}: {e}".splitlines()[0]}
    return _figures(list(outputs.values()), len(asked), num_new, seconds, attention)


def token_rates(seconds: float, num_requests: int, num_in: int, num_out: int) -> Row:
    """Columns of a run with `num_in` tokens of prompts and `num_out` generated ones; vLLM's keys."""
    return {
        "elapsed_time": seconds,
        "num_requests": num_requests,
        "total_num_tokens": num_in + num_out,
        "total_output_tokens": num_out,
        "requests_per_second": num_requests / seconds,
        "tokens_per_second": (num_in + num_out) / seconds,
        "output_tokens_per_second": num_out / seconds,
    }


def _has_flash_attention(settings: Settings) -> bool:
    from transformers.utils import is_flash_attn_2_available

    return settings.on_gpu and bool(is_flash_attn_2_available())


def _figures(outputs: list[Any], count: int, num_new: int, seconds: float, attention: str) -> Row:
    num_out = sum(len(output.generated_tokens) for output in outputs)
    if len(outputs) != count or num_out != count * num_new:
        return {
            "skipped": f"failed: {len(outputs)} of {count} requests came back, with {num_out} of "
            f"{count * num_new} tokens"
        }
    num_in = sum(len(output.prompt_ids) for output in outputs)
    row: Row = {
        "attention": attention, **token_rates(seconds, count, num_in, num_out), "repeats": 1,
        "measured_cr": 1.0,
    }  # fmt: skip
    # while all of them decoded
    stamps = [output.timestamps for output in outputs]
    if all(stamps):
        first, last = max(s[0] for s in stamps), min(s[-1] for s in stamps)
        between = sum(first < t <= last for s in stamps for t in s)
        if between and last > first:
            row["decode_tokens_per_second"] = between / (last - first)
    return row
