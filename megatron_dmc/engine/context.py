"""The paged inference context: the only engine object that attention touches."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from megatron.core.inference.config import InferenceConfig
from megatron.core.inference.contexts.base_context import BaseInferenceContext
from torch import Tensor

from megatron_dmc.cache import BlockTables, PagePool, PrefixCache, Snapshot, extend_keys
from megatron_dmc.cache.strategies import (
    BudgetRule,
    CompressionRule,
    Step,
    Storage,
    store_class,
)
from megatron_dmc.cache.tables import Exchange
from megatron_dmc.engine.chunk import Chunk
from megatron_dmc.engine.decode_batch import DecodeBatch
from megatron_dmc.engine.flipped_decisions import FlipCounter
from megatron_dmc.engine.request import Request
from megatron_dmc.engine.scheduler import NO_PREFIX, CachedPrefix
from megatron_dmc.ops.backends import DECODE
from megatron_dmc.ops.cpu.recording import Recorder
from megatron_dmc.ops.paged.chunks import Chunks


class PagedContext(BaseInferenceContext):
    """The paged cache of the running requests, as Megatron's inference context.

    It is also the scheduler's `PageAccount`. Between `begin_step` and `end_step` the model runs once,
    after `set_decode`, and each attention layer calls `attend` once. Nothing in between waits for the
    device or depends on a length where every request has one token: such a run can be captured into a
    CUDA graph and replayed.

    Attributes:
        max_sequence_length: longest sequence, and number of positions that get RoPE angles.
        store: the cache strategy: what becomes of the tokens.
        flips: compares decisions with earlier ones; None: they are not counted.
        recorder: of decode steps on a CPU; None: they are not recorded.
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
        budget_rule: BudgetRule | None = None,
    ):
        """
        Args:
            num_kv_heads: of this tensor-parallel rank.
            dtype: the model's; `cache_dtype`: the pages', None: the model's.
            prefix_block_size: tokens between cached prefixes; None: none are cached.
            backend: of the cache ops; None: as `ops.backends` chooses.
            poison: fill free pages with NaN, for tests.
            count_flips: compare decisions that are made a second time, where the strategy merges at once.
            exchange, num_ranks, rank: tensor parallelism, see `BlockTables`.
            sum_over_ranks: of decision logits, for heads that decide together.
            rule, budget_rule: select the strategy; at most one is given.
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
        storage = Storage(
            self.tables, dtype, max_model_len, backend, num_ranks=num_ranks,
            sum_over_ranks=sum_over_ranks or (lambda x: x),
        )  # fmt: skip
        self.store = store_class(rule, budget_rule)(storage, budget_rule or rule)
        self.prefixes: PrefixCache | None = None
        if prefix_block_size is not None:
            assert self.store.shares_pages, "a slot of a shared page would be written again"
            self.prefixes = PrefixCache(
                self.tables, self.store.row_state, block_size=prefix_block_size,
                num_ring_pages=self.store.num_ring_slots // page_size,
            )  # fmt: skip
            self.store.prefixes = self.prefixes
        self.flips: FlipCounter | None = None
        if count_flips and self.store.grows_by_decision:
            self.flips = FlipCounter()
            self.store.observe = self.flips.prefilled
        self.recorder: Recorder | None = Recorder()
        self.num_queried_tokens = self.num_hit_tokens = 0
        self._like = torch.empty(0, head_dim, dtype=dtype, device=device)
        self._backend = backend
        self._given: list[Chunk] | DecodeBatch = []
        self._snapshots: list[Snapshot] = []
        self._step = self._next = Step(*torch.zeros(2, 0, dtype=torch.int64, device=device))

    @property
    def is_capturable(self) -> bool:
        """Whether decode steps run in GPU kernels and wait for nothing, so that CUDA graphs can hold them."""
        chosen = DECODE.choose(self._like, self.page_size, backend=self._backend)
        return self.store.is_capturable and chosen in ("triton", "cuda")

    # The interface of Megatron's GPTModel.

    def is_static_batching(self) -> bool:
        return False

    def is_decode_only(self) -> bool:
        """True where every request has one token in this step."""
        return not self._step.rounds

    def using_cuda_graph_this_step(self) -> bool:
        """Whether Megatron should use its own graphs; the engine has others (`DecodeGraphs`)."""
        return False

    # The interface of the scheduler (`PageAccount`).

    @property
    def num_free_pages(self) -> int:
        return self.tables.num_free_pages

    def pages_needed(self, request: Request, num_new_tokens: int) -> int:
        assert request.row is not None
        return self.tables.pages_needed(request.row, num_new_tokens)

    def pages_needed_each(self, requests: Sequence[Request]) -> list[int]:
        rows = [request.row for request in requests if request.row is not None]
        return self.tables.pages_needed_each(rows)

    def may_decode(self, batch: DecodeBatch) -> bool:
        if self.flips is not None:
            return False
        if (
            self.prefixes is not None
            and not ((batch.starts_B + 1) % self.prefixes.block_size).all()
        ):
            return False
        return self.tables.may_decode(batch.rows_B, batch.ones_B)

    def num_cached_tokens(self, request: Request) -> int:
        assert request.row is not None
        return request.num_computed_tokens - int(self.tables.counts.in_flight_R[request.row])

    def num_entries(self, request: Request) -> int:
        assert request.row is not None
        return self.tables.counts.most_entries(request.row)

    def worst_case_pages(self, request: Request, num_tokens: int) -> int:
        most = self.store.most_entries(num_tokens, request.num_prompt_tokens)
        return -(-most // self.page_size) * self.num_heads_total

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
        num_prompt = request.num_prompt_tokens
        longest = self.max_sequence_length
        most_entries = self.store.most_entries(longest, num_prompt)
        request.row = self.tables.open_row(most_entries if most_entries < longest else None)
        self.store.start(request.row, num_prompt)
        if snapshot is not None and self.prefixes is not None:
            self.prefixes.restore(snapshot, request.row)
            request.num_computed_tokens = snapshot.num_tokens
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

    def begin_step(self, chunks: Sequence[Chunk]) -> None:
        """Reserve the step's worst-case number of pages, and prepare its snapshots.

        Args:
            chunks: in the order of the packed tokens; those of one token come first.

        Raises:
            OutOfPages: if the scheduler promised too much; nothing has changed then.
        """
        self._rows = np.array([c.row for c in chunks], dtype=np.int64)
        self.tables.begin_step(self._rows, [c.num_tokens for c in chunks])
        self._given, self._snapshots = list(chunks), []
        # Prompts of all requests are prefilled together, in rounds: one, and one more for each place within a
        # chunk where a snapshot is taken.
        rounds: list[list[tuple[Chunk, int]]] = []
        snapshots: list[list[Snapshot]] = []
        first = 0
        for chunk in chunks:
            if chunk.num_tokens == 1 and self.prefixes is None:
                continue
            due = self._begin_snapshots(chunk)
            self._snapshots += due.values()
            if chunk.num_tokens == 1:
                assert not rounds, "a single token after a longer chunk"
                continue
            for i, part in enumerate(chunk.cut(due)):
                if i == len(rounds):
                    rounds.append([])
                    snapshots.append([])
                rounds[i].append((part, first))
                snapshots[i] += [due[part.end]] if part.end in due else []
                first += part.num_tokens
        nothing = self._next.rows_B[:0]
        self._next = Step(
            nothing, nothing, [self._packed(*zip(*parts, strict=True)) for parts in rounds],
            snapshots, lambda: self._packed(self._chunks, None),
        )  # fmt: skip

    def begin_decode(self, batch: DecodeBatch) -> None:
        """`begin_step` of a step that `may_decode`."""
        self._rows, self._given, self._snapshots = batch.rows_B, batch, []
        self.tables.begin_step(batch.rows_B, batch.ones_B)
        nothing = self._next.rows_B[:0]
        self._next = Step(nothing, nothing, make_chunks=lambda: self._packed(self._chunks, None))

    @property
    def _chunks(self) -> list[Chunk]:
        """The step's."""
        return self._given.chunks() if isinstance(self._given, DecodeBatch) else self._given

    def _packed(self, chunks: Sequence[Chunk], firsts: Sequence[int] | None) -> Chunks:
        return Chunks.of(
            [c.row for c in chunks], [c.num_tokens for c in chunks], self._like.device,
            starts=[c.start for c in chunks], firsts=firsts,
        )  # fmt: skip

    def _begin_snapshots(self, chunk: Chunk) -> dict[int, Snapshot]:
        """The snapshots to take of a chunk's request, by number of tokens."""
        due: dict[int, Snapshot] = {}
        if self.prefixes is None:
            return due
        size, request = self.prefixes.block_size, chunk.request
        self._extend_keys(request, chunk.end)
        for at in range((chunk.start // size + 1) * size, chunk.end + 1, size):
            snapshot = self.prefixes.begin(request.prefix_keys[at // size - 1], at, chunk.row)
            if snapshot is not None:
                due[at] = snapshot
        return due

    def takes_snapshot(self, chunk: Chunk) -> bool:
        """Whether a cached prefix may end with the chunk's last token."""
        return self.prefixes is not None and chunk.end % self.prefixes.block_size == 0

    def set_decode(self, rows_B: Tensor, positions_B: Tensor) -> None:
        """The requests with one token in this run of the model, the first ones of the packed tokens.

        Args:
            rows_B, positions_B: int64, on the device; row -1 is padding.
        """
        step = self._next
        self._step = Step(rows_B, positions_B, step.rounds, step.snapshots, step.make_chunks)

    def run_layers(
        self, compute: Callable[[Tensor], Tensor], x_TH: Tensor, freqs_SF: Tensor | None
    ) -> Tensor:
        """As `PagedAttentionContext.run_layers`: decode steps on a CPU are replayed, unless `recorder` is None."""
        given = self._step
        if self.recorder is None or given.rounds or not self.recorder.takes(x_TH):
            return compute(x_TH)

        def step(x_TH: Tensor, rows_B: Tensor, positions_B: Tensor) -> Tensor:
            self._step = replace(given, rows_B=rows_B, positions_B=positions_B)
            return compute(x_TH)

        key = len(x_TH), None if freqs_SF is None else freqs_SF.data_ptr()
        return self.recorder.run(key, (x_TH, given.rows_B, given.positions_B), step)

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
        step = self._step
        num_tokens = step.rows_B.shape[0] + sum(chunks.total for chunks in step.rounds)
        assert q_TND.shape[0] == num_tokens, "not this step's tokens"
        return self.store.attend(
            step, layer_index, q_TND, k_TGD, v_TGD, freqs_SF, softmax_scale=softmax_scale
        )

    def end_step(self) -> None:
        """Keep the snapshots, and start to copy the counters, which `land` waits for."""
        late = []
        if self.prefixes is not None:
            captured = {id(s) for of_round in self._next.snapshots for s in of_round}
            for snapshot in self._snapshots:
                if id(snapshot) not in captured:
                    self.prefixes.capture(snapshot, slice(None))
                if (counts := self.prefixes.finish(snapshot)) is not None:
                    late.append(counts)
        compare = None if self.flips is None else self.flips.end_step(self._chunks)
        self.tables.end_step(self._rows, late, compare)
        self._given = []

    def land(self, keep: int = 0) -> None:
        """Wait for the counters of the steps in flight, except for the `keep` newest; they are applied when
        they are needed."""
        self.tables.land(keep)

    def count_landed(self) -> None:
        """Apply the counters of the steps that have landed."""
        self.tables.count_landed()

    def update_counts(self, keep: int = 0) -> None:
        """Wait for the counters of the steps in flight, except for the `keep` newest, and apply them; on all
        ranks at one point."""
        self.tables.update_counts(keep)
