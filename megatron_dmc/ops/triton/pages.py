"""The Triton kernel that gives pages back, a back end of `ops.backends.PAGES`.

Local letters: X rows of page ids, Y ids of a row.
"""

import triton
import triton.language as tl
from torch import Tensor

from megatron_dmc.ops.triton.launch import INTERPRETED, on_device

BLOCK = 256


@triton.jit
def release_kernel(p_ids, p_free, p_free_state, p_extra, Y, s_x, BLOCK: tl.constexpr):
    """One owner less for each of a block's pages, and those without owners onto the stack."""
    i_x, i_y = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_y = i_y * BLOCK + tl.arange(0, BLOCK)
    p_id = p_ids + i_x * s_x + o_y
    # [BLOCK]
    b_id = tl.load(p_id, mask=o_y < Y, other=-1)
    m_held = b_id >= 0
    tl.store(p_id, -1, mask=m_held)
    b_others = tl.atomic_add(p_extra + b_id, -1, mask=m_held)
    m_gone = m_held & (b_others == 0)
    tl.store(p_extra + b_id, 0, mask=m_gone)
    b_count = m_gone.to(tl.int32)
    num_gone = tl.sum(b_count)
    first = tl.atomic_add(p_free_state, -num_gone) - num_gone
    tl.store(p_free + first + tl.cumsum(b_count) - b_count, b_id, mask=m_gone)


def refusal(page_ids_XY: Tensor) -> str:
    """See `ops.backends`."""
    return "" if page_ids_XY.is_cuda or INTERPRETED else "only tensors on a GPU"


def release_pages(
    page_ids_XY: Tensor, free_page_ids: Tensor, free_state: Tensor, num_extra_owners_P: Tensor
) -> None:
    """The host side of `release_kernel`."""
    num_rows, length = page_ids_XY.shape
    if page_ids_XY.numel() == 0:
        return
    with on_device(page_ids_XY):
        release_kernel[num_rows, triton.cdiv(length, BLOCK)](
            page_ids_XY, free_page_ids, free_state, num_extra_owners_P, length,
            page_ids_XY.stride(0), BLOCK=BLOCK,
        )  # fmt: skip
