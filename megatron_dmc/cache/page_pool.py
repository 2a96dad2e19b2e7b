"""One pool of pages for all layers and heads.

Dimension letters: P pages, S slots per page, D head dim. Page ids are int64 numpy arrays: who owns what
is decided on the host, the contents are on the device.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from megatron_dmc.errors import OutOfPages
from megatron_dmc.ops import kv_pages

PageIds = np.ndarray
"""int64, any shape."""


class PagePool:
    """Storage of keys and values, the list of free pages, and who holds the others.

    A page is S slots of one KV head of one layer. It is free, or it has owners: heads of running
    requests, and cached prefixes. Several owners may hold a page; it is counted once, and is free
    again when the last one gives it back. A page that only cached prefixes hold is reclaimable.
    The pool's invariant, which `check_integrity` verifies: free + held = total, no page twice.

    Attributes:
        k_pages_PSD, v_pages_PSD: the storage: tensors, or `ScaledPages` where `dtype` is an 8-bit one.
        num_pages, page_size: P, S.
        reclaim: called with a number of pages when `allocate` is short by so many; it gives back
            pages that only cached prefixes hold.
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
            dtype: the model's, or float8_e4m3fn or int8.
            poison: fill pages with NaN whenever they are free, so that a read of one shows. For tests.
        """
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages={num_pages} and page_size={page_size} must be positive")
        self.num_pages, self.page_size = num_pages, page_size
        self.k_pages_PSD, self.v_pages_PSD = (
            kv_pages.empty_pages(num_pages, page_size, head_dim, dtype=dtype, device=device)
            for _ in range(2)
        )
        self._entry_bytes = 2 * kv_pages.entry_bytes(head_dim, dtype)
        self.reclaim: Callable[[int], None] | None = None
        self._poison = poison
        # ids in [0, num_free) of the stack are free; the next page handed out is the last of them
        self._stack_P = np.arange(num_pages - 1, -1, -1)
        self._num_free = num_pages
        self._num_owners_P = np.zeros(num_pages, dtype=np.int32)
        self._num_prefixes_P = np.zeros(num_pages, dtype=np.int32)
        self._num_reclaimable = 0
        self._fill_with_nan(self._stack_P)

    @property
    def num_free(self) -> int:
        """Pages that nobody holds."""
        return self._num_free

    @property
    def num_held(self) -> int:
        """Pages that somebody holds, each counted once."""
        return self.num_pages - self._num_free

    @property
    def num_reclaimable(self) -> int:
        """Held pages that only cached prefixes hold."""
        return self._num_reclaimable

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, key and value together, with their scales."""
        return self.page_size * self._entry_bytes

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy the contents of pages to others; ids on the device, of one shape."""
        for pages in (self.k_pages_PSD, self.v_pages_PSD):
            for x in kv_pages.tensors_of(pages):
                x[target] = x[source]

    def count_reclaimable(self, page_ids: PageIds) -> int:
        """How many of these (distinct) pages only cached prefixes hold."""
        owners = self._num_owners_P[page_ids]
        return int(((owners > 0) & (owners == self._num_prefixes_P[page_ids])).sum())

    def num_owners(self, page_ids: PageIds) -> np.ndarray:
        """Owners of each page: 0 for a free one."""
        return self._num_owners_P[page_ids]

    def allocate(self, count: int) -> PageIds:
        """Take `count` pages, each with one owner.

        Raises:
            OutOfPages: if fewer are free or reclaimable; nothing has changed then.
        """
        assert count >= 0, f"cannot allocate {count} pages"
        if count > self._num_free + self._num_reclaimable:
            raise OutOfPages(
                f"{count} pages wanted, {self._num_free + self._num_reclaimable} of "
                f"{self.num_pages} free; give the cache more memory (num_pages, "
                "kv_cache_memory_bytes) or run fewer sequences (max_num_seqs)"
            )
        if count > self._num_free:
            assert self.reclaim is not None
            self.reclaim(count - self._num_free)
            assert count <= self._num_free, "reclaimable pages did not come back"
        page_ids = self._stack_P[self._num_free - count : self._num_free][::-1].copy()
        self._num_free -= count
        self._num_owners_P[page_ids] = 1
        return page_ids

    def share(self, page_ids: PageIds, *, by_prefix: bool) -> None:
        """One more owner for each of these held, distinct pages: a cached prefix or a request."""
        self._check(page_ids, "share")
        self._num_reclaimable -= self.count_reclaimable(page_ids)
        self._num_owners_P[page_ids] += 1
        if by_prefix:
            self._num_prefixes_P[page_ids] += 1
        self._num_reclaimable += self.count_reclaimable(page_ids)

    def give_to_prefix(self, page_ids: PageIds) -> None:
        """The one owner of these pages is from now on a cached prefix."""
        self._check(page_ids, "give_to_prefix")
        assert bool((self._num_owners_P[page_ids] == 1).all()), "a shared page changes hands"
        self._num_prefixes_P[page_ids] = 1
        self._num_reclaimable += page_ids.size

    def free(self, page_ids: PageIds, *, by_prefix: bool = False) -> None:
        """One owner less for each of these pages. Order and shape do not matter.

        Raises:
            AssertionError: if a page is not held, or named twice; nothing has changed then.
        """
        page_ids = np.asarray(page_ids, dtype=np.int64).reshape(-1)
        if page_ids.size == 0:
            return
        self._check(page_ids, "free")
        self._num_reclaimable -= self.count_reclaimable(page_ids)
        self._num_owners_P[page_ids] -= 1
        if by_prefix:
            self._num_prefixes_P[page_ids] -= 1
        self._num_reclaimable += self.count_reclaimable(page_ids)
        gone = page_ids[self._num_owners_P[page_ids] == 0]
        self._stack_P[self._num_free : self._num_free + gone.size] = gone
        self._num_free += gone.size
        self._fill_with_nan(gone)

    def check_integrity(self) -> None:
        """free + held == total, no page twice.

        Raises:
            AssertionError: if the invariant is broken.
        """
        free = self._stack_P[: self._num_free]
        assert np.unique(free).size == self._num_free, "a page is on the free list twice"
        assert not self._num_owners_P[free].any(), "a free page is also held"
        held = int((self._num_owners_P > 0).sum())
        assert held + self._num_free == self.num_pages, (
            f"{held} held + {self._num_free} free != {self.num_pages} pages"
        )
        assert bool((self._num_prefixes_P >= 0).all()), "a page has a negative number of owners"
        assert bool((self._num_prefixes_P <= self._num_owners_P).all()), "prefixes among the owners"
        assert self._num_reclaimable == self.count_reclaimable(np.arange(self.num_pages))

    def _check(self, page_ids: PageIds, verb: str) -> None:
        in_range = (page_ids >= 0) & (page_ids < self.num_pages)
        assert bool(in_range.all()), f"{verb}: not a page id"
        assert bool(self._num_owners_P[page_ids].all()), (
            f"{verb}: a page is not held (freed twice?)"
        )
        assert np.unique(page_ids).size == page_ids.size, f"{verb}: a page is named twice"

    def _fill_with_nan(self, page_ids: PageIds) -> None:
        if self._poison:
            kv_pages.fill_with_nan(self.k_pages_PSD, page_ids)
            kv_pages.fill_with_nan(self.v_pages_PSD, page_ids)
