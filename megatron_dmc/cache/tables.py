"""Block tables, entry counts and open segments of every head of every request.

Dimension letters: L layers, R rows (one per running request), G key/value heads, M block-table width,
P pages, S slots per page, D head dim, U weighted tokens kept for an open segment,
A = 2 D + 1 components of an accumulator, B some of the rows, K tensor-parallel ranks.
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
from megatron_dmc.errors import OutOfPages
from megatron_dmc.ops.paged.layer_cache import LayerCache
from megatron_dmc.ops.tensors import accumulator_dtype

Exchange = Callable[[np.ndarray], np.ndarray]
"""Gathers the counters of this rank's heads, int64 (L, B, G), from all ranks, (K, L, B, G)."""


class OpenSegments:
    """The open segment of every (layer, row, KV head): sums of unrotated keys and values.

    Attributes:
        state_LRGUA: float32 (float64 for a float64 model), `[omega k, omega v, omega]` of the U kept
            tokens; with unlimited merging U is 1 and holds their running sum.
    """

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        num_kept: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        shape = (num_layers, num_rows, num_kv_heads, num_kept, 2 * head_dim + 1)
        self.state_LRGUA = torch.zeros(shape, dtype=accumulator_dtype(dtype), device=device)

    def clear(self, row: int) -> None:
        """Clear a row's segments."""
        self.state_LRGUA[:, row] = 0.0


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
    num_pages_shared: int
    """Pages that only cached prefixes hold, less those that several rows count."""
    copy: AsyncCopy


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

    def open_row(self, most_entries: int = np.iinfo(np.int64).max) -> int:
        """A row for a new request, without pages or entries.

        Args:
            most_entries: that a head of the row can ever have.
        """
        assert self._free_rows, "no free row"
        row = self._free_rows.pop()
        self.counts.open(row, most_entries)
        return row

    def entries(self, row: int) -> np.ndarray:
        """Entries of all ranks' heads, int64 (L, K * G)."""
        return np.concatenate(list(self.counts.entries_KLRG[:, :, row]), axis=-1)

    def pages_needed(self, row: int, num_new_tokens: int) -> int:
        """Worst-case number of pages that a row takes on the tightest rank for more tokens than those in
        flight: nothing merges."""
        return int(self.counts.pages_needed_K(row, num_new_tokens).max())

    def begin_step(self, rows: Sequence[int], num_new_tokens: Sequence[int]) -> None:
        """Reserve the worst-case number of pages for new tokens of these rows: they stay free from here on.
        Appending allocates them.

        Raises:
            OutOfPages: if the cache is short; nothing changes.
        """
        counts = self.counts
        needed_K = np.zeros_like(counts.available_K)
        for row, num_new in zip(rows, num_new_tokens, strict=True):
            needed_K += counts.pages_needed_K(row, num_new)
        available_K = counts.available_K
        short = needed_K > available_K
        if short.any():
            raise OutOfPages(
                f"{needed_K[short][0]} pages wanted, {available_K[short][0]} of "
                f"{counts.num_pages} free; give the cache more memory (num_pages, "
                "kv_cache_memory_bytes) or run fewer sequences (max_num_seqs)"
            )
        self._num_new_B = np.asarray(num_new_tokens, dtype=np.int64)
        counts.promise(np.asarray(rows, dtype=np.int64), self._num_new_B)
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
        rows: Sequence[int],
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
        shared = int(counts.only_prefixes_K[rank] - counts.duplicates_K[rank])
        tensors = [self.pool.free_pages.state, self.num_entries_LRG]
        tensors += [one.num_entries_LG for one in late]
        self._flights.append(
            _Flight(
                np.asarray(rows, dtype=np.int64), np.ones(len(rows), dtype=bool), num_new_B,
                list(late), on_growth, shared, AsyncCopy(tensors),
            )
        )  # fmt: skip

    def update_counts(self, keep: int = 0) -> None:
        """Wait for the steps in flight, and update the counts from them. With tensor parallelism all ranks
        do so at the same point.

        Args:
            keep: leave this number of newest steps in flight.

        Raises:
            AssertionError: a head found no page, or the number of free pages is wrong.
        """
        while len(self._flights) > keep:
            self._land(self._flights.popleft())

    def _land(self, flight: _Flight) -> None:
        state, entries_LRG, *others = flight.copy.read()
        assert not state[1], "a head found no page although the step's pages were reserved"
        free = self.pool.num_pages - int(state[0])
        held = int(self.counts.pages_of(entries_LRG).sum()) + flight.num_pages_shared
        expected = self.pool.num_pages - held
        assert free == expected, f"{free} pages are free, by the counts {expected}"
        counts_LBG = np.concatenate(
            [entries_LRG[:, flight.rows_B]] + [x[:, None] for x in others], axis=1
        )
        exchange = self._exchange
        counts_KLBG = counts_LBG[None] if exchange is None else exchange(counts_LBG)
        num_rows, is_open_B = len(flight.rows_B), flight.is_open_B
        if flight.on_growth is not None:
            before_LBG = self.counts.entries_KLRG[self.rank][:, flight.rows_B]
            flight.on_growth(counts_LBG[:, :num_rows] - before_LBG, is_open_B)
        self.counts.land(
            flight.rows_B[is_open_B], flight.num_new_B[is_open_B],
            counts_KLBG[:, :, :num_rows][:, :, is_open_B],
        )  # fmt: skip
        for i, one in enumerate(flight.late):
            one.on_copied(counts_KLBG[:, :, num_rows + i])

    def fill_row(self, row: int, num_entries_LG: Tensor) -> None:
        """Give an empty row a number of entries and their pages, with undefined contents. For benchmarks."""
        needed = self.counts.pages_of(num_entries_LG.cpu().numpy()).sum()
        assert self.may_take(int(needed)), f"{needed} pages are not free"
        self.num_entries_LRG[:, row] = num_entries_LG.to(self.num_entries_LRG)
        for layer_index in range(self.num_layers):
            self.layer(layer_index).take_pages(row, self.num_entries_LRG[layer_index, row])
        self.end_step([row])
        self.update_counts()

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
