"""Continuous batching under a budget of tokens and pages. Knows pages only.

Requests have an order, fixed when they arrive: their number, and with priorities
`number + priority * priority_reach`. What holds:

- A request is admitted only if all that stand before it in the waiting queue were.
- A running request is preempted only for one that is before it in the order, and the first of the
  running ones never is.
- Only finitely many requests can come to stand before a given one. With the refusal of what can never
  fit, every request finishes, whatever its priority.
- The pages that a step may need at worst are free when it is scheduled: it can finish. Where too few are
  because of what the steps in flight may take, the scheduler waits for these before it preempts.

Admission is by expectation: known tokens and one page's worth more per head, at the CR measured so
far. Where heads merge less than expected, pages run short and the last in the order is preempted.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, get_args

from megatron_dmc.engine.chunk import Chunk
from megatron_dmc.engine.decode_batch import DecodeBatch
from megatron_dmc.engine.request import Request, RequestStatus
from megatron_dmc.errors import InvalidRequest, UnsupportedConfig

_STEPS_BETWEEN_LOOKS = 8
"""While no request ends, a waiting one that lacks pages is looked at again after this number of steps."""

SchedulingPolicy = Literal["fcfs", "priority"]


class CachedPrefix(NamedTuple):
    """A prefix of a request that need not be computed."""

    num_tokens: int
    num_pages: int
    """Pages that are free before a start with it and not afterwards."""


NO_PREFIX = CachedPrefix(0, 0)


class PageAccount(Protocol):
    """The scheduler's view of the cache."""

    num_pages: int
    """All pages."""
    page_size: int
    num_heads_total: int
    """KV heads over all layers: each has its own pages. With tensor parallelism: of one rank."""

    @property
    def num_free_pages(self) -> int:
        """Pages that are free whatever the steps in flight take."""
        ...

    def pages_needed(self, request: Request, num_new_tokens: int) -> int:
        """Pages that the request lacks, at worst, for `num_new_tokens` more tokens."""
        ...

    def pages_needed_each(self, requests: Sequence[Request]) -> list[int]:
        """`pages_needed` of running requests for one more token each."""
        ...

    def may_decode(self, batch: DecodeBatch) -> bool:
        """Whether the pages of this step are free, and nothing but its tokens has to be known of it."""
        ...

    def num_cached_tokens(self, request: Request) -> int:
        """Computed tokens of a running request whose entries are counted."""
        ...

    def num_entries(self, request: Request) -> int:
        """Entries of these, over all layers and heads (of the rank that has most)."""
        ...

    def count_landed(self) -> None:
        """Count the entries of the steps that are done."""
        ...

    def update_counts(self) -> None:
        """Wait for the steps in flight, and count their entries."""
        ...

    def worst_case_pages(self, request: Request, num_tokens: int) -> int:
        """Pages of this many of a request's tokens if none merges."""
        ...

    def find_prefix(self, request: Request) -> CachedPrefix:
        """The cached prefix from which `start` can begin a waiting request."""
        ...

    def start(self, request: Request, *, use_prefix: bool) -> None:
        """Give the request a row in the cache, with the prefix just found if `use_prefix`."""
        ...

    def release(self, request: Request) -> None:
        """Take back its row and pages."""
        ...


@dataclass
class Schedule:
    """A step's work. The pages it may need are free."""

    chunks: list[Chunk] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    decode: DecodeBatch | None = None
    """Instead of chunks, where every running request decodes one token and nothing else happens."""

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


