"""Block tables and entry counts of every head of every request.

Dimension letters: L layers, R rows (one per running request), G key/value heads, M block-table width,
P pages, S slots per page, D head dim, B some of the rows, K tensor-parallel ranks.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_dmc.cache.async_copy import AsyncCopy
from megatron_dmc.cache.counts import PageCounts, Run
from megatron_dmc.cache.pool import PagePool
from megatron_dmc.cache.segments import OpenSegments
from megatron_dmc.ops.paged.layer_cache import LayerCache

_MOST_UNCOUNTED = 8
"""Steps after which landed entries are counted."""

Exchange = Callable[[np.ndarray], np.ndarray]
"""Gathers the counters of this rank's heads, int64 (L, B, G), from all ranks, (K, L, B, G)."""


@dataclass
class CopiedCounts:
    """An object whose entry counts are copied to the host with the rows' counts."""

    row: int
    """Whose entries they are the first of."""
    num_entries_LG: Tensor
    """On the device, int64."""
    on_copied: Callable[[np.ndarray], None]
    """Called with all ranks' counts, (K, L, G)."""


@dataclass(eq=False)
class _Flight:
    """A step whose counts are on their way to the host."""

    rows_B: np.ndarray
    is_open_B: np.ndarray
    """False for a row that was closed since."""
    num_new_B: np.ndarray
    """Tokens of each row."""
    late: list[CopiedCounts]
    on_growth: Callable[[np.ndarray, np.ndarray], None] | None
    num_pages_cached: int
    """Pages that only cached prefixes hold."""
    num_pages_double: int
    """Pages of rows that other rows count too."""
    copy: AsyncCopy
    values: Sequence[np.ndarray] = ()
    """Of the copy, once it was read."""

    @property
    def has_prompts(self) -> bool:
        """Whether a row has several tokens, so that the worst case is far from what they take."""
        return bool((self.num_new_B > 1).any())


