"""The scheduler against a model of the cache in which heads merge at random. No torch."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dmc.engine.request import Request, RequestStatus
from megatron_dmc.engine.sampling_params import SamplingParams
from megatron_dmc.engine.scheduler import NO_PREFIX, Scheduler
from megatron_dmc.errors import InvalidRequest

PAGE_SIZE, NUM_HEADS = 4, 3


class CountingAccount:
    """Pages by count. `grow` plays the part of attention."""

    def __init__(self, num_pages):
        self.num_pages, self.page_size, self.num_heads_total = num_pages, PAGE_SIZE, NUM_HEADS
        self.entries: dict[str, list[int]] = {}

    @staticmethod
    def pages_of(entries):
        return sum(-(-n // PAGE_SIZE) for n in entries)

    @property
    def num_free_pages(self):
        return self.num_pages - sum(map(self.pages_of, self.entries.values()))

    def pages_needed(self, request, num_new_tokens):
        entries = self.entries[request.request_id]
        return self.pages_of([n + num_new_tokens for n in entries]) - self.pages_of(entries)

    def num_entries(self, request):
        return sum(self.entries[request.request_id])

    def find_prefix(self, request):
        return NO_PREFIX

    def start(self, request, *, use_prefix):
        assert not use_prefix
        assert request.request_id not in self.entries
        self.entries[request.request_id] = [0] * NUM_HEADS

    def release(self, request):
        del self.entries[request.request_id]

    def grow(self, request, num_tokens, rng):
        entries = self.entries[request.request_id]
        low = [0 if n else 1 for n in entries]
        self.entries[request.request_id] = [
            n + rng.randint(lo, num_tokens) for n, lo in zip(entries, low, strict=True)
        ]


def make_request(number, num_prompt, max_tokens, max_model_len=10**6):
    return Request(
        request_id=str(number),
        number=number,
        prompt=None,
        prompt_token_ids=[0] * num_prompt,
        params=SamplingParams(max_tokens=max_tokens),
        max_total_tokens=min(num_prompt + max_tokens, max_model_len),
    )


def make_scheduler(num_pages=60, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64):
    return Scheduler(
        CountingAccount(num_pages),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
    )


def advance(scheduler, rng):
    """A step: the schedule must fit; then grow, sample, finish."""
    schedule = scheduler.schedule()
    account = scheduler.account
    assert schedule.num_tokens <= scheduler.max_num_batched_tokens
    assert len(scheduler.running) <= scheduler.max_num_seqs
    needed = sum(account.pages_needed(c.request, c.num_tokens) for c in schedule.chunks)
    assert needed <= account.num_free_pages
    assert len({c.request.request_id for c in schedule.chunks}) == len(schedule.chunks)
    for chunk in schedule.chunks:
        request, samples, end = chunk.request, chunk.samples, chunk.end
        assert chunk.num_tokens >= 1
        assert request.status is RequestStatus.RUNNING
        account.grow(request, chunk.num_tokens, rng)
        request.num_computed_tokens = end
        if samples:
            request.output_token_ids.append(0)
            if request.num_tokens >= request.max_total_tokens:
                scheduler.finish(request)
    assert 0 <= account.num_free_pages <= account.num_pages
    assert set(account.entries) == {r.request_id for r in scheduler.running}
    order = [r.number for r in scheduler.running] + [r.number for r in scheduler.waiting]
    assert order == sorted(order)
    return schedule


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=1, max_size=12),
    num_pages=st.integers(NUM_HEADS, 80),
    max_num_seqs=st.integers(1, 5),
    max_num_batched_tokens=st.integers(1, 20),
    rng=st.randoms(use_true_random=False),
    arrive=st.floats(0.05, 1.0),
    abort=st.floats(0.0, 0.1),
)
def test_every_feasible_request_finishes_and_pages_are_conserved(
    sizes, num_pages, max_num_seqs, max_num_batched_tokens, rng, arrive, abort
):
    scheduler = make_scheduler(num_pages, max_num_seqs, max_num_batched_tokens)
    pending = [make_request(i, *size, max_model_len=64) for i, size in enumerate(sizes)]
    accepted, aborted = [], set()
    for _ in range(5000):
        if not pending and not scheduler.has_unfinished_requests:
            break
        if pending and rng.random() < arrive:
            request = pending.pop(0)
            if scheduler.worst_case_pages(request.max_cached_tokens) > num_pages:
                with pytest.raises(InvalidRequest, match=f"the cache has {num_pages}"):
                    scheduler.add(request)
            else:
                scheduler.add(request)
                accepted.append(request)
        live = [r for r in accepted if r.status is not RequestStatus.FINISHED]
        if live and rng.random() < abort:
            victim = rng.choice(live)
            scheduler.finish(victim)
            aborted.add(victim.request_id)
        advance(scheduler, rng)
    assert not scheduler.has_unfinished_requests
    assert scheduler.account.num_free_pages == num_pages
    for request in accepted:
        assert request.status is RequestStatus.FINISHED
        assert request.request_id in aborted or request.num_tokens == request.max_total_tokens


def test_newest_is_preempted_and_comes_back_first():
    scheduler = make_scheduler(num_pages=18, max_num_batched_tokens=64)
    requests = [make_request(i, 4, 16) for i in range(3)]
    for request in requests:
        scheduler.add(request)

    class NeverMerges:
        @staticmethod
        def randint(_low, high):
            return high

    preempted = []
    while scheduler.has_unfinished_requests:
        preempted += advance(scheduler, NeverMerges).preempted
        assert requests[0] not in preempted
    assert preempted
    assert scheduler.num_preemptions == len(preempted)
    assert sum(r.metrics.num_preemptions for r in requests) == len(preempted)


def test_impossible_requests_are_refused_with_numbers():
    scheduler = make_scheduler(num_pages=12, max_model_len=64)
    with pytest.raises(InvalidRequest, match="prompt of 64 tokens .* max_model_len=64"):
        scheduler.add(make_request(0, 64, 1))
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        scheduler.add(make_request(1, 0, 1))
    # 16 tokens in the cache are 4 pages for each of 3 heads
    with pytest.raises(InvalidRequest, match="max_tokens 8 may need 15 pages .* has 12"):
        scheduler.add(make_request(2, 10, 8))
    scheduler.add(make_request(3, 10, 7))
    assert len(scheduler.waiting) == 1


def test_long_prompts_are_cut_into_chunks():
    scheduler = make_scheduler(max_num_batched_tokens=8)
    scheduler.add(make_request(0, 20, 2))
    scheduler.add(make_request(1, 3, 2))

    class NeverMerges:
        @staticmethod
        def randint(_low, high):
            return high

    steps = [
        [(c.request.number, c.num_tokens) for c in advance(scheduler, NeverMerges).chunks]
        for _ in range(4)
    ]
    assert steps == [[(0, 8)], [(0, 8)], [(0, 4), (1, 3)], [(0, 1), (1, 1)]]


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "max_model_len"])
def test_sizes_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be positive"):
        make_scheduler(**{name: 0})
