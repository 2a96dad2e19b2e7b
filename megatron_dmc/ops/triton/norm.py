"""RMSNorm on GPUs, a back end of `ops.backends.NORM`; also with the sum before it, where a product's result has to be
added up over ranks first.

A row is one program, which holds it in registers. Dimension letters: M rows, C channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dmc.ops.tensors import dense_channels
from megatron_dmc.ops.triton.launch import gpu_only, on_device

MAX_CHANNELS = 1 << 15
"""Of a row; more would not fit into the registers of 16 warps."""


@triton.jit
def rms_norm_kernel(
    p_x, p_added, p_weight, p_out, C, s_x, s_added, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row."""
    i_m = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    p_x += i_m * s_x
    b_x = tl.load(p_x + o_c, mask=m_c, other=0.0).to(tl.float32)
    if ADDS:
        b_x += tl.load(p_added + i_m * s_added + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_sum = b_x.to(p_x.dtype.element_ty)
        tl.store(p_x + o_c, b_sum, mask=m_c)
        b_x = b_sum.to(tl.float32)
    scale = tl.rsqrt(tl.sum(b_x * b_x, axis=0) / C + eps)
    b_weight = tl.load(p_weight + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_out = b_x * scale * b_weight
    tl.store(p_out + i_m * C + o_c, b_out.to(p_out.dtype.element_ty), mask=m_c)


def refusal(weight_C: Tensor) -> str:
    """The reason why the kernel does not take this weight; "" if it does."""
    if len(weight_C) > MAX_CHANNELS:
        return f"{len(weight_C)} channels, more than {MAX_CHANNELS}"
    return gpu_only(weight_C)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension: computed in float32, rounded once.

    Args:
        x: (..., C); weight: (C); the same dtype.

    Returns:
        (..., C), contiguous.
    """
    rows = dense_channels(x.reshape(-1, x.shape[-1]))
    return _launch(rows, None, weight, eps).view(x.shape)


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x += added, then RMSNorm of x, in one launch. The sum is rounded before it is normalised, so the result
    is that of the two operations.

    Args:
        x: (M, C), dense rows, mutated; added: (M, C); weight: (C); the same dtype.

    Returns:
        (M, C), contiguous.
    """
    assert x.stride(-1) == 1
    return _launch(x, dense_channels(added), weight, eps)


def _launch(x_MC: Tensor, added_MC: Tensor | None, weight_C: Tensor, eps: float) -> Tensor:
    num_rows, channels = x_MC.shape
    out = torch.empty(x_MC.shape, dtype=x_MC.dtype, device=x_MC.device)
    block = triton.next_power_of_2(channels)
    with on_device(out):
        if num_rows:
            rms_norm_kernel[(num_rows,)](
                x_MC, added_MC, weight_C, out, channels, x_MC.stride(0),
                0 if added_MC is None else added_MC.stride(0), eps,
                ADDS=added_MC is not None, BLOCK=block, num_warps=warps(block),
            )  # fmt: skip
    return out


def warps(block: int) -> int:
    """Warps of a row: 16 channels a thread, which are two loads of 16 bytes each in half precision."""
    return min(max(block // 512, 1), 16)
