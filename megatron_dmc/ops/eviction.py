"""Training attention of Dynamic Memory Sparsification (DMS): tokens leave the cache some time after the
decision, instead of merging. docs/method.md, section 8.

Every pair of a query and a key belongs to one of three sets, each of which a stock flash kernel computes;
the parts are joined by log-sum-exp, and each part's backward runs with the joined output and
log-sum-exp, as in `ops.attention`. With n = delay + 1 tokens in a block:

    near, own block        i - j < n, same block of n tokens           causal
    near, block before     i - j < n, j in the block before i's         causal, both blocks reversed
    far                    i - j >= n                                   causal, keys n tokens later, biased

Dimension letters: T tokens, B batch, N query heads, G key/value heads, D head dim, C blocks, X any.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dmc.ops.attention import MASKED, bias_unit, join_by_lse
from megatron_dmc.ops.flash import Kernel, choose_kernel
from megatron_dmc.ops.tensors import accumulator_dtype


@dataclass(frozen=True)
class _Part:
    """A set of (query, key) pairs that one kernel call computes; blocks are folded into the batch."""

    queries_CX: Tensor
    """Rows of q, int64; rows outside of q stand for padding."""
    keys_CX: Tensor
    causal: bool
    is_far: bool

    @staticmethod
    def take(x_BHTX: Tensor, rows_CX: Tensor) -> Tensor:
        """(B C, H, X, ...): the rows, whatever for padding."""
        rows = rows_CX.clamp(0, x_BHTX.shape[2] - 1)
        return x_BHTX[:, :, rows].transpose(1, 2).flatten(0, 1)

    @staticmethod
    def put(into_BHTX: Tensor, rows_CX: Tensor, part: Tensor, *, add: bool) -> None:
        """The part's rows into (added to) those they came from; padding is dropped."""
        part = part.unflatten(0, (into_BHTX.shape[0], -1)).transpose(1, 2).flatten(2, 3)
        rows = rows_CX.reshape(-1)
        real = (rows >= 0) & (rows < into_BHTX.shape[2])
        if add:
            into_BHTX.index_add_(2, rows[real], part[:, :, real].to(into_BHTX.dtype))
        else:
            into_BHTX[:, :, rows[real]] = part[:, :, real].to(into_BHTX.dtype)


