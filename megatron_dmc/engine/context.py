"""All that attention sees of inference.

Dimension letters: T packed tokens of a step, B requests that decode, N query heads, G key/value heads,
D head dim, S positions, F rotary channels, L layers, R rows, U weighted tokens kept for a segment,
A components of an accumulator, M block-table width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts.base_context import BaseInferenceContext
from torch import Tensor

from megatron_dmc.cache import BlockTables, OpenSegments, PagePool
from megatron_dmc.engine.request import Request
from megatron_dmc.ops import cache_ops, gates
from megatron_dmc.ops.merge import num_kept


@dataclass(frozen=True)
class CompressionRule:
    """What the cache does with the borrowed channel; a plain model has no rule."""

    alpha_offset: float
    merge_window: int = 0
    shared_decisions: bool = False
    """The heads of a layer decide together (DMC-C)."""
    may_merge: bool = True
    """False: every token is appended, though the borrowed channel still carries no content."""


@dataclass
class PackedChunk:
    """Tokens of one request within a step's packed tokens."""

    row: int
    start: int
    """Position of the first token in its sequence."""
    num_tokens: int


class PagedContext(BaseInferenceContext):
    """The paged cache of the running requests, as Megatron's inference context.

    It is also the scheduler's `PageAccount`. Between `begin_step` and `end_step` the model runs once,
    and each attention layer calls `attend` once.

    Attributes:
        max_sequence_length: longest sequence, and number of positions that get RoPE angles.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_pages: int,
        page_size: int,
        max_num_seqs: int,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        rule: CompressionRule | None = None,
        backend: str | None = None,
        poison: bool = False,
    ):
        super().__init__(InferenceConfig(max_sequence_length=max_model_len))
        self.max_sequence_length = max_model_len
        self.rule = rule
        self.page_size, self.num_pages = page_size, num_pages
        self.num_heads_total = num_layers * num_kv_heads
        self.pool = PagePool(
            num_pages, page_size, head_dim, dtype=dtype, device=device, poison=poison
        )
        self.tables = BlockTables(
            self.pool, num_layers, max_num_seqs, num_kv_heads, max_model_len, device=device
        )
        self.segments: OpenSegments | None = None
        if rule is not None:
            self.segments = OpenSegments(
                num_layers,
                max_num_seqs,
                num_kv_heads,
                head_dim,
                num_kept=num_kept(rule.merge_window),
                dtype=dtype,
                device=device,
            )
        self._backend = backend
        self._device = torch.device(device)
        self._chunks: list[PackedChunk] = []

    # What Megatron's GPTModel asks.

    def is_static_batching(self) -> bool:
        return False

    def is_decode_only(self) -> bool:
        """True where every request has one token in this step."""
        return all(chunk.num_tokens == 1 for chunk in self._chunks)

    def using_cuda_graph_this_step(self) -> bool:
        return False

    # What the scheduler asks (`PageAccount`).

    @property
    def num_free_pages(self) -> int:
        return self.pool.num_free

    def pages_needed(self, request: Request, num_new_tokens: int) -> int:
        assert request.row is not None
        return self.tables.pages_needed(request.row, num_new_tokens)

    def start(self, request: Request) -> None:
        assert request.row is None
        request.row = self.tables.open_row()
        if self.segments is not None:
            self.segments.clear(request.row)

    def release(self, request: Request) -> None:
        assert request.row is not None
        self.tables.close_row(request.row)
        request.row = None

    # A step.

    def begin_step(self, chunks: Sequence[PackedChunk]) -> None:
        """Reserve the pages that the step may need, and lay out the packed tokens.

        Raises:
            OutOfPages: if the scheduler promised too much; nothing has changed then.
        """
        self.tables.reserve([c.row for c in chunks], [c.num_tokens for c in chunks])
        self._chunks = list(chunks)
        starts, total = [], 0
        for chunk in chunks:
            starts.append(total)
            total += chunk.num_tokens
        self._num_tokens = total
        singles = [(c, s) for c, s in zip(chunks, starts, strict=True) if c.num_tokens == 1]
        # One token, with or without a past, is the decode case; the rest is prefilled chunk by chunk.
        self._decode_tokens_B = self._index([s for _, s in singles])
        self._decode_rows_B = self._index([c.row for c, _ in singles])
        self._decode_positions_B = self._index([c.start for c, _ in singles])
        self._prefills = [(c, s) for c, s in zip(chunks, starts, strict=True) if c.num_tokens > 1]

    def end_step(self) -> None:
        """Give back the pages that the step did not need."""
        self.tables.trim([c.row for c in self._chunks])
        self._chunks = []

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
        """Cache the new tokens of all scheduled requests and attend over their caches.

        Args:
            layer_index: 0-based, over all layers.
            q_TND, k_TGD, v_TGD: unrotated, with the borrowed channel in place.
            freqs_SF: RoPE angles of positions 0 to S-1, or None.

        Returns:
            out_TND.
        """
        assert q_TND.shape[0] == self._num_tokens, "not this step's tokens"
        is_merge, omega = self._gates(q_TND, k_TGD)
        tables, pool = self.tables, self.pool
        table_RGM = tables.page_ids_LRGM[layer_index]
        num_entries_RG = tables.num_entries_LRG[layer_index]
        segments_RGUA = None if self.segments is None else self.segments.state_LRGUA[layer_index]
        window = 0 if self.rule is None else self.rule.merge_window
        out = torch.empty_like(q_TND)
        if self._decode_rows_B.numel():
            at, rows = self._decode_tokens_B, self._decode_rows_B
            freqs = None if freqs_SF is None else freqs_SF[self._decode_positions_B]
            cache_ops.decode_append(
                k_TGD[at], v_TGD[at],
                None if is_merge is None else is_merge[at],
                None if omega is None else omega[at],
                freqs, pool.k_pages_PSD, pool.v_pages_PSD, table_RGM, num_entries_RG,
                segments_RGUA, rows, merge_window=window, backend=self._backend,
            )  # fmt: skip
            out[at] = cache_ops.paged_decode_attention(
                cache_ops.rotate_query(q_TND[at], freqs, compress=self.rule is not None),
                pool.k_pages_PSD, pool.v_pages_PSD, table_RGM[rows], num_entries_RG[rows],
                softmax_scale=softmax_scale, backend=self._backend,
            )  # fmt: skip
        for chunk, first in self._prefills:
            span = slice(first, first + chunk.num_tokens)
            positions = slice(chunk.start, chunk.start + chunk.num_tokens)
            out[span] = cache_ops.prefill(
                q_TND[span], k_TGD[span], v_TGD[span],
                None if is_merge is None else is_merge[span],
                None if omega is None else omega[span],
                None if freqs_SF is None else freqs_SF[positions],
                pool.k_pages_PSD, pool.v_pages_PSD, table_RGM[chunk.row],
                num_entries_RG[chunk.row],
                None if segments_RGUA is None else segments_RGUA[chunk.row],
                softmax_scale=softmax_scale, merge_window=window, backend=self._backend,
            )  # fmt: skip
        return out

    def _gates(self, q_TND: Tensor, k_TGD: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Decisions and importances; a sequence's first token never merges (the ops see to it)."""
        if self.rule is None:
            return None, None
        logit_TG = gates.decision_logit(k_TGD, alpha_offset=self.rule.alpha_offset)
        if self.rule.shared_decisions:
            logit_TG = gates.share_decisions(logit_TG, logit_TG.shape[-1])
        is_merge_TG = gates.hard_decisions(logit_TG)
        if not self.rule.may_merge:
            is_merge_TG = torch.zeros_like(is_merge_TG)
        omega_TG = gates.importance(q_TND, k_TGD.shape[1], alpha_offset=self.rule.alpha_offset)
        return is_merge_TG, omega_TG

    def _index(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
