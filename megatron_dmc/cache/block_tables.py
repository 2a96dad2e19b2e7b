"""Which pages each head of each request holds, how many entries it has, and its open segment.

Dimension letters: L layers, R rows (one per running request), G key/value heads, M block-table width,
P pages, S slots per page, D head dim, U weighted tokens kept for an open segment,
A = 2 D + 1 components of an accumulator, B some of the rows, K tensor-parallel ranks.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from megatron_dmc.cache.page_pool import PagePool

Exchange = Callable[[np.ndarray], np.ndarray]
"""Counters of this rank's heads, int64 (L, B, G), to those of all ranks, (K, L, B, G)."""


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
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        self.state_LRGUA = torch.zeros(
            num_layers, num_rows, num_kv_heads, num_kept, 2 * head_dim + 1, dtype=acc, device=device
        )

    def clear(self, row: int) -> None:
        """Forget a row's segments."""
        self.state_LRGUA[:, row] = 0.0


class BlockTables:
    """Block tables and entry counts of the running requests, over one `PagePool`.

    A head holds the pages of its entries, and between `reserve` and `trim` also those that a step
    may need at most. Attention advances `num_entries_LRG` on the device; nobody else does. The host
    learns the counts once a step, in `trim`; everything else here is computed from that copy.

    With tensor parallelism every rank has its own heads and pages. `exchange` then tells each rank
    all ranks' counts, and the questions a scheduler asks are answered for the scarcest rank.

    Attributes:
        page_ids_LRGM: int32, -1 where no page is held.
        num_entries_LRG: int64.
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
        self.pool = pool
        self.num_layers, self.num_kv_heads = num_layers, num_kv_heads
        width = -(-max_entries // pool.page_size)
        shape = (num_layers, num_rows, num_kv_heads)
        self.page_ids_LRGM = torch.full((*shape, width), -1, dtype=torch.int32, device=device)
        self.num_entries_LRG = torch.zeros(shape, dtype=torch.int64, device=device)
        # The host's copies; on a CPU the block tables are one memory.
        on_cpu = self.page_ids_LRGM.device.type == "cpu"
        self._table = (
            self.page_ids_LRGM.numpy() if on_cpu else self.page_ids_LRGM.cpu().numpy().copy()
        )
        self._device_table = None if on_cpu else self.page_ids_LRGM.view(-1)
        self._num_pages = np.zeros(shape, dtype=np.int64)
        self._entries = np.zeros((num_ranks, *shape), dtype=np.int64)
        self._rank, self._exchange = rank, exchange
        self._columns = np.arange(width)
        self._free_rows = list(range(num_rows - 1, -1, -1))

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    @property
    def num_free_pages(self) -> int:
        """Pages that can be allocated on every rank, cached prefixes given up."""
        own = self.pool.num_free + self.pool.num_reclaimable
        if len(self._entries) == 1:
            return own
        held = self._pages_of(self._entries).sum(axis=(1, 2, 3)).max()
        return min(own, self.pool.num_pages - int(held))

    def open_row(self) -> int:
        """A row for a new request, without pages or entries."""
        assert self._free_rows, "no free row"
        return self._free_rows.pop()

    def entries(self, row: int) -> np.ndarray:
        """Entries of all ranks' heads, int64 (L, K * G), as of the last `trim`."""
        return np.concatenate(list(self._entries[:, :, row]), axis=-1)

    def most_entries(self, row: int) -> int:
        """Entries of the rank that has most, over its layers and heads, as of the last `trim`."""
        return int(self._entries[:, :, row].sum(axis=(1, 2)).max())

    def pages_needed(self, row: int, num_new_tokens: int) -> int:
        """Pages that `reserve` would allocate for this row on the scarcest rank: the worst case,
        nothing merges."""
        entries = self._entries[:, :, row]
        missing = self._pages_of(entries + num_new_tokens) - self._pages_of(entries)
        return int(missing.sum(axis=(1, 2)).max())

    def reserve(self, rows: Sequence[int], num_new_tokens: Sequence[int]) -> None:
        """Allocate what these rows need at most to take in so many tokens each.

        Raises:
            OutOfPages: if the pool is short; nothing has changed then.
        """
        if not rows:
            return
        index = np.asarray(rows)
        held = self._num_pages[:, index]
        new = np.asarray(num_new_tokens)[:, None]
        wanted = self._pages_of(self._entries[self._rank][:, index] + new)
        missing = (wanted - held).clip(0)
        total = int(missing.sum())
        if total == 0:
            return
        page_ids = self.pool.allocate(total)
        # new pages go to columns [held, held + missing) of each head
        layer, b, head = np.nonzero(missing)
        counts = missing[layer, b, head]
        first = np.repeat(held[layer, b, head], counts)
        ends = counts.cumsum()
        step = np.arange(total) - np.repeat(ends - counts, counts)
        layer, row, head = (np.repeat(x, counts) for x in (layer, index[b], head))
        self._write((layer, row, head, first + step), page_ids)
        self._num_pages[:, index] = held + missing

    def trim(self, rows: Sequence[int]) -> None:
        """Learn these rows' entry counts from the device, and give back pages that hold no entry."""
        if not rows:
            return
        index = np.asarray(rows)
        counts = self.num_entries_LRG[:, torch.from_numpy(index)].cpu().numpy()
        self._entries[:, :, index] = counts if self._exchange is None else self._exchange(counts)
        self._keep(index, self._pages_of(counts))

    def adopt(
        self, row: int, num_entries_LG: np.ndarray, num_shared_LG: np.ndarray, page_ids: np.ndarray
    ) -> np.ndarray:
        """Fill an empty row from a cached prefix: share its full pages, and add an empty page to each
        head for what it copies.

        Args:
            num_entries_LG: entries of each head; its pages are the shared ones and one more.
            page_ids: shared pages, head by head in order.

        Returns:
            the new pages, (L, G).
        """
        assert not self._num_pages[:, row].any(), "the row is not empty"
        self.pool.share(page_ids, by_prefix=False)
        tails = self.pool.allocate(num_shared_LG.size)
        layer, head, column = np.nonzero(self._columns < num_shared_LG[..., None])
        self._write((layer, np.full_like(layer, row), head, column), page_ids)
        layer, head = np.indices(num_shared_LG.shape).reshape(2, -1)
        self._write((layer, np.full_like(layer, row), head, num_shared_LG.reshape(-1)), tails)
        self._num_pages[:, row] = num_shared_LG + 1
        self._entries[self._rank, :, row] = num_entries_LG
        self.num_entries_LRG[:, row] = torch.from_numpy(num_entries_LG).to(self.num_entries_LRG)
        return tails.reshape(num_shared_LG.shape)

    def first_pages(self, row: int, num_pages_LG: np.ndarray) -> np.ndarray:
        """The first pages of each head of a row, so many of each, head by head in order."""
        return self._table[:, row][self._columns < num_pages_LG[..., None]].astype(np.int64)

    def close_row(self, row: int) -> None:
        """Give back a row and all its pages."""
        assert row not in self._free_rows, f"row {row} is closed already"
        self._keep(np.array([row]), np.zeros_like(self._num_pages[:, [row]]))
        self.num_entries_LRG[:, row] = 0
        self._entries[:, :, row] = 0
        self._free_rows.append(row)

    def check_integrity(self, prefix_pages: np.ndarray | None = None) -> None:
        """Block tables and cached prefixes together name every held page as often as the pool counts
        owners; the page that a head writes to next has that head as its only owner.

        Args:
            prefix_pages: the pages of all cached prefixes, with repetitions.

        Raises:
            AssertionError: if not.
        """
        self.pool.check_integrity()
        if self._device_table is not None:
            assert np.array_equal(self.page_ids_LRGM.cpu().numpy(), self._table)
        owners = np.bincount(self._table[self._table >= 0], minlength=self.pool.num_pages)
        if prefix_pages is not None:
            owners += np.bincount(prefix_pages, minlength=self.pool.num_pages)
        pages = np.arange(self.pool.num_pages)
        assert np.array_equal(owners, self.pool.num_owners(pages)), (
            "block tables, cached prefixes and the pool disagree on who holds a page"
        )
        counts = (self._table >= 0).sum(-1)
        assert np.array_equal(counts, self._num_pages), "page counts and block tables disagree"
        entries = self.num_entries_LRG.cpu().numpy()
        assert bool((self._pages_of(entries) <= counts).all()), "entry without a page"
        layer, row, head = np.nonzero(entries)
        last = self._table[layer, row, head, (entries[layer, row, head] - 1) // self.pool.page_size]
        assert bool((owners[last] == 1).all()), "the page of an open entry has two owners"

    def _pages_of(self, num_entries: np.ndarray) -> np.ndarray:
        return -(-num_entries // self.pool.page_size)

    def _write(self, where: tuple[np.ndarray, ...], page_ids: np.ndarray) -> None:
        self._table[where] = page_ids
        if self._device_table is not None:
            flat = torch.from_numpy(np.ravel_multi_index(where, self._table.shape))
            values = torch.from_numpy(page_ids.astype(np.int32))
            device = self._device_table.device
            self._device_table[flat.to(device, non_blocking=True)] = values.to(
                device, non_blocking=True
            )

    def _keep(self, index_B: np.ndarray, num_kept_LBG: np.ndarray) -> None:
        # columns [kept, held) go back to the pool
        surplus = (self._num_pages[:, index_B] - num_kept_LBG).clip(0)
        if not surplus.any():
            return
        layer, b, head = np.nonzero(surplus)
        counts = surplus[layer, b, head]
        ends = counts.cumsum()
        column = np.repeat(num_kept_LBG[layer, b, head], counts)
        column = column + np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        layer, row, head = (np.repeat(x, counts) for x in (layer, index_B[b], head))
        where = (layer, row, head, column)
        page_ids = self._table[where].astype(np.int64)
        self._write(where, np.full_like(page_ids, -1))
        self._num_pages[:, index_B] -= surplus
        self.pool.free(page_ids)
