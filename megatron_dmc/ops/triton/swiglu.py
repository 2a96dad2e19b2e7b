"""The gate of an MLP on GPUs, a back end of `ops.backends.SWIGLU`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dmc.ops.triton.launch import gpu_only, on_device

BLOCK = 1024
"""Channels of a program."""


@triton.jit
def swiglu_kernel(p_x, p_out, C, s_x, BLOCK: tl.constexpr):
    """A block of one row."""
    i_m = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < C
    p_x += i_m * s_x
    b_gate = tl.load(p_x + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_up = tl.load(p_x + C + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_out = b_gate / (1.0 + tl.exp(-b_gate)) * b_up
    tl.store(p_out + i_m * C + o_c, b_out.to(p_out.dtype.element_ty), mask=m_c)


def refusal(weight: Tensor) -> str:
    """The reason why the kernel does not take products of this weight (2 C, inputs); "" if it does."""
    return gpu_only(weight)


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up: computed in float32, rounded once, where Megatron's MLP rounds silu(gate) too.

    Args:
        x: [gate, up], (M, 2 C), dense rows.

    Returns:
        (M, C), contiguous.
    """
    num_rows, channels = x.shape[0], x.shape[1] // 2
    out = torch.empty(num_rows, channels, dtype=x.dtype, device=x.device)
    with on_device(out):
        if num_rows:
            swiglu_kernel[(num_rows, triton.cdiv(channels, BLOCK))](
                x, out, channels, x.stride(0), BLOCK=BLOCK, num_warps=4
            )
    return out
