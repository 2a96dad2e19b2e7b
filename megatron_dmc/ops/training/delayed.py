"""Training attention whose decisions take effect some tokens later: DMC with a merge delay, and Dynamic
Memory Sparsification (DMS). docs/method.md, sections 8 and 9.

A query sees the last n tokens as they are (near) and everything before them compressed (far). Each
part is a call of a stock flash kernel; the parts are joined by log-sum-exp, and each part's backward
runs with the joined output and log-sum-exp, as in `ops.training.attention`:

    near              i - j < n                `ops.training.band`
    far, evicting     i - j >= n               causal, keys n tokens later, biased
    far, merging      i - j >= n, entries      `training_attention`, keys n tokens later

DMS with the delay w has n = w + 1, since a token's own decision is read from the token after it; DMC
with the merge delay w has n = w.
"""

import math

import torch
from torch import Tensor

from megatron_dmc.ops import gates
from megatron_dmc.ops.tensors import accumulator_dtype
from megatron_dmc.ops.training.attention import (
    MASKED,
    bias_unit,
    join_by_lse,
    shifted_backward,
    shifted_forward,
    training_attention,
)
from megatron_dmc.ops.training.band import choose_band
from megatron_dmc.ops.training.flash import Kernel, choose_kernel


def _far_parts(num_queries: int, num_keys: int, n: int) -> list[tuple[slice, slice, bool]]:
    """The pairs i - j >= n as kernel calls: (queries, keys, causal), for queries of the last tokens."""
    if num_keys <= n:
        return []
    past = num_keys - num_queries
    earliest = max(past, n)  # the first query with a far key
    parts = [(slice(earliest - past, None), slice(earliest - n, num_keys - n), True)]
    if past > n:
        parts.append((slice(None), slice(past - n), False))
    return parts


def _join(out: Tensor, lse: Tensor, rows: slice, part_out: Tensor, part_lse: Tensor) -> None:
    """Join a part's attention into that of its queries, in place."""
    seen = out[:, :, rows], lse[:, :, rows]
    joined, joined_lse = join_by_lse(*seen, part_out, part_lse.to(lse.dtype))
    seen[0].copy_(joined)
    seen[1].copy_(joined_lse)


class _EvictionAttention(torch.autograd.Function):
    """All tensors (B, heads, T, D)."""

    @staticmethod
    def forward(ctx, q, k, v, log_keep_BGT, n, scale, kernel: Kernel):
        q, near_k, far_k = q.clone(), k.clone(), k.clone()
        gates.borrowed(q).fill_(bias_unit(scale))
        gates.borrowed(near_k).zero_()
        # key j carries log_keep_{j+1}; the last key is never far
        bias_BGT = gates.borrowed(far_k)
        bias_BGT[..., -1:] = 0.0
        bias_BGT[..., :-1] = log_keep_BGT[..., 1:].clamp_min(MASKED) / (scale * bias_unit(scale))
        ctx.near = choose_band(q, near_k, v)
        out, lse, ctx.near_state = ctx.near.forward(q, near_k, v, n, scale)
        out, lse = out.to(accumulator_dtype(q.dtype)), lse.to(accumulator_dtype(q.dtype))
        ctx.far = []
        for rows, keys, causal in _far_parts(q.shape[2], k.shape[2], n):
            part_out, part_lse, state = kernel.forward(
                q[:, :, rows], far_k[:, :, keys], v[:, :, keys], scale, causal
            )
            _join(out, lse, rows, part_out, part_lse)
            ctx.far.append((rows, keys, causal, state))
        ctx.clamped = log_keep_BGT < MASKED
        out = out.to(q.dtype)
        ctx.save_for_backward(q, near_k, far_k, v, out, lse)
        ctx.n, ctx.scale, ctx.kernel = n, scale, kernel
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, near_k, far_k, v, out, lse = ctx.saved_tensors
        near = ctx.near.backward(grad_out, q, near_k, v, out, lse, ctx.near_state, ctx.n, ctx.scale)
        dq, dk, dv = (x.to(lse.dtype) for x in near)
        gates.borrowed(dk).zero_()
        for rows, keys, causal, state in ctx.far:
            far_dq, far_dk, far_dv = ctx.kernel.backward(
                grad_out[:, :, rows].contiguous(), q[:, :, rows], far_k[:, :, keys],
                v[:, :, keys], out[:, :, rows].contiguous(), lse[:, :, rows].contiguous(),
                state, ctx.scale, causal,
            )  # fmt: skip
            dq[:, :, rows] += far_dq
            dk[:, :, keys] += far_dk
            dv[:, :, keys] += far_dv
        # the keys' borrowed channel held their bias
        dlog_keep = torch.zeros_like(gates.borrowed(dk))
        dlog_keep[..., 1:] = gates.borrowed(dk)[..., :-1] / (ctx.scale * bias_unit(ctx.scale))
        dlog_keep = dlog_keep.masked_fill(ctx.clamped, 0.0)
        gates.borrowed(dq).zero_()
        gates.borrowed(dk).zero_()
        dq, dk, dv = dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)
        return dq, dk, dv, dlog_keep, None, None, None


