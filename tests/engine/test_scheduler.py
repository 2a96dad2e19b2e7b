"""The scheduler against a model of the cache in which heads merge at random. No torch."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dmc.engine.request import Request, RequestStatus
from megatron_dmc.engine.sampling_params import SamplingParams
from megatron_dmc.engine.scheduler import NO_PREFIX, Scheduler
from megatron_dmc.errors import InvalidRequest, UnsupportedConfig

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

    def pages_needed_each(self, requests):
        return [self.pages_needed(request, 1) for request in requests]

    def may_decode(self, batch):
        return False

    def num_cached_tokens(self, request):
        return request.num_computed_tokens

    def count_landed(self):
        """Every step is counted."""

    def update_counts(self):
        """No step is in flight."""

    def num_entries(self, request):
        return sum(self.entries[request.request_id])

    def worst_case_pages(self, request, num_tokens):
        return self.pages_of([num_tokens] * NUM_HEADS)

    def find_prefix(self, request):
        return NO_PREFIX

    def start(self, request, *, use_prefix):
        assert not use_prefix
        assert request.request_id not in self.entries
        self.entries[request.request_id] = [0] * NUM_HEADS
        request.row = request.number

    def release(self, request):
        del self.entries[request.request_id]
        request.row = None

    def grow(self, request, num_tokens, rng):
        entries = self.entries[request.request_id]
        low = [0 if n else 1 for n in entries]
        self.entries[request.request_id] = [
            n + rng.randint(lo, num_tokens) for n, lo in zip(entries, low, strict=True)
        ]


class NeverMerges:
    @staticmethod
    def randint(_low, high):
        return high


class MergesFourfold:
    """Every head keeps a quarter of its tokens."""

    @staticmethod
    def randint(low, high):
        return max(low, high // 4)


def make_request(number, num_prompt, max_tokens, max_model_len=10**6):
    return Request(
        request_id=str(number),
        number=number,
        prompt=None,
        prompt_token_ids=[0] * num_prompt,
        params=SamplingParams(max_tokens=max_tokens),
        max_total_tokens=min(num_prompt + max_tokens, max_model_len),
    )


def make_scheduler(
    num_pages=60, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, **options
):
    return Scheduler(
        CountingAccount(num_pages),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        **options,
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
    for requests in (scheduler.running, scheduler.waiting):
        order = [scheduler.order(r) for r in requests]
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
            if scheduler.account.worst_case_pages(request, request.max_cached_tokens) > num_pages:
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

    steps = [
        [(c.request.number, c.num_tokens) for c in advance(scheduler, NeverMerges).chunks]
        for _ in range(4)
    ]
    assert steps == [[(0, 8)], [(0, 8)], [(0, 4), (1, 3)], [(0, 1), (1, 1)]]


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "max_model_len"])
def test_sizes_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be positive"):
        make_scheduler(**{name: 0})


def test_priorities_pass_a_bounded_number_of_earlier_requests():
    scheduler = make_scheduler(max_num_seqs=1, scheduling_policy="priority", priority_reach=3)
    for number, priority in enumerate([0, 0, 0, 0, -1, 1, 0, 0, -1]):
        request = make_request(number, 2, 1)
        request.priority = priority
        scheduler.add(request)
    ended = []
    while scheduler.has_unfinished_requests:
        ended += [c.request.number for c in advance(scheduler, NeverMerges).chunks]
    # -1 passes three (and ties with the one before), 1 is passed by three
    assert ended == [0, 1, 4, 2, 3, 8, 6, 7, 5]
    order = {n: i for i, n in enumerate(ended)}
    assert all(order[n] <= n + 3 for n in order)


def test_a_low_priority_request_is_served_under_endless_urgent_ones():
    scheduler = make_scheduler(max_num_seqs=1, scheduling_policy="priority", priority_reach=8)
    humble = make_request(0, 8, 4)
    humble.priority = 5
    scheduler.add(humble)
    urgent = make_request(1, 4, 4)
    urgent.priority = -1
    scheduler.add(urgent)
    passed = set()
    for number in range(2, 400):  # one comes with every step, each needs four steps
        request = make_request(number, 4, 4)
        request.priority = -1
        scheduler.add(request)
        started = {c.request.number for c in advance(scheduler, NeverMerges).chunks}
        if 0 in started:
            break
        passed |= started
    # later requests by less than (5 + 1) * 8 numbers pass it, all of them
    assert passed == set(range(1, 48))


def test_first_in_order_is_never_preempted_and_waiting_ones_come_by_priority():
    scheduler = make_scheduler(
        num_pages=18, max_num_batched_tokens=64, scheduling_policy="priority"
    )
    requests = [make_request(i, 4, 16) for i in range(3)]
    for request, priority in zip(requests, (2, 0, 1), strict=True):
        request.priority = priority
        scheduler.add(request)
    preempted = []
    while scheduler.has_unfinished_requests:
        step = advance(scheduler, NeverMerges)
        preempted += step.preempted
    assert requests[1] not in preempted and preempted
    with pytest.raises(InvalidRequest, match="priority=2 needs scheduling_policy='priority'"):
        make_scheduler().add(requests[0])
    with pytest.raises(UnsupportedConfig, match="scheduling_policy='fifo'"):
        make_scheduler(scheduling_policy="fifo")


def test_admission_follows_the_measured_cr():
    """Once heads are seen to keep a quarter, about four times as many requests run at a time."""

    def most_running(rng):
        scheduler = make_scheduler(
            num_pages=120, max_num_seqs=64, max_num_batched_tokens=400, max_model_len=200
        )
        most = 0
        for number in range(60):
            scheduler.add(make_request(number, 60, 20))
        while scheduler.has_unfinished_requests:
            advance(scheduler, rng)
            most = max(most, len(scheduler.running))
        return most, scheduler.num_preemptions

    plain, preempted_plain = most_running(NeverMerges)
    dense, _ = most_running(MergesFourfold)
    # 80 tokens are 60 pages of the 3 heads: two fit
    assert plain <= 2 and preempted_plain <= 60
    assert dense >= 3 * plain


def test_prompts_shrink_to_the_pages_that_are_free():
    scheduler = make_scheduler(num_pages=30, max_num_batched_tokens=64, max_model_len=64)
    scheduler.add(make_request(0, 36, 4))
    first = scheduler.schedule()
    assert [c.num_tokens for c in first.chunks] == [36]
    account = scheduler.account
    account.grow(first.chunks[0].request, 36, MergesFourfold)
    first.chunks[0].request.num_computed_tokens = 36
    first.chunks[0].request.output_token_ids.append(0)
    # 9 pages are held; the 21 others fit 28 tokens in the worst case, the first request's page has room
    scheduler.add(make_request(1, 40, 1))
    second = scheduler.schedule()
    assert [(c.request.number, c.num_tokens) for c in second.chunks] == [(0, 1), (1, 28)]
    assert not second.preempted
