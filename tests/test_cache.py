"""Page conservation under any sequence of operations."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from megatron_dmc.cache import BlockTables, OpenSegments, PagePool
from megatron_dmc.errors import OutOfPages

NUM_PAGES, PAGE_SIZE, LAYERS, ROWS, HEADS, MAX_ENTRIES = 40, 4, 2, 3, 2, 24


def make_pool(num_pages=NUM_PAGES):
    return PagePool(num_pages, PAGE_SIZE, 2, dtype=torch.float32, poison=True)


class PoolMachine(RuleBasedStateMachine):
    """Allocate and free single batches against a plain Python set."""

    def __init__(self):
        super().__init__()
        self.pool = make_pool()
        self.held: list[int] = []

    @rule(count=st.integers(0, NUM_PAGES + 5))
    def allocate(self, count):
        before = self.pool.num_free
        if count > before:
            with pytest.raises(OutOfPages, match=f"{count} pages wanted, {before} of"):
                self.pool.allocate(count)
            assert self.pool.num_free == before
            return
        page_ids = self.pool.allocate(count)
        assert page_ids.size == count
        assert not set(page_ids.tolist()) & set(self.held)
        assert self.pool.k_pages_PSD[page_ids].isnan().all()
        self.pool.k_pages_PSD[page_ids] = 1.0
        self.held += page_ids.tolist()

    @rule(data=st.data())
    def free_some(self, data):
        chosen = data.draw(st.lists(st.sampled_from(self.held), unique=True)) if self.held else []
        self.pool.free(np.array(chosen, dtype=np.int64))
        self.held = [p for p in self.held if p not in chosen]
        assert self.pool.k_pages_PSD[chosen].isnan().all()

    @rule(page_id=st.integers(-1, NUM_PAGES))
    def free_what_is_not_held(self, page_id):
        if page_id in self.held:
            return
        with pytest.raises(AssertionError, match="free:"):
            self.pool.free(np.array([page_id]))

    @rule()
    def free_twice_in_one_call(self):
        if self.held:
            with pytest.raises(AssertionError, match="named twice"):
                self.pool.free(np.array([self.held[0]] * 2))

    @invariant()
    def conserves_pages(self):
        self.pool.check_integrity()
        assert self.pool.num_free + self.pool.num_held == NUM_PAGES
        assert self.pool.num_held == len(self.held)


class TablesMachine(RuleBasedStateMachine):
    """Requests come, grow by any number of entries per head, and go."""

    def __init__(self):
        super().__init__()
        self.pool = make_pool()
        self.tables = BlockTables(self.pool, LAYERS, ROWS, HEADS, MAX_ENTRIES)
        self.rows: list[int] = []

    @rule()
    def open_row(self):
        if self.tables.num_free_rows:
            row = self.tables.open_row()
            assert row not in self.rows
            self.rows.append(row)

    @rule(data=st.data())
    def step(self, data):
        if not self.rows:
            return
        rows = data.draw(st.lists(st.sampled_from(self.rows), unique=True, min_size=1))
        longest = [int(self.tables.num_entries_LRG[:, r].max()) for r in rows]
        new = [data.draw(st.integers(0, MAX_ENTRIES - n)) for n in longest]
        needed = sum(self.tables.pages_needed(r, n) for r, n in zip(rows, new, strict=True))
        if needed > self.pool.num_free:
            before = self.tables.page_ids_LRGM.clone()
            with pytest.raises(OutOfPages):
                self.tables.reserve(rows, new)
            assert torch.equal(before, self.tables.page_ids_LRGM)
            return
        free = self.pool.num_free
        self.tables.reserve(rows, new)
        assert free - self.pool.num_free == needed
        for row, most in zip(rows, new, strict=True):
            seeded = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
            grown = torch.randint(0, most + 1, (LAYERS, HEADS), generator=seeded)
            self.tables.num_entries_LRG[:, row] += grown
        self.tables.check_integrity()
        self.tables.trim(rows)
        pages = (self.tables.page_ids_LRGM[:, rows] >= 0).sum(-1)
        entries = self.tables.num_entries_LRG[:, rows]
        assert torch.equal(pages, -(-entries // PAGE_SIZE))

    @rule(data=st.data())
    def close_row(self, data):
        if self.rows:
            row = data.draw(st.sampled_from(self.rows))
            self.tables.close_row(row)
            self.rows.remove(row)
            assert (self.tables.page_ids_LRGM[:, row] == -1).all()
            assert (self.tables.num_entries_LRG[:, row] == 0).all()

    @invariant()
    def conserves_pages(self):
        self.tables.check_integrity()
        if not self.rows:
            assert self.pool.num_free == NUM_PAGES


_settings = settings(
    max_examples=25,
    stateful_step_count=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestPool = PoolMachine.TestCase
TestPool.settings = _settings
TestTables = TablesMachine.TestCase
TestTables.settings = _settings


def test_page_bytes():
    assert make_pool().page_bytes == 2 * PAGE_SIZE * 2 * 4


def test_empty_pool_is_refused():
    with pytest.raises(ValueError, match="num_pages=0"):
        make_pool(0)


def test_segments_are_float32_and_cleared():
    segments = OpenSegments(2, 3, 2, 4, num_kept=3, dtype=torch.bfloat16)
    assert segments.state_LRGUA.shape == (2, 3, 2, 3, 9)
    assert segments.state_LRGUA.dtype == torch.float32
    segments.state_LRGUA.fill_(1.0)
    segments.clear(1)
    assert segments.state_LRGUA.sum() == 2 * 2 * 2 * 3 * 9
