"""One pool of pages for all layers and heads.

Dimension letters: P pages, S slots per page, D head dim.
"""

import torch
from torch import Tensor

from megatron_dmc.ops.paged import kv_pages
from megatron_dmc.ops.paged import pages as page_ops
from megatron_dmc.ops.paged.pages import FreePages


class PagePool:
    """Storage of keys and values, the stack of free pages, and how many owners the others have. All of it
    is on the device; a method that waits for it says so.

    A page is S slots of one KV head of one layer. It is free, or it has owners: heads of running
    requests, and cached prefixes. Several owners may hold a page; it is free again when the last one
    releases it. The caller decides who may take how many (`PageCounts`).

    Attributes:
        k_pages_PSD, v_pages_PSD: the storage: tensors, or `ScaledPages` where `dtype` is an 8-bit one.
        num_pages, page_size: P, S.
        free_pages: what appending takes pages from.
        num_extra_owners_P: int32, owners beyond the first.
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
        self.free_pages = FreePages.of(torch.arange(num_pages, device=device))
        self.num_extra_owners_P = torch.zeros(num_pages, dtype=torch.int32, device=device)
        self._poison = poison
        self._fill_with_nan(self.free_pages.page_ids)

    @property
    def num_free(self) -> int:
        """Pages without an owner. Waits for the device."""
        return self.num_pages - self.num_held

    @property
    def num_held(self) -> int:
        """Pages with an owner, each counted once. Waits for the device."""
        return int(self.free_pages.state[0])

    @property
    def head_dim(self) -> int:
        """D."""
        return self.k_pages_PSD.shape[2]

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, key and value together, with their scales."""
        return self.page_size * self._entry_bytes

    def take(self, count: int) -> Tensor:
        """Take `count` pages, each with one owner: int32. The caller knows that they are free."""
        wants = torch.ones(count, dtype=torch.bool, device=self.free_pages.page_ids.device)
        return page_ops.take_where(wants, self.free_pages)

    def add_owner(self, page_ids: Tensor) -> None:
        """One more owner for each of these held pages (-1: none)."""
        page_ops.add_owner(page_ids, self.num_extra_owners_P)

    def release(self, page_ids: Tensor) -> None:
        """One owner less for each of these pages (-1: none). Sets `page_ids` to -1."""
        before = self.num_held if self._poison else 0
        page_ops.release_pages(page_ids, self.free_pages, self.num_extra_owners_P)
        if self._poison:
            self._fill_with_nan(self.free_pages.page_ids[self.num_held : before])

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy the contents of pages to others; ids on the device, of one shape."""
        source, target = source.long(), target.long()
        for pages in (self.k_pages_PSD, self.v_pages_PSD):
            for x in kv_pages.tensors_of(pages):
                x[target] = x[source]

    def check_integrity(self, named: Tensor | None = None) -> None:
        """free + held == total, no page is on the stack twice, and every request for a page was met. Waits.

        Args:
            named: page ids that owners name, one for each owner (-1: none). If given, every page has
                exactly these owners.

        Raises:
            AssertionError: if the invariant is broken.
        """
        taken, failed = self.free_pages.state.tolist()
        assert not failed, "a head found no page"
        assert 0 <= taken <= self.num_pages, f"{taken} of {self.num_pages} pages are taken"
        free = self.free_pages.page_ids[taken:].long()
        assert free.unique().numel() == free.numel(), "a page is on the free stack twice"
        assert bool((self.num_extra_owners_P >= 0).all()), "negative number of owners"
        assert not self.num_extra_owners_P[free].any(), "a free page has owners"
        if named is None:
            return
        is_held = torch.ones(self.num_pages, dtype=torch.bool, device=free.device)
        is_held[free] = False
        owners = torch.bincount(named[named >= 0].long(), minlength=self.num_pages)
        counted = torch.where(is_held, self.num_extra_owners_P + 1, 0)
        assert torch.equal(owners, counted.to(owners.dtype)), (
            "block tables, cached prefixes and the pool disagree on who holds a page"
        )

    def _fill_with_nan(self, page_ids: Tensor) -> None:
        if self._poison:
            kv_pages.fill_with_nan(self.k_pages_PSD, page_ids)
            kv_pages.fill_with_nan(self.v_pages_PSD, page_ids)
