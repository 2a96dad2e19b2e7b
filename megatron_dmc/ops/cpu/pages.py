"""The CPU kernel that gives pages back, a back end of `ops.backends.PAGES`."""

from torch import Tensor

from megatron_dmc.ops import cpu


def refusal(page_ids_XY: Tensor) -> str:
    """See `ops.backends`."""
    return cpu.absence() or ("" if page_ids_XY.device.type == "cpu" else "only tensors on the CPU")


def release_pages(
    page_ids_XY: Tensor, free_page_ids: Tensor, free_state: Tensor, num_extra_owners_P: Tensor
) -> None:
    """As `megatron_dmc.ops.triton.pages.release_pages`."""
    cpu.operators().release_pages.default(
        page_ids_XY, free_page_ids, free_state, num_extra_owners_P
    )
