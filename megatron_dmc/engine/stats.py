"""Statistics of an engine.

Dimension letters: L layers, G key/value heads of the model (of all ranks).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from megatron_dmc.engine.chunk import Chunk
from megatron_dmc.engine.request import Request

if TYPE_CHECKING:
    from megatron_dmc.engine.context import PagedContext
    from megatron_dmc.engine.scheduler import Scheduler


@dataclass
class EngineStats:
    """Counts since the engine was made. Tokens and entries are those of finished requests and of the
    running ones; a request that was preempted counts from its new start."""

    num_waiting: int
    num_running: int
    num_finished: int
    num_preemptions: int
    num_pages: int
    num_pages_in_use: int
    """Pages that running requests hold, shared ones once."""
    page_bytes: int
    """Of one page, key and value together."""
    peak_pages_in_use: int
    num_generated_tokens: int
    num_prompt_tokens: int
    busy_seconds: float
    """Time spent in steps."""
    seq_tokens: int
    """Tokens in the cache: each counts once, not once per head."""
    entries_LG: list[list[int]] = field(repr=False)
    """Entries of each layer's KV heads, over the same requests; raw tokens of a delay are in it."""
    cr_of_running: dict[str, float] = field(default_factory=dict, repr=False)
    """Measured CR of each running request."""
    entry_bytes: int = 0
    """Of one entry, key and value together, scales of 8-bit pages included."""
    plain_entry_bytes: int = 0
    """The same in the model's dtype."""
    running_entries_LG: list[list[int]] = field(default_factory=list, repr=False)
    """Entries of each layer's KV heads, of the running requests only."""
    num_prefill_tokens: int = 0
    """Tokens computed in chunks of several."""
    num_decode_tokens: int = 0
    """Tokens computed one at a time."""
    prefill_seconds: float = 0.0
    """Time of steps with a prefill chunk, tokens decoded in the same step included."""
    decode_seconds: float = 0.0
    """Time of the other steps."""
    num_decode_only_tokens: int = 0
    """Tokens computed in these."""
    num_cached_pages: int = 0
    """Pages that only cached prefixes hold; they are reclaimed when pages run short."""
    num_cached_prefixes: int = 0
    num_reclaimed_prefixes: int = 0
    num_prefix_queried_tokens: int = 0
    """Prompt tokens of started requests, where prefix caching is on."""
    num_prefix_hit_tokens: int = 0
    """Of these, tokens that were not computed because of a cached prefix."""
    num_repeated_decisions: int = 0
    """Decisions made again after a preemption, where flipped ones are counted."""
    num_flipped_decisions: int = 0
    """Of these, decisions that differ from the first ones."""
    num_raw_tokens: int = 0
    """Of `seq_tokens`, those whose decision is not yet in effect (merge delay, DMS)."""

    @property
    def num_entries(self) -> int:
        return sum(map(sum, self.entries_LG))

    @property
    def measured_cr(self) -> float | None:
        """Total tokens / total entries."""
        num_heads = sum(map(len, self.entries_LG))
        return self.seq_tokens * num_heads / self.num_entries if self.num_entries else None

    @property
    def decided_cr(self) -> float | None:
        """The same without raw tokens: by the decisions that are in effect. None if there are none."""
        return decided_cr(self)

    @property
    def measured_cr_LG(self) -> list[list[float | None]]:
        """Tokens / entries of each layer's KV heads."""
        return [[self.seq_tokens / n if n else None for n in heads] for heads in self.entries_LG]

    @property
    def tokens_per_second(self) -> float | None:
        """Generated tokens over the time spent in steps."""
        return self.num_generated_tokens / self.busy_seconds if self.busy_seconds else None

    @property
    def prefill_tokens_per_second(self) -> float | None:
        """Prefilled tokens over the time of the steps that prefill."""
        return self.num_prefill_tokens / self.prefill_seconds if self.prefill_seconds else None

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens over time, of the steps that only decode."""
        return self.num_decode_only_tokens / self.decode_seconds if self.decode_seconds else None

    @property
    def fragmentation(self) -> float | None:
        """Bytes of the pages in use / bytes of the running requests' entries, at least 1 where nothing
        is shared (a shared page counts once, its entries for every request)."""
        live = sum(map(sum, self.running_entries_LG)) * self.entry_bytes
        return self.num_pages_in_use * self.page_bytes / live if live else None

    @property
    def prefix_hit_rate(self) -> float | None:
        """Prompt tokens found in cached prefixes / prompt tokens."""
        queried = self.num_prefix_queried_tokens
        return self.num_prefix_hit_tokens / queried if queried else None


def decided_cr(after: EngineStats, before: EngineStats | None = None) -> float | None:
    """`EngineStats.decided_cr`, of what an engine computed between two moments."""
    num_heads = sum(map(len, after.entries_LG))
    tokens = (after.seq_tokens - after.num_raw_tokens) * num_heads
    entries = after.num_entries - after.num_raw_tokens * num_heads
    if before is not None:
        tokens -= (before.seq_tokens - before.num_raw_tokens) * num_heads
        entries -= before.num_entries - before.num_raw_tokens * num_heads
    return tokens / entries if entries else None


class StatsCollector:
    """Running totals of an engine, and the cache figures of its requests.

    Args:
        plain_entry_bytes: of one entry in the model's dtype, key and value together.
    """

    def __init__(
        self,
        context: "PagedContext",
        scheduler: "Scheduler",
        *,
        num_layers: int,
        num_kv_heads: int,
        plain_entry_bytes: int,
    ):
        self._context, self._scheduler = context, scheduler
        self._plain_entry_bytes = plain_entry_bytes
        self._num_finished = self._num_generated = self._num_prompt = 0
        self._num_prefill = self._num_decode = self._num_decode_only = 0
        self._prefill_seconds = self._decode_seconds = 0.0
        self._peak_pages = 0
        self._finished_tokens = self._finished_raw = 0
        self._finished_entries_LG = np.zeros((num_layers, num_kv_heads), dtype=np.int64)
        self._updated: tuple[int, Sequence[Request]] = -1, []

    def step_scheduled(self, chunks: Sequence[Chunk]) -> None:
        """Count the prompts that start in a step."""
        for chunk in chunks:
            metrics = chunk.request.metrics
            if metrics.first_scheduled_time is None:
                metrics.first_scheduled_time = time.monotonic()
                self._num_prompt += chunk.request.num_prompt_tokens

    def step_computed(self) -> None:
        """Note the pages in use, once the step's entry counts are known."""
        self._peak_pages = max(self._peak_pages, self._context.tables.num_pages_after_step)

    def step_finished(self, num_single: int, num_prefilled: int, seconds: float) -> None:
        """Count a step's tokens, those of requests that have one and those of the others, and its time."""
        self._num_decode += num_single
        self._num_prefill += num_prefilled
        if not num_prefilled:
            self._num_decode_only += num_single
            self._decode_seconds += seconds
        else:
            self._prefill_seconds += seconds

    def tokens_generated(self, count: int) -> None:
        """Count tokens of completions."""
        self._num_generated += count

    def request_finished(self, request: Request) -> None:
        """Count a request that is about to leave the scheduler."""
        if request.row is not None:
            self._context.tables.count_row(request.row)
        self.update_metrics([request])
        if request.row is not None:
            self._finished_tokens += self._context.num_cached_tokens(request)
            self._finished_raw += self._num_raw(request)
            self._finished_entries_LG += self._entries_LG(request)
        self._num_finished += 1

    def update_metrics(self, requests: Sequence[Request]) -> None:
        """Update the cache figures in running requests' metrics; others keep their last ones. They are those of
        the last count of the entries, so they stay until the next one."""
        num_changes = self._context.tables.counts.num_changes
        if (num_changes, requests) == self._updated:
            return
        self._updated = num_changes, requests
        running = [request for request in requests if request.row is not None]
        rows = [row for request in running if (row := request.row) is not None]
        counts = self._context.tables.counts.figures(rows)
        num_heads = self._finished_entries_LG.size
        for request, in_flight, entries, pages in zip(running, *counts, strict=True):
            metrics = request.metrics
            metrics.num_cached_tokens = (request.num_computed_tokens - in_flight) * num_heads
            metrics.num_entries, metrics.num_pages = entries, pages

    def _num_raw(self, request: Request) -> int:
        return min(self._context.num_cached_tokens(request), self._context.store.num_ring_slots)

    def _entries_LG(self, request: Request) -> np.ndarray:
        assert request.row is not None
        return self._context.tables.entries(request.row)

    def collect(self) -> EngineStats:
        """The figures so far. Waits for the device."""
        context, scheduler = self._context, self._scheduler
        context.update_counts()
        running_LG = np.zeros_like(self._finished_entries_LG)
        tokens, raw = self._finished_tokens, self._finished_raw
        crs = {}
        for request in scheduler.running:
            self.update_metrics([request])
            tokens += context.num_cached_tokens(request)
            raw += self._num_raw(request)
            running_LG += self._entries_LG(request)
            if request.metrics.measured_cr is not None:
                crs[request.request_id] = request.metrics.measured_cr
        pool, prefixes, flips = context.pool, context.prefixes, context.flips
        return EngineStats(
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            num_finished=self._num_finished,
            num_preemptions=scheduler.num_preemptions,
            num_pages=pool.num_pages,
            num_pages_in_use=context.tables.num_pages_in_use,
            page_bytes=pool.page_bytes,
            peak_pages_in_use=self._peak_pages,
            num_generated_tokens=self._num_generated,
            num_prompt_tokens=self._num_prompt,
            busy_seconds=self._prefill_seconds + self._decode_seconds,
            seq_tokens=tokens,
            num_raw_tokens=raw,
            entries_LG=(self._finished_entries_LG + running_LG).tolist(),
            cr_of_running=crs,
            entry_bytes=pool.page_bytes // pool.page_size,
            plain_entry_bytes=self._plain_entry_bytes,
            running_entries_LG=running_LG.tolist(),
            num_prefill_tokens=self._num_prefill,
            num_decode_tokens=self._num_decode,
            prefill_seconds=self._prefill_seconds,
            decode_seconds=self._decode_seconds,
            num_decode_only_tokens=self._num_decode_only,
            num_cached_pages=context.tables.num_cached_pages,
            num_cached_prefixes=0 if prefixes is None else len(prefixes),
            num_reclaimed_prefixes=0 if prefixes is None else prefixes.num_reclaimed,
            num_prefix_queried_tokens=context.num_queried_tokens,
            num_prefix_hit_tokens=context.num_hit_tokens,
            num_repeated_decisions=0 if flips is None else flips.num_repeated,
            num_flipped_decisions=0 if flips is None else flips.num_flipped,
        )
