"""Training attention at the speed of a stock flash kernel. docs/method.md, section 3.

Dimension letters: T tokens, B batch, N query heads, G key/value heads, R query heads per
key/value head, D head dim.
"""

import math

import torch
from torch import Tensor

_MASKED = -1.0e4
"""Stands for log(0) inside the kernel: exp of it is 0 in every dtype, and no NaN can arise."""


def _flash_forward(
    q_BNTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, scale: float, *, causal: bool = True
):
    """Stock flash attention: (out_BNTD, lse_BNT, state for the backward)."""
    if q_BNTD.is_cuda:
        out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = (
            torch.ops.aten._scaled_dot_product_flash_attention(
                q_BNTD, k_BGTD, v_BGTD, 0.0, causal, False, scale=scale
            )
        )
        return out, lse, (cum_q, cum_k, max_q, max_k, seed, offset)
    # ATen's CPU kernel wants as many key heads as query heads: one call for each query head of
    # the groups, so that keys are never repeated in memory.
    group = q_BNTD.shape[1] // k_BGTD.shape[1]
    outs, lses = [], []
    for r in range(group):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_BNTD[:, r::group], k_BGTD, v_BGTD, 0.0, causal, scale=scale
        )
        outs.append(out)
        lses.append(lse)
    if group == 1:
        return outs[0], lses[0], None
    return torch.stack(outs, 2).flatten(1, 2), torch.stack(lses, 2).flatten(1, 2), None


def _flash_backward(grad_out, q, k, v, out, lse, state, scale: float, *, causal: bool = True):
    """Backward of `_flash_forward`, given the (possibly merged) out and lse."""
    if q.is_cuda:
        cum_q, cum_k, max_q, max_k, seed, offset = state
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad_out, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, causal, seed, offset,
            scale=scale,
        )  # fmt: skip
    group = q.shape[1] // k.shape[1]
    dqs, dk, dv = [], None, None
    for r in range(group):
        heads = slice(r, None, group)
        dq_r, dk_r, dv_r = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out[:, heads], q[:, heads], k, v, out[:, heads], lse[:, heads], 0.0, causal,
            scale=scale,
        )  # fmt: skip
        dqs.append(dq_r)
        dk = dk_r if dk is None else dk + dk_r
        dv = dv_r if dv is None else dv + dv_r
    dq = dqs[0] if group == 1 else torch.stack(dqs, 2).flatten(1, 2)
    return dq, dk, dv


def _by_group(x_BNTX: Tensor, num_kv_heads: int) -> Tensor:
    return x_BNTX.unflatten(1, (num_kv_heads, -1))


