"""Continuous batching, first come, first served, under a budget of pages. Knows pages only.

A request that runs is never preempted for one that came later, and the oldest one is never preempted
at all; with the refusal of what can never fit, every request finishes.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from megatron_dmc.engine.request import Request, RequestStatus
from megatron_dmc.errors import InvalidRequest


class PageAccount(Protocol):
    """What the scheduler asks the cache."""

    num_pages: int
    """All pages."""
    page_size: int
    num_heads_total: int
    """KV heads over all layers: each has its own pages."""

    @property
    def num_free_pages(self) -> int: ...

    def pages_needed(self, request: Request, num_new_tokens: int) -> int:
        """Pages that the request lacks, at worst, to take in so many more tokens."""
        ...

    def start(self, request: Request) -> None:
        """Give the request a row in the cache."""
        ...

    def release(self, request: Request) -> None:
        """Take back its row and pages."""
        ...


@dataclass
class ScheduledChunk:
    """Tokens [start, start + num_tokens) of a request are computed in this step."""

    request: Request
    num_tokens: int

    @property
    def start(self) -> int:
        return self.request.num_computed_tokens

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def samples(self) -> bool:
        """True where the chunk ends with the request's last known token."""
        return self.end == self.request.num_tokens


@dataclass
class Schedule:
    """A step's work. The pages it may need are free."""

    chunks: list[ScheduledChunk] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


class Scheduler:
    """Decides which tokens of which requests a step computes.

    Attributes:
        waiting: in order of arrival; preempted requests stand at the front.
        running: in order of arrival.
    """

    def __init__(
        self,
        account: PageAccount,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
    ):
        for name, value in (
            ("max_num_seqs", max_num_seqs),
            ("max_num_batched_tokens", max_num_batched_tokens),
            ("max_model_len", max_model_len),
        ):
            if value < 1:
                raise ValueError(f"{name}={value} must be positive")
        self.account = account
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_model_len = max_model_len
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_preemptions = 0

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

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
        most = self.worst_case_pages(request.max_cached_tokens)
        if most > self.account.num_pages:
            raise InvalidRequest(
                f"request {request.request_id}: prompt of {num_prompt} + max_tokens "
                f"{request.max_total_tokens - num_prompt} may need {most} pages uncompressed, the "
                f"cache has {self.account.num_pages}; lower max_tokens or give the cache more memory "
                "(num_pages, kv_cache_memory_bytes)"
            )

    def worst_case_pages(self, num_tokens: int) -> int:
        """Pages of so many tokens if none merges."""
        return -(-num_tokens // self.account.page_size) * self.account.num_heads_total

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            InvalidRequest: if it can never run; nothing is queued then.
        """
        self.check_feasible(request)
        self.waiting.append(request)

    def schedule(self) -> Schedule:
        """Choose a step's tokens: running requests first, then new ones while all bounds allow."""
        schedule = Schedule()
        budget = self.max_num_batched_tokens
        free = self.account.num_free_pages
        position = 0
        while position < len(self.running) and budget > 0:
            request = self.running[position]
            num_tokens = min(request.num_uncomputed_tokens, budget)
            needed = self.account.pages_needed(request, num_tokens)
            while needed > free and self.running[-1] is not request:
                # those behind `position` hold no promise of this step yet
                schedule.preempted.append(self._preempt_newest())
                free = self.account.num_free_pages - self._promised(schedule)
            if needed > free:
                assert position > 0, "the only running request is out of pages"
                schedule.preempted.append(self._preempt_newest())
                break
            schedule.chunks.append(ScheduledChunk(request, num_tokens))
            free -= needed
            budget -= num_tokens
            position += 1
        while (
            not schedule.preempted
            and self.waiting
            and budget > 0
            and len(self.running) < self.max_num_seqs
        ):
            request = self.waiting[0]
            prompt_pages = self.worst_case_pages(request.num_tokens)
            # room for one more page of every head of every running request, the new one included
            watermark = (len(self.running) + 1) * self.account.num_heads_total
            if prompt_pages + (watermark if self.running else 0) > free:
                break
            self.waiting.popleft()
            self.account.start(request)
            request.status = RequestStatus.RUNNING
            self.running.append(request)
            num_tokens = min(request.num_uncomputed_tokens, budget)
            schedule.chunks.append(ScheduledChunk(request, num_tokens))
            free -= prompt_pages
            budget -= num_tokens
        return schedule

    def finish(self, request: Request) -> None:
        """Take a request out, running or waiting, and give back what it holds."""
        if request.status is RequestStatus.RUNNING:
            self.running.remove(request)
            self.account.release(request)
        else:
            self.waiting.remove(request)
        request.status = RequestStatus.FINISHED

    def _promised(self, schedule: Schedule) -> int:
        return sum(self.account.pages_needed(c.request, c.num_tokens) for c in schedule.chunks)

    def _preempt_newest(self) -> Request:
        """Its tokens, prompt and completion, are computed again later."""
        request = self.running.pop()
        self.account.release(request)
        request.status = RequestStatus.WAITING
        request.num_computed_tokens = 0
        request.metrics.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)
        return request
