"""Free pages and their reference counts on the device: allocated and released without the host.

`FreePages` is a stack. Ids at index `state[0]` and following are free; allocating moves the index up,
releasing moves it down and writes the ids there. Both are stream-ordered: a release never runs concurrently
with an append. A page has one owner while it is held, and `num_extra_owners_P` counts those beyond the first,
so allocating a page does not touch it.

Dimension letters: P pages, S slots per page, H heads of any kind (any number of dimensions), M
block-table width, X, Y any.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dmc.errors import OutOfPages
from megatron_dmc.ops.backends import PAGES


@dataclass(frozen=True)
class FreePages:
    """A stack of free pages, used without the host.

    Attributes:
        page_ids: int32, one dimension; taken in order. Those at index `state[0]` and following are free.
        state: int32 (2,): how many are taken (asked for beyond `page_ids` if they ran out), and 1 once
            a head found none. Such a head is left as it was: the token is not in its cache.
    """

    page_ids: Tensor
    state: Tensor

    @classmethod
    def of(cls, page_ids: Tensor) -> "FreePages":
        """A stack of these pages, all free."""
        page_ids = page_ids.to(torch.int32).contiguous()
        return cls(page_ids, torch.zeros(2, dtype=torch.int32, device=page_ids.device))

    def taken(self) -> int:
        """Number of allocated pages; waits for the device.

        Raises:
            OutOfPages: if a head found none. The step must be repeated.
        """
        asked, ran_out = self.state.tolist()
        if ran_out:
            raise OutOfPages(
                f"{asked} pages wanted by decoding, {self.page_ids.numel()} free; give the cache "
                "more memory (num_pages, kv_cache_memory_bytes) or run fewer sequences (max_num_seqs)"
            )
        return asked


def take_where(wants_X: Tensor, free_pages: FreePages) -> Tensor:
    """A page for every place that wants one. Mutates `free_pages.state`.

    Args:
        wants_X: bool, any shape.

    Returns:
        page ids in the shape of `wants_X`, int32; -1 where none is wanted or the pages have run out, which
        sets `free_pages.state[1]`. Earlier places are served first.
    """
    num_pages = free_pages.page_ids.numel()
    wants = wants_X.flatten()
    index = free_pages.state[0] + wants.cumsum(0) - 1
    got = wants & (index < num_pages)
    page_ids = free_pages.page_ids[index.clamp(0, num_pages - 1)]
    free_pages.state[0] += wants.sum()
    free_pages.state[1] |= (wants & ~got).any()
    return torch.where(got, page_ids, -1).view(wants_X.shape)


def take_for_entries(
    block_table_HM: Tensor, num_entries_H: Tensor, page_size: int, free_pages: FreePages
) -> None:
    """A page for every column that holds entries and lacks one. Mutates `block_table_HM` and
    `free_pages.state`.

    Args:
        block_table_HM: int32, -1 where there is no page.
        num_entries_H: entries that each head will have.
    """
    first_M = torch.arange(block_table_HM.shape[-1], device=block_table_HM.device) * page_size
    wants_HM = (first_M < num_entries_H[..., None]) & (block_table_HM < 0)
    taken_HM = take_where(wants_HM, free_pages)
    block_table_HM.copy_(torch.where(wants_HM, taken_HM, block_table_HM))


def add_owner(page_ids: Tensor, num_extra_owners_P: Tensor) -> None:
    """One more owner for each of these held pages, -1 for none. Mutates `num_extra_owners_P`."""
    ids = page_ids.flatten()
    num_extra_owners_P.index_add_(0, ids.clamp_min(0), (ids >= 0).to(num_extra_owners_P.dtype))


def release_pages(
    page_ids_XY: Tensor,
    free_pages: FreePages,
    num_extra_owners_P: Tensor,
    *,
    backend: str | None = None,
) -> None:
    """One owner less for each of these pages; those without owners are free again.

    Mutates `page_ids_XY` (to -1), `free_pages` and `num_extra_owners_P`.

    Args:
        page_ids_XY: int32, the last dimension dense, such as the block tables (layers, heads x columns)
            of a request; -1 for none. A page may be named as often as it has owners.
        backend: of `ops.backends.PAGES`; None: the first that can.
    """
    chosen = PAGES.choose(page_ids_XY, backend=backend)
    if chosen != "torch":
        PAGES.kernels(chosen).release_pages(
            page_ids_XY, free_pages.page_ids, free_pages.state, num_extra_owners_P
        )
        return
    stack_P, state = free_pages.page_ids, free_pages.state
    num_pages = stack_P.numel()
    ids = page_ids_XY.flatten()
    times_P = torch.zeros_like(num_extra_owners_P)
    times_P.index_add_(0, ids.clamp_min(0), (ids >= 0).to(times_P.dtype))
    is_gone_P = times_P > num_extra_owners_P
    num_extra_owners_P.sub_(times_P).clamp_min_(0)
    state[0] -= is_gone_P.sum()
    # ids that are gone go to [taken, taken + gone) of the stack, the others to a place behind it
    to_P = torch.where(is_gone_P, state[0] + is_gone_P.cumsum(0) - 1, num_pages)
    longer = torch.cat([stack_P, stack_P.new_zeros(1)])
    longer[to_P] = torch.arange(num_pages, dtype=stack_P.dtype, device=stack_P.device)
    stack_P.copy_(longer[:-1])
    page_ids_XY.fill_(-1)
