"""Attention to compressed keys on a stock flash kernel: DMC, with or without a merge delay, and eviction.
docs/method.md, sections 3, 8 and 9.

A far key's bias depends on the key alone. It travels in the borrowed channel, so that the far part, a causal mask over
keys some tokens later, is a call of a stock kernel. The other keys of a query, raw or open, are joined to it by
log-sum-exp (`ops.training.near`), and the kernel's backward runs with the joined output and log-sum-exp: its
probabilities are then the right ones, and the gradient of the keys' borrowed channel is the bias's.
"""

import math

import torch
from torch import Tensor

from megatron_dmc.ops import gates
from megatron_dmc.ops.backends import NEAR
from megatron_dmc.ops.tensors import accumulator_dtype
from megatron_dmc.ops.training import near as in_pytorch
from megatron_dmc.ops.training.flash import Kernel
from megatron_dmc.ops.training.near import KeyValue, join_by_lse

MASKED = -1.0e4
"""Stands for log(0) inside the kernel: exp of it is 0 in every dtype, and no NaN can arise."""


def bias_unit(scale: float) -> float:
    """The value of the queries' borrowed channel: 1 / scale as a power of two, exact in every dtype."""
    return 2.0 ** round(-math.log2(scale))


def far_parts(num_queries: int, num_keys: int, apart: int) -> list[tuple[slice, slice, bool]]:
    """The pairs i - j >= apart as kernel calls: (queries, keys, causal), for queries of the last tokens.

    Two calls have the same queries.
    """
    if num_keys <= apart:
        return []
    past = num_keys - num_queries
    earliest = max(past, apart)  # the first query with a far key
    parts = [(slice(earliest - past, None), slice(earliest - apart, num_keys - apart), True)]
    if past > apart:
        parts.append((slice(None), slice(0, past - apart), False))
    return parts


class CompressedAttention(torch.autograd.Function):
    """All tensors (B, heads, T, D); queries are those of the last tokens.

    Args:
        near_k, near_v: raw keys and values; None exactly if n is 0.
        merged_k, merged_v: each token's state; None where tokens are evicted: the far keys are the raw ones.
        log_keep_BGT: `log_keep[t] = log(1 - alpha_t)`; key j carries that of token j + 1.
        n: raw tokens that a query sees.
        kernel: runs the far part.
    """

    @staticmethod
    def forward(ctx, q, near_k, near_v, merged_k, merged_v, log_keep_BGT, n, scale, kernel: Kernel):
        near = None if near_k is None else KeyValue(near_k, near_v)
        opened = None if merged_k is None else KeyValue(merged_k, merged_v)
        out, lse, saved = attend(q, near, opened, log_keep_BGT, n, scale, kernel)
        q, far_k, ctx.parts, ctx.states, ctx.near_state = saved
        ctx.save_for_backward(q, near_k, near_v, far_k, merged_v, out, lse)
        ctx.n, ctx.scale, ctx.kernel = n, scale, kernel
        ctx.clamped = (log_keep_BGT < MASKED) if ctx.needs_input_grad[5] else None
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, near_k, near_v, far_k, merged_v, out, lse = ctx.saved_tensors
        near = None if near_k is None else KeyValue(near_k, near_v)
        opened = None if merged_v is None else KeyValue(far_k, merged_v)
        far_v = near_v if merged_v is None else merged_v
        far_grads, unit = None, ctx.scale * bias_unit(ctx.scale)
        dlog_keep = torch.zeros(far_k.shape[:3], dtype=lse.dtype, device=q.device)
        for (rows, keys, causal), state in zip(ctx.parts, ctx.states, strict=True):
            g, o = grad_out[:, :, rows], out[:, :, rows]
            if not g.is_cuda or g.stride() != o.stride():  # the layout that the kernels prefer
                g, o = g.contiguous(), o.contiguous()
            dq, dk, dv = ctx.kernel.backward(
                g, q[:, :, rows], far_k[:, :, keys], far_v[:, :, keys], o,
                lse[:, :, rows].contiguous(), state, ctx.scale, causal,
            )  # fmt: skip
            # their score held scale * unit * k[d], the bias
            dlog_keep[..., keys.start + 1 : keys.stop + 1] = gates.borrowed(dk) / unit
            if far_grads is not None:  # the keys before the first part's
                dq, dk, dv = (
                    far_grads[0] + dq, torch.cat([dk, far_grads[1]], 2), torch.cat([dv, far_grads[2]], 2),
                )  # fmt: skip
            far_grads = dq, dk, dv
        dq, d_near, d_merged = _near(q, ctx.n).add_gradients(
            grad_out, q, out, lse, near, opened, far_grads, ctx.n, ctx.scale, ctx.near_state
        )
        if ctx.clamped is not None:
            dlog_keep = dlog_keep.masked_fill(ctx.clamped, 0.0)
        none = None, None
        return dq, *(d_near or none), *(d_merged or none), dlog_keep, None, None, None


def _near(q: Tensor, n: int):
    chosen = NEAR.choose(q, n)
    return in_pytorch if chosen == "torch" else NEAR.kernels(chosen)


def attend(
    q: Tensor,
    near: KeyValue | None,
    opened: KeyValue | None,
    log_keep_BGT: Tensor,
    n: int,
    scale: float,
    kernel: Kernel,
):
    """The forward of `CompressedAttention`, with the arguments of `ops.training.near.join`.

    Returns:
        out_BNTD in q's dtype; lse_BNT, float32 (float64); and what the backward needs: q and the far keys with the
        bias in their borrowed channel, the kernel's calls and their states, and that of `join`.
    """
    keys = opened or near
    assert keys is not None and (near is None) == (n == 0)
    acc, unit = accumulator_dtype(q.dtype), bias_unit(scale)
    q, far_k = q.clone(), keys.k.clone()
    gates.borrowed(q).fill_(unit)
    bias_BGT = log_keep_BGT[..., 1:].clamp_min(MASKED) / (scale * unit)
    gates.borrowed(far_k)[..., :-1] = bias_BGT
    if opened is not None:
        opened = KeyValue(far_k, opened.v)
    parts = far_parts(q.shape[2], far_k.shape[2], n if opened is None else n + 1)
    far, states = None, []
    for rows, columns, causal in parts:
        out, lse, state = kernel.forward(
            q[:, :, rows], far_k[:, :, columns], keys.v[:, :, columns], scale, causal
        )
        lse = lse.to(acc)
        far = (out, lse) if far is None else join_by_lse(*far, out, lse)
        states.append(state)
    out, lse, near_state = _near(q, n).join(q, near, opened, far, n, scale)
    return out, lse, (q, far_k, parts, states, near_state)