class _DelayedAttention(torch.autograd.Function):
    """All tensors (B, heads, T, D). `n` is at least 1."""

    @staticmethod
    def forward(ctx, q, k, v, merged_k, merged_v, log_keep_BGT, n, scale, kernel: Kernel):
        near_q, near_k = q.clone(), k.clone()
        gates.borrowed(near_q).zero_()
        gates.borrowed(near_k).zero_()
        ctx.near = choose_band(near_q, near_k, v)
        out, lse, ctx.near_state = ctx.near.forward(near_q, near_k, v, n, scale)
        out, lse = out.to(accumulator_dtype(q.dtype)), lse.to(accumulator_dtype(q.dtype))
        num_entries = k.shape[2] - n  # states that some query sees
        # the first query that sees one
        ctx.rows = slice(max(0, n - (k.shape[2] - q.shape[2])), None)
        ctx.states = far = None
        if num_entries > 0:
            far_q, far_k, far_out, far_lse, p_own, ctx.states = shifted_forward(
                q[:, :, ctx.rows], merged_k[:, :, :num_entries], merged_v[:, :, :num_entries],
                log_keep_BGT[..., :num_entries], scale, kernel,
            )  # fmt: skip
            _join(out, lse, ctx.rows, far_out, far_lse)
            p_own = p_own * torch.exp(far_lse - lse[:, :, ctx.rows])
            far = far_q, far_k, merged_v, p_own
        out = out.to(q.dtype)
        ctx.save_for_backward(near_q, near_k, v, out, lse, *(far or ()))
        ctx.n, ctx.scale, ctx.kernel = n, scale, kernel
        ctx.clamped = log_keep_BGT < MASKED
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, lse, *far = ctx.saved_tensors
        dq, dk, dv = ctx.near.backward(
            grad_out, q, k, v, out, lse, ctx.near_state, ctx.n, ctx.scale
        )
        dq, dk, dv = dq.to(lse.dtype), dk.to(q.dtype), dv.to(q.dtype)
        gates.borrowed(dq).zero_()
        gates.borrowed(dk).zero_()
        dmerged_k, dmerged_v = torch.zeros_like(k), torch.zeros_like(v)
        dlog_keep = torch.zeros(k.shape[:3], dtype=lse.dtype, device=k.device)
        if far:
            far_q, far_k, merged_v, p_own = far
            num_entries, rows = far_k.shape[2], ctx.rows
            far_dq, far_dk, far_dv, dbias = shifted_backward(
                grad_out[:, :, rows], far_q, far_k, merged_v[:, :, :num_entries], out[:, :, rows],
                lse[:, :, rows], p_own, ctx.states, ctx.scale, ctx.kernel,
            )  # fmt: skip
            dq[:, :, rows] += far_dq
            dmerged_k[:, :, :num_entries] = far_dk
            dmerged_v[:, :, :num_entries] = far_dv
            dlog_keep[..., :num_entries] = dbias.masked_fill(ctx.clamped[..., :num_entries], 0.0)
        return dq.to(q.dtype), dk, dv, dmerged_k, dmerged_v, dlog_keep, None, None, None


def _prepare(
    q_TBND: Tensor, keys_TBGX: tuple[Tensor, ...], softmax_scale: float | None, backend: str | None
) -> tuple[list[Tensor], float, Kernel]:
    """The tensors as (B, heads, T, D), the scale and the kernel, after checking the shapes."""
    num_tokens, _, num_heads, dim = q_TBND.shape
    num_keys, num_kv_heads = keys_TBGX[0].shape[0], keys_TBGX[0].shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are not a multiple of {num_kv_heads} KV heads")
    if num_tokens > num_keys or any(x.shape[0] != num_keys for x in keys_TBGX):
        raise ValueError(
            f"{num_tokens} queries over keys of {[x.shape[0] for x in keys_TBGX]} tokens: all but "
            "the queries must have the same T, and the queries at most as many"
        )
    scale = 1.0 / math.sqrt(dim) if softmax_scale is None else softmax_scale
    q, *keys, log_keep = (x.permute(1, 2, 0, *range(3, x.dim())) for x in (q_TBND, *keys_TBGX))
    log_keep = log_keep.to(accumulator_dtype(q_TBND.dtype))
    return [q, *keys, log_keep], scale, choose_kernel(q, keys[0], keys[1], backend=backend)