def _parts(num_queries: int, num_keys: int, delay: int, device: torch.device) -> list[_Part]:
    """The sets for queries of the last tokens. Rows of queries count from the first query."""
    past, n = num_keys - num_queries, delay + 1
    first = max(0, past - delay)  # the earliest key that is near to a query
    num_blocks = -(-(num_keys - first) // n)
    blocks = first + torch.arange(num_blocks * n, device=device).view(-1, n)
    parts = [_Part(blocks - past, blocks, True, False)]
    if num_blocks > 1 and n > 1:
        # row a of the reversed blocks: query n - 2 - a, key n - 1 - a of the block before
        parts.append(_Part(blocks[1:, :-1].flip(1) - past, blocks[:-1, 1:].flip(1), True, False))
    if num_keys > n:
        tokens = torch.arange(num_keys, device=device)
        earliest = max(past, n)  # the first query with a far key
        parts.append(
            _Part(
                tokens[None, earliest:] - past,
                tokens[None, earliest - n : num_keys - n],
                True,
                True,
            )
        )
        if past > n:
            parts.append(_Part(tokens[None, past:] - past, tokens[None, : past - n], False, True))
    return parts


class _EvictionAttention(torch.autograd.Function):
    """All tensors (B, heads, T, D)."""

    @staticmethod
    def forward(ctx, q, k, v, log_keep_BGT, delay, scale, kernel: Kernel):
        acc = accumulator_dtype(q.dtype)
        q, near_k, far_k = q.clone(), k.clone(), k.clone()
        q[..., -1] = bias_unit(scale)
        near_k[..., -1] = 0.0
        # key j carries log_keep_{j+1}; the last key is never far
        far_k[..., -1:, -1] = 0.0
        far_k[..., :-1, -1] = log_keep_BGT[..., 1:].clamp_min(MASKED) / (scale * bias_unit(scale))
        parts = _parts(q.shape[2], k.shape[2], delay, q.device)
        out = torch.zeros(q.shape, dtype=acc, device=q.device)
        lse = torch.full(q.shape[:3], float("-inf"), dtype=acc, device=q.device)
        states = []
        for part in parts:
            part_q = _Part.take(q, part.queries_CX)
            part_k = _Part.take(far_k if part.is_far else near_k, part.keys_CX)
            part_v = _Part.take(v, part.keys_CX)
            part_out, part_lse, state = kernel.forward(part_q, part_k, part_v, scale, part.causal)
            states.append((part_out, part_lse, state))
        for part, (part_out, part_lse, _) in zip(parts, states, strict=True):
            old_out, old_lse = _Part.take(out, part.queries_CX), _Part.take(lse, part.queries_CX)
            joined, joined_lse = join_by_lse(old_out, old_lse, part_out, part_lse.to(acc))
            _Part.put(out, part.queries_CX, joined, add=False)
            _Part.put(lse, part.queries_CX, joined_lse, add=False)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, near_k, far_k, v, out, lse)
        ctx.parts, ctx.states = parts, [state for _, _, state in states]
        ctx.scale, ctx.kernel = scale, kernel
        ctx.clamped = log_keep_BGT < MASKED
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, near_k, far_k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, near_k, v))
        dbias = torch.zeros(near_k.shape[:3], dtype=lse.dtype, device=q.device)
        for part, state in zip(ctx.parts, ctx.states, strict=True):
            rows, num_queries = part.queries_CX, q.shape[2]
            # exp(score - inf) = 0: padding has no probability
            real = ((rows >= 0) & (rows < num_queries)).repeat(q.shape[0], 1)[:, None]
            part_lse = _Part.take(lse, rows).masked_fill(~real, float("inf"))
            part_grad = _Part.take(grad_out, rows) * real[..., None]
            part_dq, part_dk, part_dv = ctx.kernel.backward(
                part_grad.contiguous(), _Part.take(q, rows),
                _Part.take(far_k if part.is_far else near_k, part.keys_CX),
                _Part.take(v, part.keys_CX), _Part.take(out, rows).contiguous(),
                part_lse.contiguous(), state, ctx.scale, part.causal,
            )  # fmt: skip
            _Part.put(dq, rows, part_dq, add=True)
            _Part.put(dv, part.keys_CX, part_dv, add=True)
            _Part.put(dk, part.keys_CX, part_dk, add=True)
            if part.is_far:
                _Part.put(dbias, part.keys_CX, part_dk[..., -1], add=True)
        dq[..., -1] = dk[..., -1] = 0.0
        dlog_keep = torch.zeros_like(dbias)
        dlog_keep[..., 1:] = dbias[..., :-1] / (ctx.scale * bias_unit(ctx.scale))
        dlog_keep = dlog_keep.masked_fill(ctx.clamped, 0.0)
        dq, dk, dv = dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)
        return dq, dk, dv, dlog_keep, None, None, None


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
        backend: stock kernel by name; default: the choice of `ops.flash.choose_kernel`.

    Returns:
        out_TBND. Differentiable in all four tensors.

    Raises:
        ValueError: if N is not a multiple of G or the backend cannot.
    """
    num_heads, num_kv_heads = q_TBND.shape[2], k_TBGD.shape[2]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads are not a multiple of {num_kv_heads} KV heads")
    assert delay >= 0 and q_TBND.shape[0] <= k_TBGD.shape[0]
    scale = 1.0 / math.sqrt(q_TBND.shape[-1]) if softmax_scale is None else softmax_scale
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_TBND, k_TBGD, v_TBGD))
    acc = accumulator_dtype(q_TBND.dtype)
    kernel = choose_kernel(q, k, v, backend=backend)
    out = _EvictionAttention.apply(
        q, k, v, log_keep_TBG.permute(1, 2, 0).to(acc), delay, scale, kernel
    )
    return out.permute(2, 0, 1, 3)