class BlockTables:
    """Block tables and entry counts of the running requests, over one `PagePool`.

    The device allocates: appending takes pages from the pool's stack for entries without one, and advances
    the counts. The host has only counts. `end_step` starts to copy them, and `update_counts` waits for that copy;
    until then the worst case holds. Between steps every head holds exactly the pages of its entries.

    With tensor parallelism every rank has its own heads and pages. `exchange` gives each rank all
    ranks' counts, and a scheduler's queries return the values of the tightest rank.

    Attributes:
        page_ids_LRGM: int32, -1 where no page is held.
        num_entries_LRG: int64.
        num_pages_after_step: pages that rows held on this rank after the last step that has landed.
        counts: entries and pages as of the last step that was counted, and the worst case of those after it.
        make_room: called with a number of pages if fewer may be free; reclaims cached prefixes until that
            number is free on every rank.
    """

    def __init__(
        self,
        pool: PagePool,
        num_layers: int,
        num_rows: int,
        num_kv_heads: int,
        max_entries: int,
        *,
        device: torch.device | str = "cpu",
        exchange: Exchange | None = None,
        num_ranks: int = 1,
        rank: int = 0,
    ):
        self.pool, self.rank = pool, rank
        self.num_layers, self.num_kv_heads = num_layers, num_kv_heads
        width = -(-max_entries // pool.page_size)
        shape = (num_layers, num_rows, num_kv_heads)
        self.page_ids_LRGM = torch.full((*shape, width), -1, dtype=torch.int32, device=device)
        self.num_entries_LRG = torch.zeros(shape, dtype=torch.int64, device=device)
        self.make_room: Callable[[int], None] | None = None
        self.counts = PageCounts(pool.num_pages, pool.page_size, (num_ranks, *shape))
        self._exchange = exchange
        self._free_rows = list(range(num_rows - 1, -1, -1))
        self._num_new_B = np.zeros(0, dtype=np.int64)
        self._flights: deque[_Flight] = deque()
        # the newest step that is done and not counted, and the tokens of it and of those before it
        self._landed: _Flight | None = None
        self._landed_R = np.zeros(num_rows, dtype=np.int64)
        self._num_landed = 0
        self.num_pages_after_step = 0

    def layer(self, layer_index: int, segments: OpenSegments | None = None) -> LayerCache:
        """One layer's storage for the ops. Copies nothing.

        Args:
            segments: None: the layer's tokens do not merge.
        """
        return LayerCache(
            self.pool.k_pages_PSD,
            self.pool.v_pages_PSD,
            self.page_ids_LRGM[layer_index],
            self.num_entries_LRG[layer_index],
            None if segments is None else segments.state_LRGUA[layer_index],
            self.pool.free_pages,
        )

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    @property
    def num_free_pages(self) -> int:
        """Pages that can be allocated on every rank after reclaiming cached prefixes."""
        return int(self.counts.available_K.min())

    @property
    def num_pages_in_use(self) -> int:
        """Pages that rows hold on this rank, each counted once."""
        return int(self.counts.held_by_rows_K[self.rank])

    @property
    def num_cached_pages(self) -> int:
        """Pages that only cached prefixes hold on this rank."""
        return int(self.counts.only_prefixes_K[self.rank])

    def open_row(self, most_entries: int | None = None) -> int:
        """A row for a new request, without pages or entries.

        Args:
            most_entries: that a head of the row can ever have; None: as many as tokens.
        """
        assert self._free_rows, "no free row"
        row = self._free_rows.pop()
        self.counts.open(row, most_entries)
        return row

    def entries(self, row: int) -> np.ndarray:
        """Entries of all ranks' heads, int64 (L, K * G)."""
        return np.concatenate(list(self.counts.entries_KLRG[:, :, row]), axis=-1)

    def pages_needed(self, row: int, num_new_tokens: int) -> int:
        """Pages that a row takes at worst on the tightest rank for more tokens than those in flight."""
        return int(self.counts.pages_needed_K(row, num_new_tokens).max())

    def pages_needed_each(self, rows: Sequence[int]) -> list[int]:
        """`pages_needed` of several rows for one more token each."""
        rows_B = np.asarray(rows, dtype=np.int64)
        needed: list[int] = (
            self.counts.pages_needed_KB(rows_B, np.ones_like(rows_B)).max(0).tolist()
        )
        return needed

    def may_decode(self, rows_B: np.ndarray, ones_B: np.ndarray) -> bool:
        """Whether the pages that one more token of each row takes at worst are free on every rank; `ones_B` are
        their numbers of tokens."""
        free_K = self.counts.free_K
        if len(rows_B) * self.num_layers * self.num_kv_heads <= free_K.min():
            return True  # even if every head needs one
        return bool((self.counts.pages_needed_KB(rows_B, ones_B).sum(1) <= free_K).all())

    def begin_step(
        self, rows: Sequence[int] | np.ndarray, num_new_tokens: Sequence[int] | np.ndarray
    ) -> None:
        """Reserve the worst-case number of pages for new tokens of these rows: they stay free from here on.
        Appending allocates them.

        Raises:
            OutOfPages: if the cache is short; nothing changes.
        """
        num_new_B = np.asarray(num_new_tokens, dtype=np.int64)
        self.counts.promise(np.asarray(rows, dtype=np.int64), num_new_B)
        self._num_new_B = num_new_B
        if self.make_room is not None:
            self.take_room(0)

    def may_take(self, count: int) -> bool:
        """Whether `count` pages are available beyond the reservation, reclaiming cached prefixes if needed."""
        return bool((self.counts.available_K >= count).all())

    def take_room(self, count: int) -> None:
        """Reclaim prefixes until `count` pages beyond the reservation are free. Requires `may_take(count)`."""
        if self.make_room is not None:
            self.make_room(count)
        assert bool((self.counts.free_K >= count).all()), "prefixes were not reclaimed"

    def end_step(
        self,
        rows: Sequence[int] | np.ndarray,
        late: Sequence[CopiedCounts] = (),
        on_growth: Callable[[np.ndarray, np.ndarray], None] | None = None,
    ) -> None:
        """All layers have appended: start to copy the counts of these rows, and others, to the host.

        Args:
            on_growth: called with the entries that these rows got on this rank, (L, B, G), and with
                the rows that are still open, bool (B,); the other rows' numbers mean nothing.
        """
        counts, rank = self.counts, self.rank
        num_new_B = self._num_new_B if len(self._num_new_B) else np.zeros(len(rows), dtype=np.int64)
        self._num_new_B = num_new_B[:0]
        tensors = [self.pool.free_pages.state, self.num_entries_LRG]
        tensors += [one.num_entries_LG for one in late]
        self._flights.append(
            _Flight(
                np.asarray(rows, dtype=np.int64), np.ones(len(rows), dtype=bool), num_new_B,
                list(late), on_growth, int(counts.only_prefixes_K[rank]),
                int(counts.duplicates_K[rank]), AsyncCopy(tensors),
            )
        )  # fmt: skip

    def update_counts(self, keep: int = 0) -> None:
        """Wait for the steps in flight, and count their entries. With tensor parallelism all ranks do so at
        the same point.

        Args:
            keep: leave this number of newest steps in flight.

        Raises:
            AssertionError: a head found no page, or the number of free pages is wrong.
        """
        self.land(keep)
        self.count_landed()

    def land(self, keep: int = 0) -> None:
        """Wait for the steps in flight. Entries of steps that only decode are counted now and then, as it takes
        time on the host; until then the worst case holds. Arguments and errors as `update_counts`."""
        while len(self._flights) > keep:
            flight = self._flights.popleft()
            flight.values = flight.copy.read()
            state = flight.values[0]
            assert not state[1], "a head found no page although the step's pages were reserved"
            self.num_pages_after_step = int(state[0]) - flight.num_pages_cached
            self._landed, self._num_landed = flight, self._num_landed + 1
            self._landed_R[flight.rows_B[flight.is_open_B]] += flight.num_new_B[flight.is_open_B]
            if (
                flight.has_prompts or flight.late or flight.on_growth is not None
                or self._exchange is not None
            ):  # fmt: skip
                self.count_landed()
        if self._num_landed >= _MOST_UNCOUNTED:
            self.count_landed()

    def count_row(self, row: int) -> None:
        """Count one row's entries as of the newest step that has landed."""
        if self._landed_R[row]:
            assert self._landed is not None
            entries_LRG = self._landed.values[1]
            self._set_landed(np.array([row]), entries_LRG[None, :, [row]])

    def count_landed(self) -> None:
        """Count the entries of the steps that have landed. Errors as `update_counts`."""
        flight, self._landed, self._num_landed = self._landed, None, 0
        if flight is None:
            return
        state, entries_LRG, *others = flight.values
        free = self.pool.num_pages - int(state[0])
        held = int(self.counts.pages_of(entries_LRG).sum()) - flight.num_pages_double
        expected = self.pool.num_pages - held - flight.num_pages_cached
        assert free == expected, f"{free} pages are free, by the counts {expected}"
        if flight.on_growth is not None:
            before_LBG = self.counts.entries_KLRG[self.rank][:, flight.rows_B]
            flight.on_growth(entries_LRG[:, flight.rows_B] - before_LBG, flight.is_open_B)
        rows_B = np.flatnonzero(self._landed_R)
        parts = [entries_LRG[:, rows_B]] + [x[:, None] for x in others]
        counts_LBG = np.concatenate(parts, axis=1)
        exchange = self._exchange
        counts_KLBG = counts_LBG[None] if exchange is None else exchange(counts_LBG)
        self._set_landed(rows_B, counts_KLBG[:, :, : len(rows_B)])
        for i, one in enumerate(flight.late):
            one.on_copied(counts_KLBG[:, :, len(rows_B) + i])

    def _set_landed(self, rows_B: np.ndarray, entries_KLBG: np.ndarray) -> None:
        self.counts.land(rows_B, self._landed_R[rows_B], entries_KLBG)
        self._landed_R[rows_B] = 0

    def fill_row(self, row: int, num_entries_LG: Tensor) -> None:
        """Give an empty row a number of entries and their pages, with undefined contents. For benchmarks."""
        needed = self.counts.pages_of(num_entries_LG.cpu().numpy()).sum()
        assert self.may_take(int(needed)), f"{needed} pages are not free"
        self.num_entries_LRG[:, row] = num_entries_LG.to(self.num_entries_LRG)
        for layer_index in range(self.num_layers):
            self.layer(layer_index).take_pages(row, self.num_entries_LRG[layer_index, row])
        self.counts.set_entries(np.array([row]), num_entries_LG.cpu().numpy()[None, :, None])

    def adopt(
        self,
        row: int,
        page_ids_LGM: Tensor,
        own_columns_LGX: Tensor,
        own_ids_LGX: Tensor,
        num_entries_LG: Tensor,
        entries_KLG: np.ndarray,
        runs: list[Run],
    ) -> None:
        """Fill an empty row from a cached prefix: share its full pages, and add pages to each head for
        what it copies.

        Args:
            page_ids_LGM: the full pages, in the columns that they need; -1 elsewhere.
            own_columns_LGX: the other columns of each head, without repetitions.
            own_ids_LGX: pages just allocated for them; the row holds them from now on.
            num_entries_LG: entries of each head.
            entries_KLG, runs: the same for the host, as counts.
        """
        counts = self.counts
        counts.start_from(row, runs)
        counts.set_entries(np.array([row]), entries_KLG[:, :, None])
        self.pool.add_owner(page_ids_LGM)
        table_LGM = self.page_ids_LRGM[:, row]
        table_LGM[..., : page_ids_LGM.shape[-1]] = page_ids_LGM
        table_LGM.scatter_(-1, own_columns_LGX, own_ids_LGX)
        self.num_entries_LRG[:, row] = num_entries_LG

    def close_row(self, row: int) -> None:
        """Release a row and all its pages."""
        assert row not in self._free_rows, f"row {row} is closed already"
        if any(one.row == row for flight in self._flights for one in flight.late):
            self.update_counts()  # what the row shares with a cached prefix has to be known
        for flight in self._flights:
            flight.is_open_B &= flight.rows_B != row
        self._landed_R[row] = 0
        self.counts.close(row)
        self.pool.release(self.page_ids_LRGM[:, row].view(self.num_layers, -1))
        self.num_entries_LRG[:, row] = 0
        self._free_rows.append(row)

    def check_integrity(self, prefix_pages: Tensor | None = None) -> None:
        """Check that block tables and cached prefixes together name every held page once per counted owner,
        that every head has exactly the pages of its entries and is the only owner of the page that it
        writes next, and that the host's counts are the device's. Waits for the device.

        Args:
            prefix_pages: the pages of all cached prefixes, with repetitions.

        Raises:
            AssertionError: if one does not hold.
        """
        self.update_counts()
        counts, table = self.counts, self.page_ids_LRGM
        named = table.flatten()
        if prefix_pages is not None:
            named = torch.cat([named, prefix_pages])
        self.pool.check_integrity(named)
        entries_LRG = self.num_entries_LRG
        own = counts.entries_KLRG[self.rank]
        assert np.array_equal(entries_LRG.cpu().numpy(), own), "the host's entry counts are wrong"
        page_size = self.pool.page_size
        column_M = torch.arange(table.shape[-1], device=table.device)
        has_entry = column_M * page_size < entries_LRG[..., None]
        assert torch.equal(table >= 0, has_entry), (
            "a page without an entry, or an entry without one"
        )
        free = int(counts.free_K[self.rank])
        assert self.pool.num_free == free, f"{self.pool.num_free} pages free, by the counts {free}"
        last = ((entries_LRG - 1).clamp_min(0) // page_size)[..., None]
        last_pages = table.gather(-1, last)[..., 0][entries_LRG > 0].long()
        assert not self.pool.num_extra_owners_P[last_pages].any(), (
            "the page of an open entry has two owners"
        )
