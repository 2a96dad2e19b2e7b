"""What the engine counts and reports.

Dimension letters: L layers, G key/value heads of the model (of all ranks).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_dmc.engine.scheduler import ScheduledChunk


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
    """Entries of each layer's KV heads, over the same requests."""
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
    """Time of steps with a prefill chunk, tokens decoded beside it included."""
    decode_seconds: float = 0.0
    """Time of the other steps."""
    num_decode_only_tokens: int = 0
    """Tokens computed in these."""
    num_cached_pages: int = 0
    """Pages that only cached prefixes hold; they are given up when pages run short."""
    num_cached_prefixes: int = 0
    num_evicted_prefixes: int = 0
    num_prefix_queried_tokens: int = 0
    """Prompt tokens of started requests, where prefix caching is on."""
    num_prefix_hit_tokens: int = 0
    """Of these, tokens that a cached prefix spared."""
    num_repeated_decisions: int = 0
    """Decisions made again after a preemption, where flipped ones are counted."""
    num_flipped_decisions: int = 0
    """Of these, how many came out differently."""

    @property
    def num_entries(self) -> int:
        return sum(map(sum, self.entries_LG))

    @property
    def measured_cr(self) -> float | None:
        """Total tokens / total entries."""
        num_heads = sum(map(len, self.entries_LG))
        return self.seq_tokens * num_heads / self.num_entries if self.num_entries else None

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
        """Prompt tokens that cached prefixes spared / prompt tokens."""
        queried = self.num_prefix_queried_tokens
        return self.num_prefix_hit_tokens / queried if queried else None


class Counters:
    """The running totals behind `EngineStats`."""

    def __init__(self, num_layers: int, num_kv_heads: int):
        self.num_finished = self.num_generated = self.num_prompt = 0
        self.num_prefill = self.num_decode = self.num_decode_only = 0
        self.prefill_seconds = self.decode_seconds = 0.0
        self.peak_pages = 0
        self.finished_tokens = 0
        self.finished_entries_LG = np.zeros((num_layers, num_kv_heads), dtype=np.int64)

    def scheduled(self, chunks: Sequence[ScheduledChunk]) -> None:
        """A step is about to compute these."""
        for chunk in chunks:
            metrics = chunk.request.metrics
            if metrics.first_scheduled_time is None:
                metrics.first_scheduled_time = time.monotonic()
                self.num_prompt += chunk.request.num_prompt_tokens

    def computed(self, sizes: Sequence[int], seconds: float) -> None:
        """A step with chunks of these sizes took so long."""
        singles = sum(size == 1 for size in sizes)
        self.num_decode += singles
        self.num_prefill += sum(sizes) - singles
        if singles == len(sizes):
            self.num_decode_only += singles
            self.decode_seconds += seconds
        else:
            self.prefill_seconds += seconds
