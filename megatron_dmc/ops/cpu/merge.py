"""The merge of keys and values in training on CPUs, a back end of `ops.backends.MERGE`."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_dmc.ops.cpu import DIM_STEP, operators, tensor_refusal
from megatron_dmc.ops.tensors import dense_channels


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k_TBGD, v_TBGD, alpha_TBG, omega_TBG, merge_window):
        k, v = dense_channels(k_TBGD), dense_channels(v_TBGD)
        gates = [x.to(torch.float32).contiguous() for x in (alpha_TBG, omega_TBG)]
        outs = [torch.empty(k.shape, dtype=k.dtype) for _ in range(2)]
        operators().merge.default(k, v, *gates, *outs, merge_window)
        ctx.save_for_backward(k, v, *gates)
        ctx.merge_window, ctx.gate_dtypes = merge_window, (alpha_TBG.dtype, omega_TBG.dtype)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx, k_grad, v_grad):
        k, v, *gates = ctx.saved_tensors
        merged = [dense_channels(x) for x in (k_grad, v_grad)]
        grads = [torch.empty(k.shape, dtype=k.dtype) for _ in range(2)]
        of_gates = [torch.empty_like(x) for x in gates]
        operators().merge_backward.default(
            k, v, *gates, *merged, *grads, *of_gates, ctx.merge_window
        )
        of_gates = [x.to(dtype) for x, dtype in zip(of_gates, ctx.gate_dtypes, strict=True)]
        return *grads, *of_gates, None


def refusal(k_TBGD: Tensor, v_TBGD: Tensor, merge_window: int) -> str:
    """See `ops.backends`."""
    if reason := tensor_refusal(k_TBGD):
        return reason
    if k_TBGD.shape != v_TBGD.shape or k_TBGD.dtype != v_TBGD.dtype:
        return "keys and values of different shapes or dtypes"
    if k_TBGD.shape[-1] % DIM_STEP:
        return f"head_dim={k_TBGD.shape[-1]}; the kernels take multiples of {DIM_STEP}"
    return ""


def merge(
    k_TBGD: Tensor,
    v_TBGD: Tensor,
    alpha_TBG: Tensor,
    omega_TBG: Tensor,
    *,
    merge_window: int = 0,
) -> tuple[Tensor, Tensor]:
    """`megatron_dmc.ops.training.merge` on a CPU: one walk over the tokens for each sequence and KV head.

    Args:
        k_TBGD, v_TBGD: float32 or bfloat16, equal in shape and dtype, any strides. Copied only where the
            channels do not lie side by side. D is a multiple of `DIM_STEP`.
        alpha_TBG, omega_TBG: any floating dtype and strides; computed with in float32.
        merge_window: W; 0 is unlimited.

    Returns:
        merged keys and values, contiguous, in the inputs' dtype. Differentiable once in all tensors. For the
        backward the inputs are kept.
    """
    assert not refusal(k_TBGD, v_TBGD, merge_window)
    if merge_window >= k_TBGD.shape[0]:
        merge_window = 0  # a window over the whole sequence is none
    merged: tuple[Tensor, Tensor] = _Merge.apply(k_TBGD, v_TBGD, alpha_TBG, omega_TBG, merge_window)
    return merged
