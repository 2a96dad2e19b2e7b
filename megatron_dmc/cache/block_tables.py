"""Which pages each head of each request holds, how many entries it has, and its open segment.

Dimension letters: L layers, R rows (one per running request), G key/value heads, M block-table width,
P pages, S slots per page, D head dim, U weighted tokens kept for an open segment,
A = 2 D + 1 components of an accumulator, B some of the rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_dmc.cache.page_pool import PagePool


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
    may need at most. Attention advances `num_entries_LRG`; nobody else does.

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
    ):
        self.pool = pool
        self.num_layers, self.num_kv_heads = num_layers, num_kv_heads
        width = -(-max_entries // pool.page_size)
        shape = (num_layers, num_rows, num_kv_heads)
        self.page_ids_LRGM = torch.full((*shape, width), -1, dtype=torch.int32, device=device)
        self.num_entries_LRG = torch.zeros(shape, dtype=torch.int64, device=device)
        self._num_pages_LRG = torch.zeros(shape, dtype=torch.int64, device=device)
        self._free_rows = list(range(num_rows - 1, -1, -1))

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def open_row(self) -> int:
        """A row for a new request, without pages or entries."""
        assert self._free_rows, "no free row"
        return self._free_rows.pop()

    def pages_needed(self, row: int, num_new_tokens: int) -> int:
        """Pages that `reserve` would allocate for this row: the worst case, nothing merges."""
        return int(self._missing_pages([row], [num_new_tokens]).sum())

    def reserve(self, rows: Sequence[int], num_new_tokens: Sequence[int]) -> None:
        """Allocate what these rows need at most to take in so many tokens each.

        Raises:
            OutOfPages: if the pool is short; nothing has changed then.
        """
        if not rows:
            return
        missing_LBG = self._missing_pages(rows, num_new_tokens)
        total = int(missing_LBG.sum())
        if total == 0:
            return
        page_ids = self.pool.allocate(total)
        index = torch.as_tensor(rows, device=missing_LBG.device)
        held_LBG = self._num_pages_LRG[:, index]
        # new pages go to columns [held, held + missing) of each head
        columns = torch.arange(self.page_ids_LRGM.shape[-1], device=held_LBG.device)
        first, last = held_LBG[..., None], (held_LBG + missing_LBG)[..., None]
        table_LBGM = self.page_ids_LRGM[:, index]
        table_LBGM[(columns >= first) & (columns < last)] = page_ids.to(table_LBGM.dtype)
        self.page_ids_LRGM[:, index] = table_LBGM
        self._num_pages_LRG[:, index] = held_LBG + missing_LBG

    def trim(self, rows: Sequence[int]) -> None:
        """Give back the pages of these rows that hold no entry."""
        if not rows:
            return
        index = torch.as_tensor(rows, device=self.page_ids_LRGM.device)
        used_LBG = self._pages_of(self.num_entries_LRG[:, index])
        self._keep(index, used_LBG)

    def close_row(self, row: int) -> None:
        """Give back a row and all its pages."""
        assert row not in self._free_rows, f"row {row} is closed already"
        index = torch.tensor([row], device=self.page_ids_LRGM.device)
        self._keep(index, torch.zeros_like(self._num_pages_LRG[:, index]))
        self.num_entries_LRG[:, row] = 0
        self._free_rows.append(row)

    def check_integrity(self) -> None:
        """The pages in the tables are exactly the pool's held pages, each once.

        Raises:
            AssertionError: if not.
        """
        self.pool.check_integrity()
        held = self.page_ids_LRGM[self.page_ids_LRGM >= 0]
        assert held.unique().numel() == held.numel(), "a page is in two block tables"
        assert held.numel() == self.pool.num_held, (
            f"block tables hold {held.numel()} pages, the pool says {self.pool.num_held}"
        )
        counts = (self.page_ids_LRGM >= 0).sum(-1)
        assert torch.equal(counts, self._num_pages_LRG), "page counts and block tables disagree"
        assert bool((self._pages_of(self.num_entries_LRG) <= counts).all()), "entry without a page"

    def _pages_of(self, num_entries: Tensor) -> Tensor:
        return (num_entries + self.pool.page_size - 1) // self.pool.page_size

    def _missing_pages(self, rows: Sequence[int], num_new_tokens: Sequence[int]) -> Tensor:
        device = self.num_entries_LRG.device
        index = torch.as_tensor(rows, device=device)
        new = torch.as_tensor(num_new_tokens, device=device)[:, None]
        wanted = self._pages_of(self.num_entries_LRG[:, index] + new)
        return (wanted - self._num_pages_LRG[:, index]).clamp_min(0)

    def _keep(self, index_B: Tensor, num_kept_LBG: Tensor) -> None:
        table_LBGM = self.page_ids_LRGM[:, index_B]
        columns = torch.arange(table_LBGM.shape[-1], device=table_LBGM.device)
        # columns [kept, held) go back to the pool
        surplus = (columns >= num_kept_LBG[..., None]) & (table_LBGM >= 0)
        self.pool.free(table_LBGM[surplus])
        self.page_ids_LRGM[:, index_B] = table_LBGM.masked_fill(surplus, -1)
        self._num_pages_LRG[:, index_B] = torch.minimum(
            self._num_pages_LRG[:, index_B], num_kept_LBG
        )
