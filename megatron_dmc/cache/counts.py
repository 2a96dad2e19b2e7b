"""Host-side page accounting: counts only, never page ids.

A row's heads hold the pages that their entries need. The first of them may be shared with a cached prefix
that was captured from the row, or that the row was started from. Shared pages come in runs, the full pages
of every head between one boundary and the next, and a run is held or released as a whole. So the counts of
runs and entries determine the number of free pages, and the host never reads a page id.

Dimension letters: K tensor-parallel ranks, L layers, R rows, B some of them, G key/value heads.
"""

from dataclasses import dataclass

import numpy as np


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
    """Entries of every head, and pages held and free, on all ranks.

    Attributes:
        entries_KLRG: int64.
        limit_R: entries that a head of the row never exceeds, int64; set it while the row is empty.
        runs: of each row, from its first token on.
        num_unfinished: pages of cached prefixes that are being captured in this step, on every rank;
            they cannot be reclaimed yet.
    """

    def __init__(self, num_pages: int, page_size: int, shape_KLRG: tuple[int, int, int, int]):
        num_ranks, _, num_rows, _ = shape_KLRG
        self.num_pages, self.page_size = num_pages, page_size
        self.entries_KLRG = np.zeros(shape_KLRG, dtype=np.int64)
        self.limit_R = np.full(num_rows, np.iinfo(np.int64).max)
        self.runs: list[list[Run]] = [[] for _ in range(num_rows)]
        self.num_unfinished = 0
        self._entries_KR = np.zeros((num_ranks, num_rows), dtype=np.int64)
        self._pages_KR = np.zeros_like(self._entries_KR)
        # heads without room for another entry: all of an empty row's
        self._full_KR = (self.entries_KLRG % page_size == 0).sum(axis=(1, 3))
        self._duplicates_K = np.zeros(num_ranks, dtype=np.int64)
        self._only_prefixes_K = np.zeros_like(self._duplicates_K)

    @property
    def held_by_rows_K(self) -> np.ndarray:
        """Pages that rows hold, each counted once."""
        held: np.ndarray = self._pages_KR.sum(1) - self._duplicates_K
        return held

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
        """Free pages after reclaiming all cached prefixes."""
        return self.num_pages - self.num_unfinished - self.held_by_rows_K

    def num_entries(self, row: int) -> int:
        """Of all ranks' layers and heads."""
        return int(self._entries_KR[:, row].sum())

    def most_entries(self, row: int) -> int:
        """Of the rank with the most."""
        return int(self._entries_KR[:, row].max())

    def num_pages_of(self, row: int) -> int:
        """Of all ranks, shared ones included."""
        return int(self._pages_KR[:, row].sum())

    def pages_needed_K(self, row: int, num_new_tokens: int) -> np.ndarray:
        """Worst-case number of pages that a row takes for more tokens: nothing merges."""
        if num_new_tokens == 1:
            return self._full_KR[:, row]
        entries = self.entries_KLRG[:, :, row]
        most = np.minimum(entries + num_new_tokens, self.limit_R[row])
        missing = self.pages_of(most) - self.pages_of(entries)
        needed: np.ndarray = missing.sum(axis=(1, 2))
        return needed

    def set_entries(self, rows_B: np.ndarray, entries_KLBG: np.ndarray) -> None:
        """Set the entries of these rows, and thereby their pages."""
        self.entries_KLRG[:, :, rows_B] = entries_KLBG
        self._entries_KR[:, rows_B] = entries_KLBG.sum(axis=(1, 3))
        self._pages_KR[:, rows_B] = self.pages_of(entries_KLBG).sum(axis=(1, 3))
        is_full = (entries_KLBG % self.page_size == 0) & (entries_KLBG < self.limit_R[rows_B, None])
        self._full_KR[:, rows_B] = is_full.sum(axis=(1, 3))

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
        entries = self.entries_KLRG[:, :, [row]]
        self.set_entries(np.array([row]), np.zeros_like(entries))

    def drop_prefix(self, runs: list[Run]) -> None:
        """Release the runs of a cached prefix."""
        for run in runs:
            self._change(run, prefixes=-1)

    def pages_of(self, num_entries: np.ndarray) -> np.ndarray:
        """Number of pages for a head's entries."""
        return -(-num_entries // self.page_size)

    def _change(self, run: Run, rows: int = 0, prefixes: int = 0) -> None:
        self._duplicates_K -= run.duplicates_K
        self._only_prefixes_K -= run.only_prefixes_K
        run.num_rows += rows
        run.num_prefixes += prefixes
        assert run.num_rows >= 0 and run.num_prefixes >= 0, "a run is released twice"
        self._duplicates_K += run.duplicates_K
        self._only_prefixes_K += run.only_prefixes_K
