"""Training attention at the speed of a stock flash kernel. docs/method.md, section 3."""

import math

import torch
from torch import Tensor

from megatron_dmc.ops import gates
from megatron_dmc.ops.tensors import accumulator_dtype
from megatron_dmc.ops.training.compressed import MASKED, CompressedAttention, attend
from megatron_dmc.ops.training.flash import choose_kernel
from megatron_dmc.ops.training.near import KeyValue, join_by_lse


def training_attention(
    q_TBND: Tensor,
    k_TBGD: Tensor,
    v_TBGD: Tensor,
    log_keep_TBG: Tensor,
    *,
    softmax_scale: float | None = None,
    backend: str | None = None,
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
        backend: of `ops.training.flash.ATTENTION`; None: the first that can.

    Returns:
        out_TBND. Differentiable in all four tensors.

    Raises:
        ValueError: if N is not a multiple of G, the token counts do not fit, or the backend
            cannot.
    """
    num_heads, num_kv_heads = q_TBND.shape[2], k_TBGD.shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are not a multiple of {num_kv_heads} KV heads")
    if not q_TBND.shape[0] <= k_TBGD.shape[0] == v_TBGD.shape[0] == log_keep_TBG.shape[0]:
        raise ValueError(
            "training_attention: k, v and log_keep must have the same T, and q at most as many"
        )
    scale = 1.0 / math.sqrt(q_TBND.shape[-1]) if softmax_scale is None else softmax_scale
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_TBND, k_TBGD, v_TBGD))
    log_keep = log_keep_TBG.permute(1, 2, 0).to(accumulator_dtype(q_TBND.dtype))
    kernel = choose_kernel(q, k, v, backend=backend)
    out = CompressedAttention.apply(q, None, None, k, v, log_keep, 0, scale, kernel)
    return out.permute(2, 0, 1, 3)


class _PlainAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale, kernel):
        past = k.shape[2] - q.shape[2]
        out, lse, state = kernel.forward(q, k[:, :, past:], v[:, :, past:], scale, True)
        past_state = None
        if past:
            part, part_lse, past_state = kernel.forward(
                q, k[:, :, :past], v[:, :, :past], scale, False
            )
            out, lse = join_by_lse(out, lse, part, part_lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.states, ctx.scale, ctx.kernel = (state, past_state), scale, kernel
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, lse = ctx.saved_tensors
        (state, past_state), past = ctx.states, k.shape[2] - q.shape[2]
        grad_out, kernel = grad_out.contiguous(), ctx.kernel
        own = k[:, :, past:], v[:, :, past:]
        dq, dk, dv = kernel.backward(grad_out, q, *own, out, lse, state, ctx.scale, True)
        if past:
            dq_past, dk_past, dv_past = kernel.backward(
                grad_out, q, k[:, :, :past], v[:, :, :past], out, lse, past_state, ctx.scale, False
            )
            dq, dk, dv = dq + dq_past, torch.cat([dk_past, dk], 2), torch.cat([dv_past, dv], 2)
        return dq, dk, dv, None, None


def causal_attention(
    q_TBND: Tensor,
    k_TBGD: Tensor,
    v_TBGD: Tensor,
    *,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Plain causal attention on the same stock kernel: DMC off, and the yardstick of benchmarks.

    Args and returns as `training_attention`, but every channel counts.
    """
    scale = 1.0 / math.sqrt(q_TBND.shape[-1]) if softmax_scale is None else softmax_scale
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_TBND, k_TBGD, v_TBGD))
    kernel = choose_kernel(q, k, v, backend=backend)
    out = _PlainAttention.apply(q, k, v, scale, kernel)
    return out.permute(2, 0, 1, 3)


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
    acc = accumulator_dtype(q.dtype)
    kernel = choose_kernel(q, k, v)
    if is_merge_TG is None:
        out, lse, _ = kernel.forward(q, k, v, softmax_scale, True)
    else:
        log_keep = torch.zeros(is_merge_TG.shape, dtype=acc, device=q.device)
        log_keep = log_keep.masked_fill(is_merge_TG, float("-inf")).T[None]
        out, lse, _ = attend(q, None, KeyValue(k, v), log_keep, 0, softmax_scale, kernel)
    return out[0].transpose(0, 1), lse[0].T.to(acc)