def eviction_attention(
    q_TBND: Tensor,
    k_TBGD: Tensor,
    v_TBGD: Tensor,
    log_keep_TBG: Tensor,
    *,
    delay: int,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal attention in which key j fades for queries more than `delay` tokens later.

        score_ij = scale q_i . k_j + (log_keep_{j+1} if i - j > delay else 0)      j <= i

    Lancucki et al., arXiv 2506.05345; docs/method.md, section 8. Memory is linear in T. The last channel
    of q and k is the borrowed one: its content is ignored, and its gradient is zero.

    Args:
        q_TBND: rotated queries; N is a multiple of G, heads ordered by group. Fewer tokens than keys
            have: the queries are those of the last tokens.
        k_TBGD, v_TBGD: rotated keys and values, same dtype as the queries.
        log_keep_TBG: `log_keep[t] = log(1 - alpha_t)`, at most 0, -inf allowed; token t's decision is
            about token t - 1.
        delay: 0 or more; how many later tokens still see an evicted one.
        softmax_scale: default 1 / sqrt(D).
        backend: of `ops.training.flash.ATTENTION`; None: the first that can.

    Returns:
        out_TBND. Differentiable in all four tensors.

    Raises:
        ValueError: if N is not a multiple of G, the token counts do not fit, or the backend cannot.
    """
    assert delay >= 0
    tensors, scale, kernel = _prepare(
        q_TBND, (k_TBGD, v_TBGD, log_keep_TBG), softmax_scale, backend
    )
    out = _EvictionAttention.apply(*tensors, delay + 1, scale, kernel)
    return out.permute(2, 0, 1, 3)


def delayed_attention(
    q_TBND: Tensor,
    k_TBGD: Tensor,
    v_TBGD: Tensor,
    merged_k_TBGD: Tensor,
    merged_v_TBGD: Tensor,
    log_keep_TBG: Tensor,
    *,
    merge_delay: int,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Causal attention to the last `merge_delay` tokens raw and to everything before them as entries.

        i - w < j <= i :  score_ij = scale q_i . k_j                              raw key, raw value
        j = i - w      :  score_ij = scale q_i . merged_k_j                       the open segment
        j < i - w      :  score_ij = scale q_i . merged_k_j + log_keep_{j+1}

    docs/method.md, section 9. `merge_delay = 0` is `training_attention`. Memory is linear in T. The last
    channel of queries and keys is the borrowed one: its content is ignored, and its gradient is zero.

    Args:
        q_TBND: rotated queries; N is a multiple of G, heads ordered by group. Fewer tokens than keys
            have: the queries are those of the last tokens.
        k_TBGD, v_TBGD: rotated keys and values, same dtype as the queries.
        merged_k_TBGD, merged_v_TBGD: each token's state of its segment (`ops.merge`), the key rotated
            at that token's position.
        log_keep_TBG: `log_keep[t] = log(1 - alpha_t)`, at most 0, -inf allowed; shifted inside.
        merge_delay: w, 0 or more; tokens that stay raw before their decision takes effect.
        softmax_scale: default 1 / sqrt(D).
        backend: of `ops.training.flash.ATTENTION`; None: the first that can.

    Returns:
        out_TBND. Differentiable in all six tensors.

    Raises:
        ValueError: if N is not a multiple of G, the token counts do not fit, the delay is negative, or
            the backend cannot.
    """
    if merge_delay < 0:
        raise ValueError(f"merge_delay={merge_delay} must not be negative")
    if merge_delay == 0:
        return training_attention(
            q_TBND, merged_k_TBGD, merged_v_TBGD, log_keep_TBG,
            softmax_scale=softmax_scale, backend=backend,
        )  # fmt: skip
    keys = (k_TBGD, v_TBGD, merged_k_TBGD, merged_v_TBGD, log_keep_TBG)
    tensors, scale, kernel = _prepare(q_TBND, keys, softmax_scale, backend)
    out = _DelayedAttention.apply(*tensors, merge_delay, scale, kernel)
    return out.permute(2, 0, 1, 3)


def recent_attention(
    q_TND: Tensor, k_XGD: Tensor, v_XGD: Tensor, *, num_recent: int, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Every query attends to the latest tokens up to itself, without a backward.

    Args:
        q_TND: rotated queries of the last T of the X tokens, the borrowed channel zero.
        k_XGD, v_XGD: rotated keys and values of X tokens.
        num_recent: how many tokens a query sees, its own included; at least 1.

    Returns:
        out_TND in the queries' dtype; lse_TN, float32 (float64 for float64).
    """
    q, k, v = (x.transpose(0, 1)[None] for x in (q_TND, k_XGD, v_XGD))
    out, lse, _ = choose_band(q, k, v).forward(q, k, v, num_recent, softmax_scale)
    return out[0].transpose(0, 1).to(q_TND.dtype), lse[0].T