def _joined(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Union of two disjoint sets of keys: (B, N, T, D) and (B, N, T), in the dtype of `lse`."""
    other_lse = other_lse.to(lse.dtype)
    joint = torch.logaddexp(lse, other_lse)
    out = out * torch.exp(lse - joint)[..., None]
    return out + other.to(lse.dtype) * torch.exp(other_lse - joint)[..., None], joint


def _shifted_forward(q: Tensor, k: Tensor, v: Tensor, log_keep_BGT: Tensor, scale: float):
    """Shifted flash attention joined with the diagonal, section 3. Tensors (B, heads, T, D).

    The queries are those of the last tokens; keys before the first query's token are its past.

    Returns:
        q and k with the bias in their borrowed channel, out_BNTD, lse_BNT, the diagonal's
        probability p_own_BNT, and the flash kernel's states for its backward: of the past (None
        where there is none) and of the queries' own tokens (None for one query).
    """
    num_kv_heads, past = k.shape[1], k.shape[2] - q.shape[2]
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    q = torch.cat([q[..., :-1], torch.full_like(q[..., :1], 1.0 / scale)], dim=-1)
    bias = log_keep_BGT.clamp_min(_MASKED)
    # key j carries log_keep_{j+1}; the last key is never anybody's earlier key
    bias = torch.cat([bias[..., 1:], torch.zeros_like(bias[..., :1])], dim=-1)
    k = torch.cat([k[..., :-1], bias[..., None].to(k.dtype)], dim=-1)
    own_k, own_v = k[:, :, past:], v[:, :, past:]

    own_lse = (_by_group(q[..., :-1], num_kv_heads).to(acc) * own_k[..., None, :, :-1].to(acc)).sum(
        -1
    )
    own_lse = (own_lse * scale).flatten(1, 2)
    lse = own_lse.clone()
    out = own_v[:, :, None].expand(_by_group(q, num_kv_heads).shape).flatten(1, 2).to(acc)
    past_state = state = None
    if q.shape[2] > 1:
        part, part_lse, state = _flash_forward(
            q[:, :, 1:], own_k[:, :, :-1], own_v[:, :, :-1], scale
        )
        tail, tail_lse = _joined(out[:, :, 1:], lse[:, :, 1:], part, part_lse)
        out = torch.cat([out[:, :, :1], tail], dim=2)
        lse = torch.cat([lse[:, :, :1], tail_lse], dim=2)
    if past:
        part, part_lse, past_state = _flash_forward(
            q, k[:, :, :past], v[:, :, :past], scale, causal=False
        )
        out, lse = _joined(out, lse, part, part_lse)
    return q, k, out.to(q.dtype), lse, torch.exp(own_lse - lse), (past_state, state)


class _TrainingAttention(torch.autograd.Function):
    """Shifted flash attention plus the diagonal, joined by log-sum-exp. All tensors (B, heads, T, D)."""

    @staticmethod
    def forward(ctx, q, k, v, log_keep_BGT, scale):
        q, k, out, lse, p_own, states = _shifted_forward(q, k, v, log_keep_BGT, scale)
        ctx.save_for_backward(q, k, v, out, lse, p_own)
        ctx.states, ctx.scale = states, scale
        ctx.clamped = (log_keep_BGT < _MASKED) if ctx.needs_input_grad[3] else None
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, lse, p_own = ctx.saved_tensors
        scale, num_kv_heads, past = ctx.scale, k.shape[1], k.shape[2] - q.shape[2]
        past_state, state = ctx.states
        acc = lse.dtype
        g = grad_out.to(acc)
        own_k, own_v = k[:, :, past:], v[:, :, past:]
        g_group = _by_group(g, num_kv_heads)
        delta = (g * out.to(acc)).sum(-1)
        ds = p_own * ((g_group * own_v[:, :, None].to(acc)).sum(-1).flatten(1, 2) - delta) * scale
        ds = _by_group(ds, num_kv_heads)[..., None]
        dq = (ds * own_k[:, :, None].to(acc)).flatten(1, 2)
        dk = torch.zeros(k.shape, dtype=acc, device=k.device)
        dv = torch.zeros(v.shape, dtype=acc, device=v.device)
        dk[:, :, past:] = (ds * _by_group(q, num_kv_heads).to(acc)).sum(2)
        dv[:, :, past:] = (_by_group(p_own, num_kv_heads)[..., None] * g_group).sum(2)
        dk[..., -1] = 0.0

        def add(first: int, keys: slice, state, causal: bool) -> None:
            dq_part, dk_part, dv_part = _flash_backward(
                grad_out[:, :, first:].contiguous(), q[:, :, first:], k[:, :, keys], v[:, :, keys],
                out[:, :, first:].contiguous(), lse[:, :, first:].contiguous(), state, scale,
                causal=causal,
            )  # fmt: skip
            dq[:, :, first:] += dq_part.to(acc)
            dk[:, :, keys] += dk_part.to(acc)
            dv[:, :, keys] += dv_part.to(acc)

        if q.shape[2] > 1:
            add(1, slice(past, -1), state, True)
        if past:
            add(0, slice(0, past), past_state, False)
        # the flash kernel saw q[d] = 1/scale, so d score / d bias is 1: dk[d] is the bias's gradient
        dbias = torch.cat([torch.zeros_like(dk[:, :, :1, -1]), dk[:, :, :-1, -1]], dim=2)
        if ctx.clamped is not None:
            dbias = dbias.masked_fill(ctx.clamped, 0.0)
        dq[..., -1] = 0.0
        dk[..., -1] = 0.0
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias, None


def training_attention(
    q_TBND: Tensor,
    k_TBGD: Tensor,
    v_TBGD: Tensor,
    log_keep_TBG: Tensor,
    *,
    softmax_scale: float | None = None,
) -> Tensor:
    """Causal attention in which key j counts for a later query with weight (1 - alpha_{j+1}).

        score_ij = scale q_i . k_j + log_keep_{j+1}  (j < i)        score_ii = scale q_i . k_i

    docs/method.md, section 3. Memory is linear in T. The last channel of q and k is the borrowed one:
    its content is ignored, and its gradient is zero.

    Args:
        q_TBND: rotated queries; N is a multiple of G, heads ordered by group. Fewer tokens than
            keys have: the queries are those of the last tokens.
        k_TBGD, v_TBGD: rotated merged keys, merged values, same dtype as the queries.
        log_keep_TBG: `log_keep[t] = log(1 - alpha_t)`, at most 0, -inf allowed; shifted inside.
        softmax_scale: default 1 / sqrt(D).

    Returns:
        out_TBND. Differentiable in all four tensors.

    Raises:
        ValueError: if N is not a multiple of G or the token counts do not fit.
    """
    num_heads, num_kv_heads = q_TBND.shape[2], k_TBGD.shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are not a multiple of {num_kv_heads} KV heads")
    if not q_TBND.shape[0] <= k_TBGD.shape[0] == v_TBGD.shape[0] == log_keep_TBG.shape[0]:
        raise ValueError(
            "training_attention: k, v and log_keep must have the same T, and q at most as many"
        )
    scale = 1.0 / math.sqrt(q_TBND.shape[-1]) if softmax_scale is None else softmax_scale
    out = _TrainingAttention.apply(
        q_TBND.permute(1, 2, 0, 3),
        k_TBGD.permute(1, 2, 0, 3),
        v_TBGD.permute(1, 2, 0, 3),
        log_keep_TBG.permute(1, 2, 0).to(
            torch.float64 if q_TBND.dtype == torch.float64 else torch.float32
        ),
        scale,
    )
    return out.permute(2, 0, 1, 3)


class _PlainAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale):
        past = k.shape[2] - q.shape[2]
        out, lse, state = _flash_forward(q, k[:, :, past:], v[:, :, past:], scale)
        past_state = None
        if past:
            part, part_lse, past_state = _flash_forward(
                q, k[:, :, :past], v[:, :, :past], scale, causal=False
            )
            joint, lse = _joined(out.to(lse.dtype), lse, part, part_lse)
            out = joint.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.states, ctx.scale = (past_state, state), scale
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, lse = ctx.saved_tensors
        (past_state, state), past = ctx.states, k.shape[2] - q.shape[2]
        grad_out = grad_out.contiguous()
        dq, dk, dv = _flash_backward(
            grad_out, q, k[:, :, past:], v[:, :, past:], out, lse, state, ctx.scale
        )
        if past:
            dq_past, dk_past, dv_past = _flash_backward(
                grad_out, q, k[:, :, :past], v[:, :, :past], out, lse, past_state, ctx.scale,
                causal=False,
            )  # fmt: skip
            dq, dk, dv = dq + dq_past, torch.cat([dk_past, dk], 2), torch.cat([dv_past, dv], 2)
        return dq, dk, dv, None


def causal_attention(
    q_TBND: Tensor, k_TBGD: Tensor, v_TBGD: Tensor, *, softmax_scale: float | None = None
) -> Tensor:
    """Plain causal attention on the same stock kernel: DMC off, and the yardstick of benchmarks.

    Args and returns as `training_attention`, but every channel counts.
    """
    scale = 1.0 / math.sqrt(q_TBND.shape[-1]) if softmax_scale is None else softmax_scale
    out = _PlainAttention.apply(
        q_TBND.permute(1, 2, 0, 3), k_TBGD.permute(1, 2, 0, 3), v_TBGD.permute(1, 2, 0, 3), scale
    )
    return out.permute(2, 0, 1, 3)


def join_by_lse(
    out_TND: Tensor, lse_TN: Tensor, other_TND: Tensor, other_lse_TN: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys, from its two parts.

    Args:
        out_TND, other_TND: the parts' outputs, any dtype; lse_TN, other_lse_TN: their
            log-sum-exps, float32 or float64.

    Returns:
        out in `out_TND`'s dtype, and the joint log-sum-exp.
    """
    lse = torch.logaddexp(lse_TN, other_lse_TN)
    out = out_TND.to(lse.dtype) * torch.exp(lse_TN - lse)[..., None]
    out = out + other_TND.to(lse.dtype) * torch.exp(other_lse_TN - lse)[..., None]
    return out.to(out_TND.dtype), lse