def masked_attention(
    q_TND: Tensor,
    k_GED: Tensor,
    v_GED: Tensor,
    is_visible_GE: Tensor | None,
    *,
    softmax_scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Every query attends to the same keys of its head, on the stock flash kernel.

    Args:
        q_TND: rotated queries; k_GED, v_GED: finite everywhere.
        is_visible_GE: bool; travels in the borrowed channel, whose content in q and k is ignored.
            None: every key is visible and every channel counts.
        causal: there are as many keys as queries, and a query sees none behind its own.

    Returns:
        out_TND and lse_TN as `chunk_attention`. Where a head sees no key, its lse is so low that
        `join_by_lse` gives its output no weight.
    """
    q, k, v = q_TND.transpose(0, 1)[None], k_GED[None], v_GED[None]
    acc = accumulator_dtype(q.dtype)
    if is_visible_GE is not None:
        q, k = q.clone(), k.clone()
        gates.borrowed(q).fill_(1.0 / softmax_scale)
        gates.borrowed(k).zero_().masked_fill_(~is_visible_GE, MASKED)
    kernel = choose_kernel(q, k, v, causal=causal)
    out, lse, _ = kernel.forward(q, k, v, softmax_scale, causal)
    return out[0].transpose(0, 1), lse[0].T.to(acc)


_QUERY_BLOCK = 128


def compacted_attention(
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    k_GED: Tensor,
    v_GED: Tensor,
    entry_TG: Tensor,
    *,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Every query attends to the entries below its own one, and to its own state in place of that.

    The entries alone are keys: E of them where `chunk_attention` has T states. Memory is that of a block
    of queries' scores, so linear in E.

    Args:
        q_TND: rotated queries, the borrowed channel zero.
        k_TGD, v_TGD: each token's state: rotated merged keys, merged values.
        k_GED, v_GED: entries; finite everywhere. E is at least the largest of `entry_TG`.
        entry_TG: int64, the entry that the token's segment is, not falling with T.

    Returns:
        out_TND in the queries' dtype, computed in float32 (float64), and its log-sum-exp lse_TN.
    """
    num_tokens, num_kv_heads = entry_TG.shape
    acc = accumulator_dtype(q_TND.dtype)
    keys_GDE, values = k_GED.to(acc).transpose(1, 2), v_GED.to(acc)
    indices = torch.arange(keys_GDE.shape[2], device=q_TND.device)
    out = torch.empty_like(q_TND)
    lse_TN = torch.empty(q_TND.shape[:2], dtype=acc, device=q_TND.device)
    for first in range(0, num_tokens, _QUERY_BLOCK):
        at = slice(first, first + _QUERY_BLOCK)
        entry = entry_TG[at]
        # all queries of the block see the entries below `low`, none those from `high` on
        low, high = int(entry[0].min()), int(entry[-1].max())
        q = softmax_scale * q_TND[at].unflatten(1, (num_kv_heads, -1)).to(acc)
        own = (q * k_TGD[at, :, None].to(acc)).sum(-1).transpose(0, 1)
        q = q.transpose(0, 1)  # (G, T, R, D)
        scores = (q.flatten(1, 2) @ keys_GDE[..., :high]).unflatten(1, q.shape[1:3])
        hidden = indices[low:high] >= entry.T[..., None]
        scores[..., low:].masked_fill_(hidden[:, :, None], float("-inf"))
        most = own if high == 0 else torch.maximum(own, scores.amax(-1))
        weights = scores.sub_(most[..., None]).exp_()
        own = torch.exp(own - most)
        total = own + weights.sum(-1)
        attended = (weights.flatten(1, 2) @ values[:, :high]).unflatten(1, q.shape[1:3])
        attended += own[..., None] * v_TGD[at].to(acc).transpose(0, 1)[:, :, None]
        out[at] = (attended / total[..., None]).transpose(0, 1).flatten(1, 2)
        lse_TN[at] = (most + total.log()).transpose(0, 1).flatten(1, 2)
    return out, lse_TN
