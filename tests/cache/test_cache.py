"""Page conservation under any sequence of operations, and how little the pages hold beyond entries."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from megatron_dmc.cache import BlockTables, OpenSegments, PagePool
from megatron_dmc.cache.counts import PageCounts
from megatron_dmc.errors import OutOfPages
from megatron_dmc.ops.paged import pages as page_ops
from megatron_dmc.ops.paged.pages import FreePages

NUM_PAGES, PAGE_SIZE, LAYERS, ROWS, HEADS, MAX_ENTRIES = 40, 4, 2, 3, 2, 24


def make_pool(num_pages=NUM_PAGES):
    return PagePool(num_pages, PAGE_SIZE, 2, dtype=torch.float32, poison=True)


class PoolMachine(RuleBasedStateMachine):
    """Take, share and give back single batches against a plain Python dict of owners."""

    def __init__(self):
        super().__init__()
        self.pool = make_pool()
        self.owners: dict[int, int] = {}

    def named(self):
        return torch.tensor(
            [p for p, n in self.owners.items() for _ in range(n)], dtype=torch.int32
        )

    @rule(count=st.integers(0, NUM_PAGES))
    def take(self, count):
        if count > NUM_PAGES - len(self.owners):
            return
        page_ids = self.pool.take(count).tolist()
        assert len(set(page_ids)) == count and not set(page_ids) & set(self.owners)
        assert self.pool.k_pages_PSD[page_ids].isnan().all()
        self.pool.k_pages_PSD[page_ids] = 1.0
        self.owners |= dict.fromkeys(page_ids, 1)

    @rule(data=st.data())
    def share(self, data):
        if self.owners:
            chosen = data.draw(st.lists(st.sampled_from(sorted(self.owners)), unique=True))
            self.pool.add_owner(torch.tensor([*chosen, -1], dtype=torch.int32))
            for page in chosen:
                self.owners[page] += 1

    @rule(data=st.data())
    def release(self, data):
        """A page may be named as often as it has owners, in one call."""
        chosen = [p for p, n in self.owners.items() for _ in range(data.draw(st.integers(0, n)))]
        page_ids = torch.tensor([*chosen, -1], dtype=torch.int32)
        self.pool.release(page_ids[None])
        assert (page_ids == -1).all()
        for page in chosen:
            self.owners[page] -= 1
        gone = [p for p, n in self.owners.items() if n == 0]
        self.owners = {p: n for p, n in self.owners.items() if n}
        assert self.pool.k_pages_PSD[gone].isnan().all()
        assert not self.pool.k_pages_PSD[sorted(self.owners)].isnan().any()

    @invariant()
    def conserves_pages(self):
        self.pool.check_integrity(self.named())
        assert self.pool.num_free + self.pool.num_held == NUM_PAGES
        assert self.pool.num_held == len(self.owners)


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
        tables = self.tables
        rows = data.draw(st.lists(st.sampled_from(self.rows), unique=True, min_size=1))
        longest = [int(tables.num_entries_LRG[:, r].max()) for r in rows]
        new = [data.draw(st.integers(0, MAX_ENTRIES - n)) for n in longest]
        needed = sum(tables.pages_needed(r, n) for r, n in zip(rows, new, strict=True))
        before = tables.page_ids_LRGM.clone()
        if needed > tables.num_free_pages:
            with pytest.raises(OutOfPages, match=f"{needed} pages wanted, {self.pool.num_free} of"):
                tables.begin_step(rows, new)
            assert torch.equal(before, tables.page_ids_LRGM)
            return
        tables.begin_step(rows, new)
        assert torch.equal(before, tables.page_ids_LRGM)  # a promise takes nothing
        growth = []
        for row, most in zip(rows, new, strict=True):
            seeded = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
            growth.append(torch.randint(0, most + 1, (LAYERS, HEADS), generator=seeded))
            tables.num_entries_LRG[:, row] += growth[-1]
            for layer in range(LAYERS):
                page_ops.take_for_entries(
                    tables.page_ids_LRGM[layer, row], tables.num_entries_LRG[layer, row],
                    PAGE_SIZE, self.pool.free_pages,
                )  # fmt: skip
        growths = []
        tables.end_step(rows, on_growth=lambda growth, is_open: growths.append(growth))
        # until the host asks, the worst case holds
        assert not growths and tables.num_free_pages <= self.pool.num_free
        tables.update_counts()
        pages = (tables.page_ids_LRGM[:, rows] >= 0).sum(-1)
        entries = tables.num_entries_LRG[:, rows]
        assert torch.equal(pages, -(-entries // PAGE_SIZE))
        assert tables.num_free_pages == self.pool.num_free
        assert np.array_equal(growths[0], torch.stack(growth, 1).numpy())

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


def test_taking_more_than_there_is_shows():
    free_pages = FreePages.of(torch.tensor([7, 3]))
    table = torch.tensor([[-1, -1, -1], [5, -1, -1]], dtype=torch.int32)
    page_ops.take_for_entries(table, torch.tensor([5, 8]), 4, free_pages)
    assert table.tolist() == [[7, 3, -1], [5, -1, -1]]
    assert free_pages.state.tolist() == [3, 1]
    with pytest.raises(OutOfPages, match="3 pages wanted by decoding, 2 free"):
        free_pages.taken()
    pool = make_pool(2)
    pool.take(3)
    with pytest.raises(AssertionError, match="a head found no page"):
        pool.check_integrity()


def test_a_broken_promise_and_a_lost_page_are_noticed():
    tables = BlockTables(make_pool(4), 1, 2, 2, MAX_ENTRIES)
    row = tables.open_row()
    tables.begin_step([row], [1])
    tables.num_entries_LRG[:, row] += 1  # entries without pages
    tables.end_step([row])
    with pytest.raises(AssertionError, match="4 pages are free, by the counts 2"):
        tables.update_counts()
    tables = BlockTables(make_pool(4), 1, 2, 2, MAX_ENTRIES)
    tables.pool.take(1)
    with pytest.raises(AssertionError, match="disagree on who holds a page"):
        tables.check_integrity()


def test_counts_of_shared_pages():
    """Two rows and a cached prefix over one run: each page counts once, on either of two ranks."""
    counts = PageCounts(50, 4, (2, 1, 3, 2))
    assert counts.pages_needed_K(2, 1).tolist() == [2, 2]  # the row is unused
    counts.set_entries(np.array([0]), np.array([9, 5, 13, 4]).reshape(2, 1, 1, 2))
    assert counts.held_by_rows_K.tolist() == [5, 5]
    assert counts.pages_needed_K(0, 1).tolist() == [0, 1]
    assert counts.pages_needed_K(0, 4).tolist() == [2, 2]
    runs = counts.add_run(0, np.array([2, 1, 3, 0]).reshape(2, 1, 2))
    counts.start_from(1, runs)
    counts.set_entries(np.array([1]), np.array([9, 5, 13, 1]).reshape(2, 1, 1, 2))
    assert counts.held_by_rows_K.tolist() == [7, 7]
    counts.close(0)
    assert counts.held_by_rows_K.tolist() == [5, 5]
    counts.close(1)
    assert (counts.held_by_rows_K.tolist(), counts.only_prefixes_K.tolist()) == ([0, 0], [3, 3])
    assert (counts.free_K.tolist(), counts.available_K.tolist()) == ([47, 47], [50, 50])
    counts.drop_prefix(runs)
    assert counts.free_K.tolist() == [50, 50]


def test_pages_hold_little_beyond_entries():
    """CR 4, 4096 tokens, pages of 16, heads of different rates: appended token by token at the end."""
    layers, heads, rows, tokens, page_size = 2, 8, 3, 4096, 16
    generator = torch.Generator().manual_seed(0)
    keep_LRG = torch.rand(layers, rows, heads, generator=generator) * 0.4 + 0.05
    keep_LRG *= 0.25 / keep_LRG.mean()
    pool = PagePool(layers * rows * heads * tokens // page_size, page_size, 1, dtype=torch.float32)
    tables = BlockTables(pool, layers, rows, heads, tokens)
    opened = [tables.open_row() for _ in range(rows)]
    entries_LRG = torch.zeros(layers, rows, heads)
    for chunk in [1024] * 3 + [1000] + [1] * 24:
        tables.begin_step(opened, [chunk] * rows)
        appended = torch.rand(layers, rows, heads, chunk, generator=generator) < keep_LRG[..., None]
        entries_LRG += appended.sum(-1)
        tables.num_entries_LRG += appended.sum(-1)
        page_ops.take_for_entries(
            tables.page_ids_LRGM, tables.num_entries_LRG, page_size, pool.free_pages
        )
        tables.end_step(opened)
        tables.update_counts()
    assert tokens / float(entries_LRG.mean()) == pytest.approx(4, rel=0.02)
    assert tables.num_pages_in_use == pool.num_held
    overhead = pool.num_held * page_size / float(entries_LRG.sum())
    print(f"pages held / live entries: {overhead:.4f}")
    assert 1 <= overhead <= 1.10
    tables.check_integrity()


def test_pages_at_worst_are_those_of_every_head():
    rng = np.random.default_rng(5)
    counts = PageCounts(1000, 4, (2, 3, 5, 2))
    limits = [None, 9, None, 3, 40]
    for row, limit in enumerate(limits):
        counts.open(row, limit)
        most = 30 if limit is None else limit
        counts.set_entries(np.array([row]), rng.integers(0, most + 1, (2, 3, 1, 2)))
    num_new = np.array([1, 7, 13, 2, 60])
    got_KB = counts.pages_needed_KB(np.arange(5), num_new)
    for row, limit in enumerate(limits):
        before = counts.entries_KLRG[:, :, row]
        after = before + num_new[row]
        if limit is not None:
            after = np.minimum(after, limit)
        pages = -(-after // 4) - -(-before // 4)
        assert np.array_equal(got_KB[:, row], pages.sum(axis=(1, 2))), row