class Scheduler:
    """Decides which tokens of which requests a step computes.

    Args:
        scheduling_policy: "fcfs", or "priority": a request of lower `priority` passes
            `priority_reach` earlier ones per level.

    Attributes:
        waiting, running: in order.
    """

    def __init__(
        self,
        account: PageAccount,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        scheduling_policy: SchedulingPolicy = "fcfs",
        priority_reach: int = 256,
    ):
        for name, value in (
            ("max_num_seqs", max_num_seqs),
            ("max_num_batched_tokens", max_num_batched_tokens),
            ("max_model_len", max_model_len),
            ("priority_reach", priority_reach),
        ):
            if value < 1:
                raise ValueError(f"{name}={value} must be positive")
        if scheduling_policy not in get_args(SchedulingPolicy):
            raise UnsupportedConfig(
                f"scheduling_policy={scheduling_policy!r}: use 'fcfs' or 'priority'"
            )
        self.account = account
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.scheduling_policy, self.priority_reach = scheduling_policy, priority_reach
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.num_preemptions = 0
        self._batch: DecodeBatch | None = None
        self._steps_to_next_look = 0
        self._released_tokens = self._released_entries = 0

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def order(self, request: Request) -> tuple[int, int]:
        """Sort key of requests: lower is scheduled first."""
        levels = request.priority if self.scheduling_policy == "priority" else 0
        return request.number + levels * self.priority_reach, request.number

    def check_feasible(self, request: Request) -> None:
        """Refuse a request that could never run to its end.

        Raises:
            InvalidRequest: with the numbers.
        """
        num_prompt = request.num_prompt_tokens
        if num_prompt == 0:
            raise InvalidRequest(
                f"request {request.request_id}: the prompt is empty; give it a token"
            )
        if num_prompt >= self.max_model_len:
            raise InvalidRequest(
                f"request {request.request_id}: a prompt of {num_prompt} tokens leaves no room in a "
                f"context of max_model_len={self.max_model_len}; shorten it or raise max_model_len"
            )
        if request.priority and self.scheduling_policy != "priority":
            raise InvalidRequest(
                f"request {request.request_id}: priority={request.priority} needs "
                "scheduling_policy='priority'; this engine serves first come, first served"
            )
        most = self.account.worst_case_pages(request, request.max_cached_tokens)
        if most > self.account.num_pages:
            raise InvalidRequest(
                f"request {request.request_id}: prompt of {num_prompt} + max_tokens "
                f"{request.max_total_tokens - num_prompt} may need {most} pages uncompressed, the "
                f"cache has {self.account.num_pages}; lower max_tokens or give the cache more memory "
                "(num_pages, kv_cache_memory_bytes)"
            )

    @property
    def measured_cr(self) -> float:
        """Tokens / entries of all requests that ran; 1 before there are any."""
        heads = self.account.num_heads_total
        tokens = self._released_tokens + heads * sum(
            map(self.account.num_cached_tokens, self.running)
        )
        entries = self._released_entries + sum(map(self.account.num_entries, self.running))
        return tokens / entries if entries else 1.0

    def expected_pages(self, request: Request, num_cached: int, measured_cr: float) -> float:
        """Pages that a request will probably need, beyond those of its first `num_cached` tokens, for
        its known tokens and as many more as fill one page of a head.

        Args:
            measured_cr: of the engine, for a request that has too few tokens of its own in the cache.
        """
        page_size, heads = self.account.page_size, self.account.num_heads_total
        cr = measured_cr
        if (
            request.row is not None
            and (own := self.account.num_cached_tokens(request)) >= 2 * page_size
        ):
            cr = own * heads / self.account.num_entries(request)
        known = min(request.num_tokens + page_size, request.max_cached_tokens)
        tokens = max(known - num_cached, 0)
        # each head's last page is half full on average
        partly_filled = 0.0 if num_cached else 0.5
        pages = heads * (tokens / (cr * page_size) + partly_filled)
        return min(pages, self.account.worst_case_pages(request, tokens))

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequest: if it can never run; nothing is queued then.
        """
        self.check_feasible(request)
        bisect.insort(self.waiting, request, key=self.order)
        if self.waiting[0] is request:
            self._steps_to_next_look = 0

    def schedule(self) -> Schedule:
        """Choose a step's tokens: one for every running request, then the rest of their prompts, then
        new requests, each in order and while all bounds allow."""
        batch = self._decode_batch()
        if batch is not None and self.account.may_decode(batch):
            return Schedule(decode=batch)
        self._batch = None
        schedule = Schedule()
        free = self._continue(schedule)
        if not schedule.preempted:
            self._admit(schedule, free)
        return schedule

    def finish(self, request: Request) -> None:
        """Take a request out, running or waiting, and give back what it holds."""
        self._steps_to_next_look = 0
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self._release(request)
        else:
            self.waiting.remove(request)
        request.status = RequestStatus.FINISHED

    def _decode_batch(self) -> DecodeBatch | None:
        """The step in which every running request decodes one token; None where something else is due."""
        if len(self.running) > self.max_num_batched_tokens:
            return None
        if self.waiting and len(self.running) < self.max_num_seqs:
            if not self._steps_to_next_look:
                return None
            self._steps_to_next_look -= 1
        if self._batch is None or not self._batch.num_left:
            self._batch = DecodeBatch.of(self.running)
        return self._batch

    def _continue(self, schedule: Schedule) -> int:
        """Chunks for the running requests, preempting where needed. Returns pages left free."""
        budget = self.max_num_batched_tokens
        needed = self.account.pages_needed_each(self.running)
        free = self.account.num_free_pages
        for count in (self.account.count_landed, self.account.update_counts):
            if sum(needed) > free:
                count()
                needed = self.account.pages_needed_each(self.running)
                free = self.account.num_free_pages
        unpromised = free
        longer: list[tuple[Chunk, int]] = []
        position = 0
        while position < len(self.running) and budget > 0:
            request, pages = self.running[position], needed[position]
            position += 1
            num_uncomputed = request.num_tokens - request.num_computed_tokens
            if request.num_computed_tokens + num_uncomputed >= request.max_total_tokens:
                continue  # its last token is sampled
            if pages > unpromised:
                # those behind hold no promise of this step yet
                promised = free - unpromised
                while pages > unpromised and self.running[-1] is not request:
                    schedule.preempted.append(self._preempt_last())
                    free = self.account.num_free_pages
                    unpromised = free - promised
                if pages > unpromised:
                    assert position > 1, "the only running request is out of pages"
                    schedule.preempted.append(self._preempt_last())
                    free = self.account.num_free_pages
                    unpromised = free - promised
                    break
            chunk = Chunk(request, 1, request.num_computed_tokens)
            schedule.chunks.append(chunk)
            if num_uncomputed > 1:
                longer.append((chunk, pages))
            unpromised -= pages
            budget -= 1
        for chunk, pages in longer:
            most = min(chunk.request.num_uncomputed_tokens, 1 + budget)
            if most > 1:
                chunk.num_tokens = self._most_tokens(chunk.request, most, unpromised + pages)
                budget -= chunk.num_tokens - 1
                unpromised += pages - self.account.pages_needed(chunk.request, chunk.num_tokens)
        return unpromised

    def _admit(self, schedule: Schedule, free: int) -> None:
        budget = self.max_num_batched_tokens - schedule.num_tokens
        cr, others = 1.0, None
        while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.waiting[0]
            if self.running and others is None:
                cr = self.measured_cr
                others = sum(
                    self.expected_pages(r, r.num_computed_tokens, cr) for r in self.running
                )
            prefix = self._fitting_prefix(request, free, cr, others)
            if prefix is None:
                self._steps_to_next_look = _STEPS_BETWEEN_LOOKS - 1
                break
            self.waiting.pop(0)
            self.account.start(request, use_prefix=prefix.num_tokens > 0)
            request.status = RequestStatus.RUNNING
            bisect.insort(self.running, request, key=self.order)
            if prefix.num_tokens:
                others = None  # its entries change the measured CR
            elif others is not None:
                others += self.expected_pages(request, 0, cr)
            free -= prefix.num_pages
            num_tokens = self._most_tokens(
                request, min(request.num_uncomputed_tokens, budget), free
            )
            schedule.chunks.append(Chunk.next_of(request, num_tokens))
            free -= self.account.pages_needed(request, num_tokens)
            budget -= num_tokens

    def _fitting_prefix(
        self, request: Request, free: int, cr: float, others: float | None
    ) -> CachedPrefix | None:
        """The cached prefix from which a request can start now; None if it has to wait for pages.

        Args:
            others: pages that the running requests will probably need; None: there are none.
        """
        heads = self.account.num_heads_total
        prefix = self.account.find_prefix(request)
        if prefix.num_pages + heads > free and others is None:
            prefix = NO_PREFIX  # alone, it must start whatever is cached
        # one token may need a new page of every head
        if prefix.num_pages + heads > free:
            return None
        if others is None:
            return prefix
        expected = prefix.num_pages + self.expected_pages(request, prefix.num_tokens, cr)
        return prefix if expected + others <= self.account.num_free_pages else None

    def _most_tokens(self, request: Request, most: int, num_pages: int) -> int:
        """The most tokens, from 1 to `most`, for which `num_pages` pages suffice at worst."""
        if self.account.pages_needed(request, most) <= num_pages:
            return most
        return bisect.bisect_right(
            range(2, most), num_pages, key=lambda n: self.account.pages_needed(request, n)
        ) + 1  # fmt: skip

    def _preempt_last(self) -> Request:
        """Its tokens, prompt and completion, are computed again later."""
        request = self.running.pop()
        self._release(request)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = 0
        request.metrics.num_preemptions += 1
        self.num_preemptions += 1
        bisect.insort(self.waiting, request, key=self.order)
        return request

    def _release(self, request: Request) -> None:
        self._batch = None
        tokens = self.account.num_cached_tokens(request)
        self._released_tokens += tokens * self.account.num_heads_total
        self._released_entries += self.account.num_entries(request)
        self.account.release(request)
