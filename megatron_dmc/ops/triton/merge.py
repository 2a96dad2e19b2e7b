"""The merge of keys and values in training, by Triton kernels (`merge_kernels.py`)."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dmc.ops.refusals import MAX_MERGE_WINDOW, gpu_refusal
from megatron_dmc.ops.tensors import dense_channels
from megatron_dmc.ops.triton.launch import INTERPRETED, capability, on_device
from megatron_dmc.ops.triton.merge_kernels import (
    unlimited_backward_kernel,
    unlimited_forward_kernel,
    windowed_backward_kernel,
    windowed_forward_kernel,
)


@dataclass(frozen=True)
class Tiling:
    """The tile sizes of a kernel. Powers of two; `tokens` and `channels` at least 16."""

    tokens: int
    channels: int
    num_warps: int
    num_stages: int


def default_tiling(
    head_dim: int, merge_window: int, *, backward: bool, capability: int = 9
) -> Tiling:
    """The tiling for a shape, chosen by the compiler's registers and spills (docs/performance.md).

    Args:
        capability: major compute capability of the GPU.
    """
    channels = max(16, min(64, triton.next_power_of_2(head_dim)))
    if merge_window == 0:
        # enough bytes in flight to cover the memory's latency; with 4 warps the backward spills
        if backward:
            return Tiling(tokens=32, channels=channels, num_warps=8, num_stages=3)
        return Tiling(tokens=32, channels=channels, num_warps=4, num_stages=5)
    # of these tokens the backward leaves 2 (W - 1) to the neighbours
    if not backward:
        return Tiling(tokens=64, channels=channels, num_warps=4, num_stages=1)
    return Tiling(64, channels if capability >= 9 else min(channels, 32), 8, num_stages=1)


_MIN_SEGMENT = 8
"""Tiles: with shorter segments of unlimited merging, the tiles that are read twice would cost more than 10 %."""
_PROGRAMS = 4 * 132
"""Wanted of unlimited merging: four for each multiprocessor of an H100."""


def segment_tiles(num_tiles: int, num_walks: int) -> int:
    """Tiles of a segment, so that `num_walks` sequences and blocks of channels make enough programs."""
    segments = -(-_PROGRAMS // num_walks)
    return max(-(-num_tiles // segments), min(_MIN_SEGMENT, num_tiles))


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k_TBGD, v_TBGD, alpha_TBG, omega_TBG, merge_window, tiling):
        k, v = dense_channels(k_TBGD), dense_channels(v_TBGD)
        tokens, batch, heads, dim = k.shape
        tiling = tiling or default_tiling(
            dim, merge_window, backward=False, capability=capability(k)
        )
        y_k, y_v = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
        sequences, blocks = batch * heads, triton.cdiv(dim, tiling.channels)
        sizes = (tokens, heads, sequences)
        strides = [s for x in (k, v, alpha_TBG, omega_TBG) for s in x.stride()[:3]]
        constants = dict(
            D=dim, I=tiling.tokens, F=tiling.channels, INTERPRET=INTERPRETED,
            num_warps=tiling.num_warps,
        )  # fmt: skip
        save = any(ctx.needs_input_grad) and not merge_window
        tiles = triton.cdiv(tokens, tiling.tokens)
        kept = (tiles if save else 0, sequences)
        carry = torch.empty((*kept, 2 * dim), dtype=torch.float32, device=k.device)
        carry_z = torch.empty(kept, dtype=torch.float32, device=k.device)
        if merge_window:
            own = tiling.tokens - (merge_window - 1)
            windowed_forward_kernel[blocks, sequences, triton.cdiv(tokens, own)](
                k, v, alpha_TBG, omega_TBG, y_k, y_v, *sizes, *strides, W=merge_window, **constants
            )
        else:
            segment = segment_tiles(tiles, blocks * sequences)
            unlimited_forward_kernel[blocks, sequences, triton.cdiv(tiles, segment)](
                k, v, alpha_TBG, omega_TBG, y_k, y_v, carry, carry_z, *sizes, segment, *strides,
                STAGES=tiling.num_stages, SAVE=save, **constants,
            )  # fmt: skip
        ctx.save_for_backward(k, v, alpha_TBG, omega_TBG, carry, carry_z)
        ctx.merge_window, ctx.tokens = merge_window, tiling.tokens
        return y_k, y_v

    @staticmethod
    @once_differentiable
    def backward(ctx, gy_k, gy_v):
        k, v, alpha, omega, carry, carry_z = ctx.saved_tensors
        tokens, batch, heads, dim = k.shape
        gy_k, gy_v = dense_channels(gy_k), dense_channels(gy_v)
        tiling = default_tiling(dim, ctx.merge_window, backward=True, capability=capability(k))
        g_k, g_v = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
        sequences, blocks = batch * heads, triton.cdiv(dim, tiling.channels)
        parts = torch.empty((2, blocks, *alpha.shape), dtype=torch.float32, device=k.device)
        sizes = (tokens, heads, sequences)
        strides = [s for x in (k, v, alpha, omega, gy_k, gy_v) for s in x.stride()[:3]]
        # the carries stand where the forward's tiles begin
        constants = dict(
            D=dim, I=ctx.tokens, F=tiling.channels, INTERPRET=INTERPRETED,
            num_warps=tiling.num_warps,
        )  # fmt: skip
        if ctx.merge_window:
            own = ctx.tokens - 2 * (ctx.merge_window - 1)
            windowed_backward_kernel[blocks, sequences, triton.cdiv(tokens, own)](
                k, v, alpha, omega, gy_k, gy_v, g_k, g_v, *parts, *sizes, *strides,
                W=ctx.merge_window, **constants,
            )  # fmt: skip
        else:
            tiles = triton.cdiv(tokens, ctx.tokens)
            segment = segment_tiles(tiles, blocks * sequences)
            unlimited_backward_kernel[blocks, sequences, triton.cdiv(tiles, segment)](
                k, v, alpha, omega, gy_k, gy_v, carry, carry_z, g_k, g_v, *parts, *sizes, segment,
                *strides, STAGES=tiling.num_stages, **constants,
            )  # fmt: skip
        galpha, gomega = parts.sum(1) if blocks > 1 else parts[:, 0]
        return g_k, g_v, galpha.to(alpha.dtype), gomega.to(omega.dtype), None, None


def refusal(k_TBGD: Tensor, v_TBGD: Tensor, merge_window: int) -> str:
    """See `ops.backends`."""
    if not (k_TBGD.is_cuda or INTERPRETED):
        return "only tensors on a GPU"
    if k_TBGD.shape != v_TBGD.shape or k_TBGD.dtype != v_TBGD.dtype:
        return "keys and values of different shapes or dtypes"
    if MAX_MERGE_WINDOW < merge_window < k_TBGD.shape[0]:
        return f"merge_window={merge_window}, more than {MAX_MERGE_WINDOW} and less than T"
    return gpu_refusal(k_TBGD, (torch.float32, torch.bfloat16, torch.float16))


def merge(
    k_TBGD: Tensor,
    v_TBGD: Tensor,
    alpha_TBG: Tensor,
    omega_TBG: Tensor,
    *,
    merge_window: int = 0,
    tiling: Tiling | None = None,
) -> tuple[Tensor, Tensor]:
    """`megatron_dmc.ops.training.merge` for CUDA tensors, by the kernels of `merge_kernels.py`.

    Args:
        k_TBGD, v_TBGD: float32, bfloat16 or float16, equal in shape and dtype, any strides. Copied
            only where the channels do not lie side by side.
        alpha_TBG, omega_TBG: any floating dtype and strides; computed with in float32.
        merge_window: W, at most `MAX_MERGE_WINDOW` or at least T; 0 is unlimited.
        tiling: for benchmarks; default `default_tiling`.

    Returns:
        merged keys and values, contiguous, in the inputs' dtype. Differentiable once in all tensors.
        For the backward the inputs are kept and, for unlimited merging, one float32 row per tile.
    """
    assert not refusal(k_TBGD, v_TBGD, merge_window)
    if k_TBGD.numel() == 0:
        return k_TBGD.clone(), v_TBGD.clone()
    if merge_window >= k_TBGD.shape[0]:
        merge_window = 0  # a window over the whole sequence is none
    with on_device(k_TBGD):
        return _Merge.apply(k_TBGD, v_TBGD, alpha_TBG, omega_TBG, merge_window, tiling)
