"""Host-side page accounting: counts only, never page ids.

A row's heads hold the pages that their entries need. The first of them may be shared with a cached prefix
that was captured from the row, or that the row was started from. Shared pages come in runs, the full pages
of every head between one boundary and the next, and a run is held or released as a whole. So the counts of
runs and entries determine the number of free pages, and the host never reads a page id.

Entries are counted one or more steps late. Until then a step's tokens are in flight: the pages that they take if
nothing merges are promised, and not free.

Dimension letters: K tensor-parallel ranks, L layers, R rows, B some of them, G key/value heads, S slots per
page.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dmc.errors import OutOfPages

_NO_LIMIT = np.iinfo(np.int64).max
_FEW = 64
"""New tokens of a row of which the pages are kept."""


@dataclass(eq=False)
class Run:
    """Full pages that a row and cached prefixes have in common."""

    num_pages_K: np.ndarray
    """int64, summed over layers and heads."""
    num_rows: int = 0
    num_prefixes: int = 0

    @property
    def duplicates_K(self) -> np.ndarray:
        """Pages double-counted because rows share them."""
        return max(self.num_rows - 1, 0) * self.num_pages_K

    @property
    def only_prefixes_K(self) -> np.ndarray:
        """Pages that no row holds."""
        return self.num_pages_K * (self.num_rows == 0 and self.num_prefixes > 0)


class PageCounts:
    """Entries of every head, and pages held, promised and free, on all ranks.

    Attributes:
        entries_KLRG: int64, those counted.
        in_flight_R: tokens of each row in flight, int64.
        limit_R: entries that a head of the row never exceeds, int64.
        runs: of each row, from its first token on.
        num_unfinished: pages of cached prefixes that are being captured in this step, on every rank;
            they cannot be reclaimed yet.
        num_changes: times that `figures` may have changed.
    """

    def __init__(self, num_pages: int, page_size: int, shape_KLRG: tuple[int, int, int, int]):
        num_ranks, _, num_rows, _ = shape_KLRG
        self.num_pages, self.page_size = num_pages, page_size
        is_power = page_size & (page_size - 1) == 0
        self._shift = page_size.bit_length() - 1 if is_power else None
        self.entries_KLRG = np.zeros(shape_KLRG, dtype=np.int64)
        self.limit_R = np.full(num_rows, _NO_LIMIT)
        self.runs: list[list[Run]] = [[] for _ in range(num_rows)]
        self.num_unfinished = self.num_changes = 0
        self._has_limits = False
        self._entries_KR = np.zeros((num_ranks, num_rows), dtype=np.int64)
        self._pages_KR = np.zeros_like(self._entries_KR)
        self.in_flight_R = np.zeros(num_rows, dtype=np.int64)
        self._promised_KR = np.zeros_like(self._entries_KR)
        # heads by the free slots of their last page
        self._heads_KRS = np.zeros((num_ranks, num_rows, page_size), dtype=np.int64)
        self._worst_of_few = self._worst_of_head(np.arange(_FEW))
        self.set_entries(np.arange(num_rows), self.entries_KLRG)
        self._duplicates_K = np.zeros(num_ranks, dtype=np.int64)
        self._only_prefixes_K = np.zeros_like(self._duplicates_K)

    @property
    def held_by_rows_K(self) -> np.ndarray:
        """Pages that rows hold, each counted once."""
        held: np.ndarray = self._pages_KR.sum(1) - self._duplicates_K
        return held

    @property
    def duplicates_K(self) -> np.ndarray:
        """Pages of rows that other rows count too."""
        return self._duplicates_K

    @property
    def only_prefixes_K(self) -> np.ndarray:
        """Pages that only cached prefixes hold."""
        return self._only_prefixes_K

    @property
    def free_K(self) -> np.ndarray:
        """Free pages."""
        return self.available_K - self._only_prefixes_K

    @property
    def available_K(self) -> np.ndarray:
        """Free pages after reclaiming all cached prefixes, where the tokens in flight took all that they may."""
        promised_K = self._promised_KR.sum(1)
        return self.num_pages - self.num_unfinished - self.held_by_rows_K - promised_K

    def figures(self, rows: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """Of each of these rows: tokens in flight; entries, and pages with shared ones, of all ranks. Between two
        changes the tokens in flight grow alone."""
        rows_B = np.asarray(rows, dtype=np.int64)
        entries_B, pages_B = self._entries_KR[:, rows_B].sum(0), self._pages_KR[:, rows_B].sum(0)
        return self.in_flight_R[rows_B].tolist(), entries_B.tolist(), pages_B.tolist()

    def most_entries(self, row: int) -> int:
        """Of the rank with the most."""
        return int(self._entries_KR[:, row].max())

    def pages_needed_K(self, row: int, num_new_tokens: int) -> np.ndarray:
        """Pages that a row takes at worst for more tokens than those in flight: nothing merges."""
        needed: np.ndarray = self.pages_needed_KB(np.array([row]), np.array([num_new_tokens]))[:, 0]
        return needed

    def open(self, row: int, limit: int | None) -> None:
        """Prepare an empty row whose heads never exceed `limit` entries; None: whatever their tokens are."""
        self.limit_R[row] = _NO_LIMIT if limit is None else limit
        self._has_limits |= limit is not None
        self.set_entries(np.array([row]), self.entries_KLRG[:, :, [row]])

    def pages_needed_KB(self, rows_B: np.ndarray, num_new_B: np.ndarray) -> np.ndarray:
        """`pages_needed_K` of several rows."""
        needed: np.ndarray = self._worst_KB(rows_B, self.in_flight_R[rows_B] + num_new_B)
        return needed - self._promised_KR[:, rows_B]

    def promise(self, rows_B: np.ndarray, num_new_B: np.ndarray) -> None:
        """Put more tokens of these rows in flight.

        Raises:
            OutOfPages: their pages are not free; nothing changes.
        """
        flying_B = self.in_flight_R[rows_B] + num_new_B
        worst_KB = self._worst_KB(rows_B, flying_B)
        needed_K = worst_KB.sum(1) - self._promised_KR[:, rows_B].sum(1)
        available_K = self.available_K
        short = needed_K > available_K
        if short.any():
            raise OutOfPages(
                f"{needed_K[short][0]} pages wanted, {available_K[short][0]} of "
                f"{self.num_pages} free; give the cache more memory (num_pages, "
                "kv_cache_memory_bytes) or run fewer sequences (max_num_seqs)"
            )
        self.in_flight_R[rows_B] = flying_B
        self._promised_KR[:, rows_B] = worst_KB

    def land(self, rows_B: np.ndarray, num_new_B: np.ndarray, entries_KLBG: np.ndarray) -> None:
        """Count the entries of these rows after their earliest tokens in flight, of these numbers."""
        self.set_entries(rows_B, entries_KLBG)
        self.in_flight_R[rows_B] -= num_new_B
        self._promised_KR[:, rows_B] = self._worst_KB(rows_B, self.in_flight_R[rows_B])

    def set_entries(self, rows_B: np.ndarray, entries_KLBG: np.ndarray) -> None:
        """Set the entries of these rows, and thereby their pages."""
        self.num_changes += 1
        self.entries_KLRG[:, :, rows_B] = entries_KLBG
        self._entries_KR[:, rows_B] = entries_KLBG.sum(axis=(1, 3))
        num_slots, num_ranks, num_rows = self.page_size, len(entries_KLBG), len(rows_B)
        pages_KLBG = self.pages_of(entries_KLBG)
        self._pages_KR[:, rows_B] = pages_KLBG.sum(axis=(1, 3))
        group_KLBG = np.arange(num_ranks * num_rows).reshape(num_ranks, 1, num_rows, 1) * num_slots
        groups_KLBG = pages_KLBG * num_slots
        groups_KLBG -= entries_KLBG
        groups_KLBG += group_KLBG
        heads = np.bincount(groups_KLBG.ravel("K"), minlength=num_ranks * num_rows * num_slots)
        self._heads_KRS[:, rows_B] = heads.reshape(num_ranks, num_rows, num_slots)

    def _worst_of_head(self, num_new_N: np.ndarray) -> np.ndarray:
        """Pages (N, S) that a head takes at worst for these numbers of tokens, by the free slots of its last page."""
        return self.pages_of(np.maximum(num_new_N[:, None] - np.arange(self.page_size), 0))

    def _worst_KB(self, rows_B: np.ndarray, num_new_B: np.ndarray) -> np.ndarray:
        """Pages that rows take at worst for tokens beyond the entries counted."""
        if num_new_B.max(initial=0) < _FEW:
            worst_BS = self._worst_of_few.take(num_new_B, 0)
        else:
            worst_BS = self._worst_of_head(num_new_B)
        worst_KB: np.ndarray = (self._heads_KRS.take(rows_B, 1) * worst_BS).sum(-1)
        limited = np.flatnonzero(self.limit_R[rows_B] < _NO_LIMIT) if self._has_limits else ()
        for b in limited:
            entries_KLG = self.entries_KLRG[:, :, rows_B[b]]
            most_KLG = np.minimum(entries_KLG + num_new_B[b], self.limit_R[rows_B[b]])
            worst_KB[:, b] = (self.pages_of(most_KLG) - self.pages_of(entries_KLG)).sum((1, 2))
        return worst_KB

    def hold_tails(self, count: int) -> None:
        """Add pages owned by cached prefixes, on every rank (negative: remove)."""
        self._only_prefixes_K += count

    def add_run(self, row: int, num_pages_KLG: np.ndarray) -> list[Run]:
        """Capture a cached prefix from a row: its full pages, a number of each head from the first one on,
        are shared from now on.

        Returns:
            the prefix's runs.
        """
        earlier = self.runs[row]
        num_pages_K = num_pages_KLG.sum(axis=(1, 2)) - sum(run.num_pages_K for run in earlier)
        run = Run(num_pages_K)
        self._change(run, rows=1)
        self.runs[row] = [*earlier, run]
        for run in self.runs[row]:
            self._change(run, prefixes=1)
        return self.runs[row]

    def start_from(self, row: int, runs: list[Run]) -> None:
        """Start a row from a cached prefix."""
        assert not self.runs[row], "the row is not empty"
        self.runs[row] = runs
        for run in runs:
            self._change(run, rows=1)

    def close(self, row: int) -> None:
        """Release all pages of a row."""
        for run in self.runs[row]:
            self._change(run, rows=-1)
        self.runs[row] = []
        self.in_flight_R[row] = self._promised_KR[:, row] = 0
        entries = self.entries_KLRG[:, :, [row]]
        self.set_entries(np.array([row]), np.zeros_like(entries))

    def drop_prefix(self, runs: list[Run]) -> None:
        """Release the runs of a cached prefix."""
        for run in runs:
            self._change(run, prefixes=-1)

    def pages_of(self, num_entries: np.ndarray) -> np.ndarray:
        """Number of pages for a head's entries."""
        if self._shift is None:
            return -(-num_entries // self.page_size)
        return (
            num_entries + (self.page_size - 1)
        ) >> self._shift  # divisions would be most of the work

    def _change(self, run: Run, rows: int = 0, prefixes: int = 0) -> None:
        self._duplicates_K -= run.duplicates_K
        self._only_prefixes_K -= run.only_prefixes_K
        run.num_rows += rows
        run.num_prefixes += prefixes
        assert run.num_rows >= 0 and run.num_prefixes >= 0, "a run is released twice"
        self._duplicates_K += run.duplicates_K
        self._only_prefixes_K += run.only_prefixes_K
