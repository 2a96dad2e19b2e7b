"""All that attention sees of inference.

Dimension letters: T packed tokens of a step, B requests with one token in it, N query heads, G key/value heads,
D head dim, S positions, F rotary channels, L layers, R rows, U weighted tokens kept for a segment,
A components of an accumulator, M block-table width.
"""

from collections.abc import Callable, Sequence
from functools import partial

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
from megatron_dmc.cache.budget import EvictingCache, EvictingChunk
from megatron_dmc.cache.policies import EvictionRule, make_policy
from megatron_dmc.cache.tables import Exchange
from megatron_dmc.engine.chunks import PackedChunk, Piece, Round
from megatron_dmc.engine.flipped_decisions import FlipCounter
from megatron_dmc.engine.request import Request
from megatron_dmc.engine.rule import CompressionRule
from megatron_dmc.engine.scheduler import NO_PREFIX, CachedPrefix
from megatron_dmc.ops import gates, rope
from megatron_dmc.ops.backends import DECODE
from megatron_dmc.ops.paged import decode, delayed, evict
from megatron_dmc.ops.paged.decode import Angles, Gates
from megatron_dmc.ops.paged.layer_cache import LayerCache
from megatron_dmc.ops.paged.prefill import prefill
from megatron_dmc.ops.tensors import accumulator_dtype
from megatron_dmc.ops.training.merge import num_kept


