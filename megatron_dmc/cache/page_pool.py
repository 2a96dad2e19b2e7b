"""One pool of pages for all layers and heads.

Dimension letters: P pages, S slots per page, D head dim.
"""

import torch
from torch import Tensor

from megatron_dmc.errors import OutOfPages


class PagePool:
    """Storage of keys and values, and the list of free pages.

    A page is S slots of one KV head of one layer. The pool owns one invariant, which
    `check_integrity` verifies: every page is either free or held, once.

    Attributes:
        k_pages_PSD, v_pages_PSD: the storage, in the model's dtype.
        num_pages, page_size: P, S.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        poison: bool = False,
    ):
        """
        Args:
            poison: fill pages with NaN whenever they are free, so that a read of one shows. For tests.
        """
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages={num_pages} and page_size={page_size} must be positive")
        self.num_pages, self.page_size = num_pages, page_size
        self.k_pages_PSD = torch.zeros(num_pages, page_size, head_dim, dtype=dtype, device=device)
        self.v_pages_PSD = torch.zeros_like(self.k_pages_PSD)
        self._poison = poison
        # ids in [0, num_free) of the stack are free; the next page handed out is the last of them
        self._stack_P = torch.arange(num_pages - 1, -1, -1, device=device)
        self._num_free = num_pages
        self._is_held_P = torch.zeros(num_pages, dtype=torch.bool, device=device)
        self._fill_with_nan(self._stack_P)

    @property
    def num_free(self) -> int:
        """Pages that can be allocated."""
        return self._num_free

    @property
    def num_held(self) -> int:
        """Pages that somebody holds."""
        return self.num_pages - self._num_free

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, key and value together."""
        return 2 * self.k_pages_PSD[0].numel() * self.k_pages_PSD.element_size()

    def allocate(self, count: int) -> Tensor:
        """Take `count` pages: their ids, int64.

        Raises:
            OutOfPages: if fewer are free; nothing has changed then.
        """
        assert count >= 0, f"cannot allocate {count} pages"
        if count > self._num_free:
            raise OutOfPages(
                f"{count} pages wanted, {self._num_free} of {self.num_pages} free; give the cache more "
                "memory (num_pages, kv_cache_memory_bytes) or run fewer sequences (max_num_seqs)"
            )
        page_ids = self._stack_P[self._num_free - count : self._num_free].flip(0)
        self._num_free -= count
        self._is_held_P[page_ids] = True
        return page_ids

    def free(self, page_ids: Tensor) -> None:
        """Give pages back. Order and shape do not matter.

        Raises:
            AssertionError: if a page is not held, or named twice; nothing has changed then.
        """
        page_ids = page_ids.flatten().long()
        count = page_ids.numel()
        if count == 0:
            return
        in_range = (page_ids >= 0) & (page_ids < self.num_pages)
        assert bool(in_range.all()), "free: not a page id"
        assert bool(self._is_held_P[page_ids].all()), "free: a page is not held (freed twice?)"
        assert page_ids.unique().numel() == count, "free: a page is named twice"
        self._is_held_P[page_ids] = False
        self._stack_P[self._num_free : self._num_free + count] = page_ids
        self._num_free += count
        self._fill_with_nan(page_ids)

    def check_integrity(self) -> None:
        """free + held == total, no page twice.

        Raises:
            AssertionError: if the invariant is broken.
        """
        free = self._stack_P[: self._num_free]
        assert free.unique().numel() == self._num_free, "a page is on the free list twice"
        assert not bool(self._is_held_P[free].any()), "a free page is also held"
        held = int(self._is_held_P.sum())
        assert held + self._num_free == self.num_pages, (
            f"{held} held + {self._num_free} free != {self.num_pages} pages"
        )

    def _fill_with_nan(self, page_ids: Tensor) -> None:
        if self._poison:
            self.k_pages_PSD[page_ids] = float("nan")
            self.v_pages_PSD[page_ids] = float("nan")