def chunk_attention(
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    is_merge_TG: Tensor | None,
    *,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """A chunk's attention to its own tokens: `training_attention` with hard decisions, for one
    sequence, without a backward. Superseded states are invisible to later tokens.

    Args:
        q_TND: rotated queries; k_TGD, v_TGD: rotated merged keys, merged values.
        is_merge_TG: bool, or None for plain causal attention in which every channel counts.

    Returns:
        out_TND in the queries' dtype; lse_TN, float32 (float64 for float64).
    """
    q, k, v = (x.transpose(0, 1)[None] for x in (q_TND, k_TGD, v_TGD))
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    if is_merge_TG is None:
        out, lse, _ = _flash_forward(q, k, v, softmax_scale)
    else:
        log_keep = torch.zeros(is_merge_TG.shape, dtype=acc, device=q.device)
        log_keep = log_keep.masked_fill(is_merge_TG, float("-inf")).T[None]
        _, _, out, lse, _, _ = _shifted_forward(q, k, v, log_keep, softmax_scale)
    return out[0].transpose(0, 1), lse[0].T.to(acc)


def masked_attention(
    q_TND: Tensor,
    k_GED: Tensor,
    v_GED: Tensor,
    is_visible_GE: Tensor | None,
    *,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Every query attends to the same keys of its head, on the stock flash kernel.

    Args:
        q_TND: rotated queries; k_GED, v_GED: finite everywhere.
        is_visible_GE: bool; travels in the borrowed channel, whose content in q and k is ignored.
            None: every key is visible and every channel counts.

    Returns:
        out_TND and lse_TN as `chunk_attention`. Where a head sees no key, its lse is so low that
        `join_by_lse` gives its output no weight.
    """
    q, k, v = q_TND.transpose(0, 1)[None], k_GED[None], v_GED[None]
    acc = torch.float64 if q.dtype == torch.float64 else torch.float32
    if is_visible_GE is not None:
        q = torch.cat([q[..., :-1], torch.full_like(q[..., :1], 1.0 / softmax_scale)], dim=-1)
        bias = torch.zeros_like(k[..., :1]).masked_fill(~is_visible_GE[None, ..., None], _MASKED)
        k = torch.cat([k[..., :-1], bias], dim=-1)
    out, lse, _ = _flash_forward(q, k, v, softmax_scale, causal=False)
    return out[0].transpose(0, 1), lse[0].T.to(acc)
