"""All that attention sees of inference.

Dimension letters: T packed tokens of a step, B requests that decode, N query heads, G key/value heads,
D head dim, S positions, F rotary channels, L layers, R rows, U weighted tokens kept for a segment,
A components of an accumulator, M block-table width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts.base_context import BaseInferenceContext
from torch import Tensor

from megatron_dmc.cache import (
    BlockTables,
    OpenSegments,
    PagePool,
    PrefixCache,
    Snapshot,
    extend_keys,
)
from megatron_dmc.cache.block_tables import Exchange
from megatron_dmc.engine.request import Request
from megatron_dmc.engine.scheduler import NO_PREFIX, CachedPrefix
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

    request: Request
    start: int
    """Position of the first token in its sequence."""
    num_tokens: int

    @property
    def row(self) -> int:
        assert self.request.row is not None
        return self.request.row


@dataclass
class _Piece:
    """A part of a chunk that is computed at once, and the snapshot to take after it."""

    row: int
    first: int
    """Its first token within the packed tokens."""
    start: int
    num_tokens: int
    snapshot: Snapshot | None


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
        prefix_block_size: int | None = None,
        count_flips: bool = False,
        exchange: Exchange | None = None,
        num_ranks: int = 1,
        rank: int = 0,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
    ):
        """
        Args:
            num_kv_heads: of this tensor-parallel rank.
            prefix_block_size: tokens between cached prefixes; None: none are cached.
            count_flips: compare decisions that are made a second time.
            exchange, num_ranks, rank: tensor parallelism, see `BlockTables`.
            sum_over_ranks: of decision logits, for heads that decide together.
        """
        super().__init__(InferenceConfig(max_sequence_length=max_model_len))
        self.max_sequence_length = max_model_len
        self.rule = rule
        self.page_size, self.num_pages = page_size, num_pages
        self.num_heads_total = num_layers * num_kv_heads
        self.pool = PagePool(
            num_pages, page_size, head_dim, dtype=dtype, device=device, poison=poison
        )
        self.tables = BlockTables(
            self.pool, num_layers, max_num_seqs, num_kv_heads, max_model_len, device=device,
            exchange=exchange, num_ranks=num_ranks, rank=rank,
        )  # fmt: skip
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
        self.prefixes: PrefixCache | None = None
        if prefix_block_size is not None:
            self.prefixes = PrefixCache(self.tables, self.segments, block_size=prefix_block_size)
        self.num_queried_tokens = self.num_hit_tokens = 0
        self.num_repeated_decisions = self.num_flipped_decisions = 0
        self._count_flips = count_flips and rule is not None and rule.may_merge
        self._is_merge_L: list[Tensor] = []
        self._num_ranks, self._sum_over_ranks = num_ranks, sum_over_ranks
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
        return self.tables.num_free_pages

    def pages_needed(self, request: Request, num_new_tokens: int) -> int:
        assert request.row is not None
        return self.tables.pages_needed(request.row, num_new_tokens)

    def num_entries(self, request: Request) -> int:
        assert request.row is not None
        return self.tables.most_entries(request.row)

    def find_prefix(self, request: Request) -> CachedPrefix:
        snapshot = self._find(request)
        if snapshot is None or self.prefixes is None:
            return NO_PREFIX
        if self.prefixes.peak_cost(snapshot) > self.num_free_pages:
            return NO_PREFIX
        return CachedPrefix(snapshot.num_tokens, self.prefixes.cost(snapshot))

    def start(self, request: Request, *, use_prefix: bool = False) -> None:
        assert request.row is None
        snapshot = self._find(request) if use_prefix else None
        request.row = self.tables.open_row()
        if snapshot is not None and self.prefixes is not None:
            self.prefixes.restore(snapshot, request.row)
            request.num_computed_tokens = snapshot.num_tokens
        elif self.segments is not None:
            self.segments.clear(request.row)
        if request.metrics.num_preemptions == 0 and self.prefixes is not None:
            cached = min(request.num_computed_tokens, request.num_prompt_tokens)
            request.metrics.num_cached_prompt_tokens = cached
            self.num_queried_tokens += request.num_prompt_tokens
            self.num_hit_tokens += cached

    def release(self, request: Request) -> None:
        assert request.row is not None
        self.tables.close_row(request.row)
        request.row = None

    def _find(self, request: Request) -> Snapshot | None:
        if self.prefixes is None:
            return None
        size, params = self.prefixes.block_size, request.params
        # the last token is always computed: its logits are wanted
        end = request.num_tokens - 1
        if params.prompt_logprobs is not None:
            end = min(end, params.prompt_logprobs_start - 1)
        known = request.tokens_between(0, end)
        extend_keys(request.prefix_keys, known, size)
        return self.prefixes.find(request.prefix_keys[: len(known) // size])

    # A step.

    def begin_step(self, chunks: Sequence[PackedChunk]) -> None:
        """Reserve the pages that the step may need, and lay out the packed tokens.

        Raises:
            OutOfPages: if the scheduler promised too much; nothing has changed then.
        """
        self.tables.reserve([c.row for c in chunks], [c.num_tokens for c in chunks])
        self._chunks = list(chunks)
        self._is_merge_L = []
        # One token, with or without a past, is the decode case; the rest is prefilled piece by piece.
        self._singles: list[_Piece] = []
        self._prefills: list[_Piece] = []
        total = 0
        for chunk in chunks:
            pieces = self._pieces(chunk, total)
            (self._singles if chunk.num_tokens == 1 else self._prefills).extend(pieces)
            total += chunk.num_tokens
        self._num_tokens = total
        self._decode_tokens_B = self._index([p.first for p in self._singles])
        self._decode_rows_B = self._index([p.row for p in self._singles])
        self._decode_positions_B = self._index([p.start for p in self._singles])

    def _pieces(self, chunk: PackedChunk, first: int) -> list[_Piece]:
        """Cut a chunk behind every token where a snapshot is to be taken."""
        cuts: list[tuple[int, Snapshot | None]] = []
        end = chunk.start + chunk.num_tokens
        if self.prefixes is not None:
            size, request = self.prefixes.block_size, chunk.request
            boundaries = range((chunk.start // size + 1) * size, end + 1, size)
            if boundaries:
                extend_keys(request.prefix_keys, request.tokens_between(0, end), size)
            for at in boundaries:
                key = request.prefix_keys[at // size - 1]
                snapshot = self.prefixes.begin(key, at, chunk.row)
                if snapshot is not None:
                    cuts.append((at, snapshot))
        if not cuts or cuts[-1][0] < end:
            cuts.append((end, None))
        pieces, start = [], chunk.start
        for at, snapshot in cuts:
            pieces.append(
                _Piece(chunk.row, first + start - chunk.start, start, at - start, snapshot)
            )
            start = at
        return pieces

    def end_step(self) -> None:
        """Read the counters, keep the snapshots, and give back the pages that the step did not need."""
        if self._count_flips:
            self._compare_decisions(torch.stack(self._is_merge_L).cpu().numpy())
        if self.prefixes is not None:
            for piece in (*self._singles, *self._prefills):
                if piece.snapshot is not None:
                    self.prefixes.finish(piece.snapshot)
        self.tables.trim([c.row for c in self._chunks])
        self._chunks = []

    def _compare_decisions(self, is_merge_LTG: np.ndarray) -> None:
        first = 0
        for chunk in self._chunks:
            if chunk.request.decisions is not None:
                repeated, flipped = chunk.request.decisions.add(
                    chunk.start, is_merge_LTG[:, first : first + chunk.num_tokens]
                )
                self.num_repeated_decisions += repeated
                self.num_flipped_decisions += flipped
            first += chunk.num_tokens

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
        if self._count_flips and is_merge is not None:
            self._is_merge_L.append(is_merge)
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
            self._capture(self._singles, layer_index)
        for piece in self._prefills:
            span = slice(piece.first, piece.first + piece.num_tokens)
            positions = slice(piece.start, piece.start + piece.num_tokens)
            out[span] = cache_ops.prefill(
                q_TND[span], k_TGD[span], v_TGD[span],
                None if is_merge is None else is_merge[span],
                None if omega is None else omega[span],
                None if freqs_SF is None else freqs_SF[positions],
                pool.k_pages_PSD, pool.v_pages_PSD, table_RGM[piece.row],
                num_entries_RG[piece.row],
                None if segments_RGUA is None else segments_RGUA[piece.row],
                softmax_scale=softmax_scale, merge_window=window, backend=self._backend,
            )  # fmt: skip
            self._capture([piece], layer_index)
        return out

    def _capture(self, pieces: Sequence[_Piece], layer_index: int) -> None:
        for piece in pieces:
            if piece.snapshot is not None and self.prefixes is not None:
                self.prefixes.capture(piece.snapshot, layer_index)

    def _gates(self, q_TND: Tensor, k_TGD: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Decisions and importances; a sequence's first token never merges (the ops see to it)."""
        if self.rule is None:
            return None, None
        logit_TG = gates.decision_logit(k_TGD, alpha_offset=self.rule.alpha_offset)
        if self.rule.shared_decisions:
            num_heads = logit_TG.shape[-1] * self._num_ranks
            if self._sum_over_ranks is None:
                logit_TG = gates.share_decisions(logit_TG, num_heads)
            else:
                logit_TG = gates.share_decisions(logit_TG, num_heads, self._sum_over_ranks)
        is_merge_TG = gates.hard_decisions(logit_TG)
        if not self.rule.may_merge:
            is_merge_TG = torch.zeros_like(is_merge_TG)
        omega_TG = gates.importance(q_TND, k_TGD.shape[1], alpha_offset=self.rule.alpha_offset)
        return is_merge_TG, omega_TG

    def _index(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)
