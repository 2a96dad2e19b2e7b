"""One layer's part of a paged cache: the Python twin of `PagedKV` in csrc/include/dmc/paged_kv.h.

Entry e of a head lies in page `block_table[e // S]`, slot `e % S`. Slots that hold no entry are never used, even
if they are NaN. Dimension letters: docs/architecture.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dmc.ops.paged import kv_pages
from megatron_dmc.ops.paged import pages as page_ops
from megatron_dmc.ops.paged.kv_pages import Pages
from megatron_dmc.ops.paged.pages import FreePages
from megatron_dmc.ops.tensors import accumulator_dtype

Rows = int | slice | Tensor
"""One row of the cache, a range of rows, or int64 (B,)."""


@dataclass(frozen=True)
class DelayedDecisions:
    """The decisions about the tokens in the rings; undefined where no token lies or none is made yet.
    docs/method.md, sections 8 and 9.

    Attributes:
        is_merge_XGW: bool: the slot's token merges when it leaves the ring, or is evicted (DMS).
        omega_XGW: importances, float32 (float64). None: tokens are evicted, by what the token after each says.
    """

    is_merge_XGW: Tensor
    omega_XGW: Tensor | None

    @property
    def delay(self) -> int:
        """W, the number of slots of a ring: the merge delay; one more than the eviction delay."""
        return self.is_merge_XGW.shape[-1]

    def __getitem__(self, index) -> "DelayedDecisions":
        omega = self.omega_XGW
        return DelayedDecisions(self.is_merge_XGW[index], None if omega is None else omega[index])

    def clone(self, acc: torch.dtype) -> "DelayedDecisions":
        """A copy with importances in `acc`."""
        omega = self.omega_XGW
        return DelayedDecisions(
            self.is_merge_XGW.clone(), None if omega is None else omega.to(acc, copy=True)
        )


@dataclass(frozen=True)
class LayerCache:
    """The storage that the ops of one layer read and mutate. Holds references: nothing is copied.

    Attributes:
        k_pages_PSD, v_pages_PSD: the pool of all layers and heads: tensors in the model's dtype, or
            `kv_pages.ScaledPages` (8 bits with scales).
        block_table_RGM: int32 page ids; -1: no page.
        num_entries_RG: int64.
        segments_RGUA: open segments, `[omega k, omega v, omega]` of the kept tokens; float32, or float64 for a
            float64 model. None: the layer's tokens never merge.
        free_pages: what the ops take pages from. None: the block table must hold the page of every entry that
            is written.
        delayed: decisions (R, G, W) about the tokens in the rings; None: they take effect at once. A head's first
            W slots then are its ring, token t in slot t % W, and its entries follow; `num_entries_RG` counts both.
    """

    k_pages_PSD: Pages
    v_pages_PSD: Pages
    block_table_RGM: Tensor
    num_entries_RG: Tensor
    segments_RGUA: Tensor | None = None
    free_pages: FreePages | None = None
    delayed: DelayedDecisions | None = None

    @property
    def delay(self) -> int:
        """W; 0: decisions take effect at once."""
        return 0 if self.delayed is None else self.delayed.delay

    @property
    def evicts(self) -> bool:
        """Tokens leave the rings for entries or are evicted (DMS); they never merge."""
        return self.delayed is not None and self.delayed.omega_XGW is None

    @property
    def page_size(self) -> int:
        """S."""
        return self.k_pages_PSD.shape[1]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.k_pages_PSD.shape[2]

    @property
    def num_kv_heads(self) -> int:
        """G."""
        return self.num_entries_RG.shape[-1]

    @property
    def is_scaled(self) -> bool:
        """True for pages of 8 bits."""
        return not isinstance(self.k_pages_PSD, Tensor)

    def slots(self, rows: Rows, entries_XGE: Tensor) -> Tensor:
        """Physical slots `page_id * S + offset` of entries, int64; -1 where the page is not allocated.

        Args:
            rows: whose leading dimensions, if any, are those of `entries_XGE`.
        """
        column_XGE = entries_XGE // self.page_size
        if isinstance(rows, Tensor):  # without a copy of the rows' tables
            heads_G1 = torch.arange(self.num_kv_heads, device=rows.device)[:, None]
            page_id = self.block_table_RGM[rows[:, None, None], heads_G1, column_XGE].long()
        else:
            page_id = self.block_table_RGM[rows].gather(-1, column_XGE).long()
        slot = page_id * self.page_size + entries_XGE % self.page_size
        return torch.where(page_id < 0, -1, slot)

    def store(self, slots_X: Tensor, k_XD: Tensor, v_XD: Tensor) -> None:
        """Write entries to their slots; slot -1 is not written. Mutates the pages. Does not wait for the device."""
        rows_X = _written_rows(slots_X)
        for pages, x in ((self.k_pages_PSD, k_XD), (self.v_pages_PSD, v_XD)):
            kv_pages.store(pages, slots_X[rows_X], x[rows_X])

    def copy_slots(self, from_X: Tensor, to_X: Tensor) -> None:
        """Copy entries as they are stored; where `to_X` is -1 nothing is written. Mutates the pages. Does not wait
        for the device."""
        rows_X = _written_rows(to_X)
        to_X = to_X[rows_X]
        from_X = torch.where(to_X < 0, to_X, from_X[rows_X])
        for pages in (self.k_pages_PSD, self.v_pages_PSD):
            for x in kv_pages.tensors_of(pages):
                slots = x.flatten(0, 1)
                slots[to_X] = slots[from_X]

    def load_slots(self, slots_X: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The keys and values in slots, (X, D) each; the inverse of `store`."""
        return (
            kv_pages.load_slots(self.k_pages_PSD, slots_X, dtype),
            kv_pages.load_slots(self.v_pages_PSD, slots_X, dtype),
        )

    def load(
        self, rows: Rows, dtype: torch.dtype, num_entries_XG: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Every head's entries, padded to those of the longest head.

        Args:
            num_entries_XG: first entries that are wanted; None: all.

        Returns:
            k_XGED, v_XGED in `dtype` (zero beyond a head's entries) and is_entry_XGE. One row has no X.
        """
        if num_entries_XG is None:
            num_entries_XG = self.num_entries_RG[rows]
        longest = int(num_entries_XG.max()) if num_entries_XG.numel() else 0
        num_pages = -(-longest // self.page_size)
        pages = self.block_table_RGM[rows][..., :num_pages].long().clamp_min(0)
        is_entry = torch.arange(longest, device=pages.device) < num_entries_XG[..., None]
        k, v = (
            kv_pages.load(x, pages, dtype)
            .flatten(-3, -2)[..., :longest, :]
            .masked_fill(~is_entry[..., None], 0.0)
            for x in (self.k_pages_PSD, self.v_pages_PSD)
        )
        return k, v, is_entry

    def take_pages(self, rows: Rows, num_entries_XG: Tensor) -> None:
        """A page for every column that will hold entries and lacks one. Mutates `block_table_RGM` and
        `free_pages.state`; without `free_pages` nothing.

        Args:
            num_entries_XG: entries that each head will have.
        """
        if self.free_pages is None:
            return
        table_XGM = self.block_table_RGM[rows]
        page_ops.take_for_entries(table_XGM, num_entries_XG, self.page_size, self.free_pages)
        self.block_table_RGM[rows] = table_XGM

    def poison(self, page_ids: Tensor | slice = slice(None)) -> None:
        """Make reading any entry of these pages yield NaN."""
        kv_pages.fill_with_nan(self.k_pages_PSD, page_ids)
        kv_pages.fill_with_nan(self.v_pages_PSD, page_ids)

    def is_poisoned(self) -> Tensor:
        """Slots whose key is NaN, bool (P, S)."""
        keys = self.k_pages_PSD
        return keys.isnan().any(-1) if isinstance(keys, Tensor) else keys.scales_PS.isnan()

    def of_rows(self, rows: slice) -> "LayerCache":
        """A view of some rows over the same pool."""
        return LayerCache(
            self.k_pages_PSD,
            self.v_pages_PSD,
            self.block_table_RGM[rows],
            self.num_entries_RG[rows],
            None if self.segments_RGUA is None else self.segments_RGUA[rows],
            self.free_pages,
            None if self.delayed is None else self.delayed[rows],
        )

    def clone(self, dtype: torch.dtype) -> "LayerCache":
        """A copy with keys and values in another dtype, and segments in its accumulator's. Entries of
        8 bits are kept as they are; in float64 they are widened."""
        free, segments, delayed = self.free_pages, self.segments_RGUA, self.delayed
        acc = accumulator_dtype(dtype)
        return LayerCache(
            _clone(self.k_pages_PSD, dtype),
            _clone(self.v_pages_PSD, dtype),
            self.block_table_RGM.clone(),
            self.num_entries_RG.clone(),
            None if segments is None else segments.to(acc, copy=True),
            None if free is None else FreePages(free.page_ids.clone(), free.state.clone()),
            None if delayed is None else delayed.clone(acc),
        )


def _written_rows(slots_X: Tensor) -> Tensor:
    """For each row itself, or for slot -1 another row, whose write it can repeat; without one, itself. No shape
    depends on values, so that no host waits."""
    if slots_X.numel() == 0:
        return slots_X
    rows_X = torch.arange(slots_X.numel(), device=slots_X.device)
    return torch.where(slots_X < 0, slots_X.argmax(), rows_X)


def _clone(pages: Pages, dtype: torch.dtype) -> Pages:
    if isinstance(pages, Tensor):
        return pages.to(dtype, copy=True)
    if dtype == torch.float64:
        return kv_pages.dequantise(pages.values_PSD, pages.scales_PS, dtype)
    return kv_pages.ScaledPages(pages.values_PSD.clone(), pages.scales_PS.clone())