class PagedContext(BaseInferenceContext):
    """The paged cache of the running requests, as Megatron's inference context.

    It is also the scheduler's `PageAccount`. Between `begin_step` and `end_step` the model runs once,
    after `set_decode`, and each attention layer calls `attend` once. Nothing in between waits for the
    device or depends on a length where every request has one token: such a run can be captured into a
    CUDA graph and replayed.

    Attributes:
        max_sequence_length: longest sequence, and number of positions that get RoPE angles.
        flips: where decisions are compared with earlier ones.
        num_queried_tokens, num_hit_tokens: prompt tokens of started requests, and those that cached
            prefixes spared.
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
        cache_dtype: torch.dtype | None = None,
        rule: CompressionRule | None = None,
        backend: str | None = None,
        poison: bool = False,
        prefix_block_size: int | None = None,
        count_flips: bool = False,
        exchange: Exchange | None = None,
        num_ranks: int = 1,
        rank: int = 0,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
        eviction: EvictionRule | None = None,
    ):
        """
        Args:
            num_kv_heads: of this tensor-parallel rank.
            dtype: the model's; `cache_dtype`: the pages', None: the model's.
            prefix_block_size: tokens between cached prefixes; None: none are cached.
            backend: of the cache ops; None: as `ops.backends` chooses.
            poison: fill free pages with NaN, for tests.
            count_flips: compare decisions that are made a second time.
            exchange, num_ranks, rank: tensor parallelism, see `BlockTables`.
            sum_over_ranks: of decision logits, for heads that decide together.
            eviction: keep a budget of entries by a policy; with neither `rule` nor cached prefixes nor
                several ranks.
        """
        super().__init__(InferenceConfig(max_sequence_length=max_model_len))
        self.max_sequence_length = max_model_len
        self.rule = rule
        self.page_size, self.num_pages = page_size, num_pages
        self.num_heads_total = num_layers * num_kv_heads
        self.pool = PagePool(
            num_pages, page_size, head_dim, dtype=cache_dtype or dtype, device=device,
            poison=poison,
        )  # fmt: skip
        self.tables = BlockTables(
            self.pool, num_layers, max_num_seqs, num_kv_heads, max_model_len, device=device,
            exchange=exchange, num_ranks=num_ranks, rank=rank,
        )  # fmt: skip
        self.segments: OpenSegments | None = None
        self.rings: evict.Rings | None = None
        self.delayed: delayed.DelayedDecisions | None = None
        if rule is not None and rule.eviction_delay is not None:
            assert prefix_block_size is None, "an evicted token's slot in a shared page"
            shape = (num_layers, max_num_seqs, num_kv_heads, rule.eviction_delay + 1)
            self.rings = evict.Rings(
                torch.zeros(shape, dtype=torch.int32, device=device),
                torch.zeros(shape, dtype=torch.bool, device=device),
            )
        elif rule is not None:
            self.segments = OpenSegments(
                num_layers, max_num_seqs, num_kv_heads, head_dim,
                num_kept=num_kept(rule.merge_window), dtype=dtype, device=device,
            )  # fmt: skip
            if rule.merge_delay:
                shape = (num_layers, max_num_seqs, num_kv_heads, rule.merge_delay)
                self.delayed = delayed.DelayedDecisions(
                    torch.zeros(shape, dtype=torch.bool, device=device),
                    torch.zeros(shape, dtype=accumulator_dtype(dtype), device=device),
                )
        self.prefixes: PrefixCache | None = None
        if prefix_block_size is not None:
            self.prefixes = PrefixCache(self.tables, self.segments, block_size=prefix_block_size)
        self.eviction = eviction
        self._evicting: EvictingCache | None = None
        if eviction is not None:
            self._evicting = EvictingCache(
                make_policy(eviction.policy), self.tables,
                most_entries=min(eviction.budget(max_model_len), max_model_len), dtype=dtype,
            )  # fmt: skip
        self.num_queried_tokens = self.num_hit_tokens = 0
        merges = rule is not None and not rule.has_ring and rule.may_merge
        self.flips = FlipCounter() if count_flips and merges else None
        self._angles: tuple[Tensor, Tensor, Tensor] | None = None
        self._num_ranks, self._sum_over_ranks = num_ranks, sum_over_ranks or (lambda x: x)
        self._backend, self._window = backend, 0 if rule is None else rule.merge_window
        self._chunks: list[PackedChunk] = []
        self._prefills: list[Round] = []
        self._snapshots: list[Snapshot] = []
        self._like = torch.empty(0, head_dim, dtype=dtype, device=device)
        self._rows_B = self._positions_B = torch.zeros(0, dtype=torch.int64, device=device)
        self._plans_L: list[Tensor | None] | None = None

    @property
    def is_capturable(self) -> bool:
        """Whether decode steps run in kernels, which CUDA graphs can hold."""
        chosen = DECODE.choose(self._like, self.page_size, backend=self._backend)
        return chosen in ("triton", "cuda")

    # What Megatron's GPTModel asks.

    def is_static_batching(self) -> bool:
        return False

    def is_decode_only(self) -> bool:
        """True where every request has one token in this step."""
        return not self._prefills

    def using_cuda_graph_this_step(self) -> bool:
        """Whether Megatron shall use its own graphs; the engine has others (`DecodeGraphs`)."""
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
        return self.tables.counts.most_entries(request.row)

    def entry_limit(self, request: Request) -> int | None:
        return None if self.eviction is None else self.eviction.budget(request.num_prompt_tokens)

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
        if self._evicting is not None and (limit := self.entry_limit(request)) is not None:
            self._evicting.budget_R[request.row] = limit
            self.tables.counts.limit_R[request.row] = limit
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
        # the last token is always computed: its logits are wanted
        num_known = request.num_tokens - 1
        if request.params.prompt_logprobs is not None:
            num_known = min(num_known, request.params.prompt_logprobs_start - 1)
        self._extend_keys(request, num_known)
        return self.prefixes.find(request.prefix_keys[: num_known // self.prefixes.block_size])

    def _extend_keys(self, request: Request, num_tokens: int) -> None:
        """Name the full blocks of a request's first tokens."""
        assert self.prefixes is not None
        size = self.prefixes.block_size
        first = len(request.prefix_keys) * size
        if num_tokens - first >= size:
            tokens = request.tokens_between(first, num_tokens)
            extend_keys(request.prefix_keys, tokens, size, salt=request.cache_salt)

    # A step.

    def begin_step(self, chunks: Sequence[PackedChunk]) -> None:
        """See to it that the pages that the step may need are free, and prepare its snapshots.

        Args:
            chunks: in the order of the packed tokens; those of one token come first.

        Raises:
            OutOfPages: if the scheduler promised too much; nothing has changed then.
        """
        self.tables.begin_step([c.row for c in chunks], [c.num_tokens for c in chunks])
        self._chunks = list(chunks)
        self._snapshots, self._prefills = [], []
        rounds: list[list[Piece]] = []
        first = 0
        for chunk in chunks:
            # One token, with or without a past, is decoded; the rest is prefilled, all requests
            # together, but for the cuts where snapshots are taken.
            pieces = self._pieces(chunk, first)
            self._snapshots += [p.snapshot for p in pieces if p.snapshot is not None]
            if chunk.num_tokens > 1:
                rounds.extend([] for _ in range(len(pieces) - len(rounds)))
                for of_round, piece in zip(rounds, pieces, strict=False):
                    of_round.append(piece)
                first += chunk.num_tokens
            else:
                assert not rounds, "a single token behind a longer chunk"
        self._prefills = [
            Round.of(of_round, self.tables.num_entries_LRG.device) for of_round in rounds
        ]

    def set_decode(self, rows_B: Tensor, positions_B: Tensor) -> None:
        """The requests with one token in this run of the model, the first ones of the packed tokens.

        Args:
            rows_B, positions_B: int64, on the device; row -1 is padding.
        """
        self._rows_B, self._positions_B, self._plans_L = rows_B, positions_B, None

    def _pieces(self, chunk: PackedChunk, first: int) -> list[Piece]:
        """Cut a chunk behind every token where a snapshot is to be taken."""
        cuts: list[tuple[int, Snapshot | None]] = []
        end = chunk.end
        if self.prefixes is not None:
            size, request = self.prefixes.block_size, chunk.request
            boundaries = range((chunk.start // size + 1) * size, end + 1, size)
            self._extend_keys(request, end)
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
                Piece(chunk.row, first + start - chunk.start, start, at - start, snapshot)
            )
            start = at
        return pieces

    def end_step(self) -> None:
        """Keep the snapshots, and start to copy the counters, which `settle` reads."""
        late = []
        if self.prefixes is not None:
            captured = {id(piece.snapshot) for part in self._prefills for piece in part.pieces}
            for snapshot in self._snapshots:
                if id(snapshot) not in captured:
                    self.prefixes.capture(snapshot, slice(None))
                if (counts := self.prefixes.finish(snapshot)) is not None:
                    late.append(counts)
        compare = None if self.flips is None else self.flips.end_step(self._chunks)
        self.tables.end_step([c.row for c in self._chunks], late, compare)
        self._chunks = []

    def settle(self) -> None:
        """Wait for the last step's counters and take them in; on all ranks at one point."""
        self.tables.settle()

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
        if self._evicting is not None:
            return self._attend_within_budget(
                layer_index, q_TND, k_TGD, v_TGD, freqs_SF, softmax_scale
            )
        num_singles = self._rows_B.shape[0]
        num_prefilled = sum(sum(part.chunks.num_tokens) for part in self._prefills)
        assert q_TND.shape[0] == num_singles + num_prefilled, "not this step's tokens"
        if self.rings is not None:
            return self._attend_evicting(layer_index, q_TND, k_TGD, v_TGD, freqs_SF, softmax_scale)
        if self.delayed is not None:
            return self._attend_delayed(layer_index, q_TND, k_TGD, v_TGD, freqs_SF, softmax_scale)
        if not self._prefills:
            return self._decode(layer_index, q_TND, k_TGD, v_TGD, freqs_SF, softmax_scale)
        out = torch.empty_like(q_TND)
        if num_singles:
            single = slice(0, num_singles)
            out[single] = self._decode(
                layer_index, q_TND[single], k_TGD[single], v_TGD[single], freqs_SF, softmax_scale
            )
        q, k, v = (x[num_singles:] for x in (q_TND, k_TGD, v_TGD))
        gates_TG = self._gates(layer_index, num_singles, q, k)
        if self.flips is not None and gates_TG is not None:
            self.flips.prefilled(gates_TG[0])
        cache = self._layer(layer_index)
        for part in self._prefills:
            at = part.tokens
            out[num_singles:][at] = prefill(
                cache, part.chunks, q[at], k[at], v[at],
                None if gates_TG is None else (gates_TG[0][at], gates_TG[1][at]),
                None if freqs_SF is None else freqs_SF[part.positions],
                softmax_scale=softmax_scale, merge_window=self._window, backend=self._backend,
            )  # fmt: skip
            for piece in part.pieces:
                if piece.snapshot is not None and self.prefixes is not None:
                    self.prefixes.capture(piece.snapshot, slice(layer_index, layer_index + 1))
        return out

    def _attend_within_budget(
        self,
        layer_index: int,
        q_TND: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        freqs_SF: Tensor | None,
        softmax_scale: float,
    ) -> Tensor:
        """Prompts and single tokens alike, under the eviction policy."""
        assert self._evicting is not None
        chunks = [EvictingChunk(c.row, c.start, c.num_tokens) for c in self._chunks]
        if freqs_SF is not None:
            freqs_TF = torch.cat([freqs_SF[c.start : c.end] for c in self._chunks])
            q_TND, k_TGD = (rope.rotate_by(x, freqs_TF) for x in (q_TND, k_TGD))
        return self._evicting.attend(
            layer_index, q_TND, k_TGD, v_TGD, chunks, softmax_scale=softmax_scale
        )

    def _decode(
        self,
        layer_index: int,
        q_BND: Tensor,
        k_BGD: Tensor,
        v_BGD: Tensor,
        freqs_SF: Tensor | None,
        softmax_scale: float,
    ) -> Tensor:
        """One token of each request: on a GPU three launches, and one more a step for the plans."""
        rule, rows_B = self.rule, self._rows_B
        if self._plans_L is None:
            self._plans_L = decode.plan_decode_attention(
                self.tables.num_entries_LRG, rows_B, like=k_BGD, page_size=self.page_size,
                group=q_BND.shape[1] // k_BGD.shape[1], ahead=1, backend=self._backend,
            )  # fmt: skip
        cache = self._layer(layer_index)
        if rule is not None and rule.shared_decisions:
            # the heads' logits have to meet first
            freqs_BF = None if freqs_SF is None else freqs_SF[self._positions_B]
            gates_BG = self._gates(layer_index, 0, q_BND, k_BGD)
            decode.decode_append(
                cache, rows_B, k_BGD, v_BGD, gates_BG, freqs_BF, merge_window=self._window,
                backend=self._backend,
            )  # fmt: skip
            q_BND = rope.rotate_by(q_BND, freqs_BF, compress=True)
        else:
            q_BND = decode.gate_and_append(
                cache, rows_B, q_BND, k_BGD, v_BGD, self._cosine_and_sine(freqs_SF, q_BND.dtype),
                self._positions_B, alpha_offset=None if rule is None else rule.alpha_offset,
                may_merge=rule is not None and rule.may_merge, merge_window=self._window,
                gates_BG=self._given_gates(layer_index, 0, q_BND.shape[0]), backend=self._backend,
            )  # fmt: skip
        return decode.paged_decode_attention(
            cache, rows_B, q_BND, softmax_scale=softmax_scale, plan_Y=self._plans_L[layer_index],
            backend=self._backend,
        )  # fmt: skip

    def _attend_evicting(
        self,
        layer_index: int,
        q_TND: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        freqs_SF: Tensor | None,
        softmax_scale: float,
    ) -> Tensor:
        """`attend` where tokens leave the cache instead of merging. PyTorch, but for decode attention."""
        assert self.rings is not None
        cache, rows_B = self._layer(layer_index), self._rows_B
        rings, num_singles = self.rings[layer_index], rows_B.shape[0]
        gates_TG = self._gates(layer_index, 0, q_TND, k_TGD)
        assert gates_TG is not None
        is_evict_TG, out = gates_TG[0], torch.empty_like(q_TND)
        if num_singles:
            single = slice(0, num_singles)
            freqs_BF = None if freqs_SF is None else freqs_SF[self._positions_B]
            evict.decode_evict(
                cache, rows_B, k_TGD[single], v_TGD[single], is_evict_TG[single], freqs_BF,
                self._positions_B, rings,
            )  # fmt: skip
            out[single] = decode.paged_decode_attention(
                cache, rows_B, rope.rotate_by(q_TND[single], freqs_BF, compress=True),
                softmax_scale=softmax_scale, backend=self._backend,
            )  # fmt: skip
        for piece in (piece for part in self._prefills for piece in part.pieces):
            first = num_singles + piece.first
            span = slice(first, first + piece.num_tokens)
            freqs_TF = None
            if freqs_SF is not None:
                freqs_TF = freqs_SF[piece.start : piece.start + piece.num_tokens]
            out[span] = evict.prefill_evict(
                cache, piece.row, q_TND[span], k_TGD[span], v_TGD[span], is_evict_TG[span],
                freqs_TF, piece.start, rings, softmax_scale=softmax_scale,
            )  # fmt: skip
        return out

    def _attend_delayed(
        self,
        layer_index: int,
        q_TND: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        freqs_SF: Tensor | None,
        softmax_scale: float,
    ) -> Tensor:
        """`attend` where tokens merge after a delay. PyTorch, except for decode attention."""
        assert self.delayed is not None
        cache, rows_B = self._layer(layer_index), self._rows_B
        decisions = self.delayed[layer_index]
        gates_TG = self._gates(layer_index, 0, q_TND, k_TGD)
        assert gates_TG is not None
        num_singles, out = rows_B.shape[0], torch.empty_like(q_TND)
        if num_singles:
            single = slice(0, num_singles)
            freqs_BF = None if freqs_SF is None else freqs_SF[self._positions_B]
            delayed.decode_delayed(
                cache, rows_B, k_TGD[single], v_TGD[single],
                (gates_TG[0][single], gates_TG[1][single]), freqs_SF, self._positions_B, decisions,
                merge_window=self._window,
            )  # fmt: skip
            out[single] = decode.paged_decode_attention(
                cache, rows_B, rope.rotate_by(q_TND[single], freqs_BF, compress=True),
                softmax_scale=softmax_scale, backend=self._backend,
            )  # fmt: skip
        for piece in (piece for part in self._prefills for piece in part.pieces):
            first = num_singles + piece.first
            span = slice(first, first + piece.num_tokens)
            out[span] = delayed.prefill_delayed(
                cache, piece.row, q_TND[span], k_TGD[span], v_TGD[span],
                (gates_TG[0][span], gates_TG[1][span]), freqs_SF, piece.start, decisions,
                softmax_scale=softmax_scale, merge_window=self._window,
            )  # fmt: skip
        return out

    def _layer(self, layer_index: int) -> LayerCache:
        return self.tables.layer(layer_index, self.segments)

    def _cosine_and_sine(self, freqs_SF: Tensor | None, dtype: torch.dtype) -> Angles:
        """RoPE's tables, made once for angles that stay where they are, as Megatron's do."""
        if freqs_SF is None:
            return None, None
        if self._angles is None or self._angles[0].data_ptr() != freqs_SF.data_ptr():
            cos, sin = rope.cosine_and_sine(freqs_SF, dtype)
            assert cos is not None and sin is not None
            # held on to, so that no other tensor comes to lie there
            self._angles = (freqs_SF, cos, sin)
        return self._angles[1], self._angles[2]

    def _given_gates(self, layer_index: int, first: int, count: int) -> Gates | None:
        """Gates (count, G) that stand in for those of a layer's channels, of packed tokens from `first` on;
        None: none do."""
        return None

    def _gates(self, layer_index: int, first: int, q_TND: Tensor, k_TGD: Tensor) -> Gates | None:
        """Gates of packed tokens from `first` on; a sequence's first token never merges (the ops see to it)."""
        if self.rule is None:
            return None
        given_TG = self._given_gates(layer_index, first, len(q_TND))
        if given_TG is not None:
            return given_TG
        share = None
        if self.rule.shared_decisions:
            num_heads = k_TGD.shape[1] * self._num_ranks
            share = partial(
                gates.share_decisions, num_kv_heads_total=num_heads, reduce=self._sum_over_ranks
            )
        return gates.decide(
            q_TND, k_TGD, alpha_offset=self.rule.alpha_offset, share=share,
            may_merge=self.rule.may_merge,
        )  # fmt: skip
