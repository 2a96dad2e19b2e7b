"""Training attention whose decisions take effect some tokens later: DMC with a merge delay, and Dynamic
Memory Sparsification (DMS). docs/method.md, sections 8 and 9.

A query sees the last n tokens as they are (near) and everything before them compressed (far). Each
part is a call of a stock flash kernel; the parts are joined by log-sum-exp, and each part's backward
runs with the joined output and log-sum-exp, as in `ops.training.attention`:

    near, own block        i - j < n, same block of n tokens           causal
    near, block before     i - j < n, j in the block before i's        causal, both blocks reversed
    far, evicting          i - j >= n                                  causal, keys n tokens later, biased
    far, merging           i - j >= n, entries                         `training_attention`, keys n tokens later

DMS with the delay w has n = w + 1, since a token's own decision is read from the token after it; DMC
with the merge delay w has n = w.

Local letters: C blocks, X any dimension.
"""

import math
from dataclasses import dataclass

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
from megatron_dmc.ops.training.flash import Kernel, choose_kernel


@dataclass(frozen=True)
class _Part:
    """A set of (query, key) pairs that one kernel call computes; blocks are folded into the batch."""

    queries_CX: Tensor
    """Rows of q, int64; rows outside q are padding."""
    keys_CX: Tensor
    """Rows of k and v, likewise."""
    causal: bool = True


def _take(x_BHTX: Tensor, rows_CX: Tensor) -> Tensor:
    """The rows, (B C, H, X, ...); padding rows hold arbitrary values."""
    rows = rows_CX.clamp(0, x_BHTX.shape[2] - 1)
    return x_BHTX[:, :, rows].transpose(1, 2).flatten(0, 1)


def _put(into_BHTX: Tensor, rows_CX: Tensor, part: Tensor, *, add: bool) -> None:
    """Write (or add) the part's rows where they came from, and drop padding."""
    part = part.unflatten(0, (into_BHTX.shape[0], -1)).transpose(1, 2).flatten(2, 3)
    rows = rows_CX.reshape(-1)
    real = (rows >= 0) & (rows < into_BHTX.shape[2])
    if add:
        into_BHTX.index_add_(2, rows[real], part[:, :, real].to(into_BHTX.dtype))
    else:
        into_BHTX[:, :, rows[real]] = part[:, :, real].to(into_BHTX.dtype)


def _near_parts(num_queries: int, num_keys: int, n: int, device: torch.device) -> list[_Part]:
    """The pairs i - j < n, for queries of the last tokens. Rows of queries count from the first query."""
    if n == 0:
        return []
    past = num_keys - num_queries
    first = max(0, past - n + 1)  # the earliest key that is near to a query
    num_blocks = -(-(num_keys - first) // n)
    blocks = first + torch.arange(num_blocks * n, device=device).view(-1, n)
    parts = [_Part(blocks - past, blocks)]
    if num_blocks > 1 and n > 1:
        # row a of the reversed blocks: query n - 2 - a, key n - 1 - a of the block before
        parts.append(_Part(blocks[1:, :-1].flip(1) - past, blocks[:-1, 1:].flip(1)))
    return parts


def _far_parts(num_queries: int, num_keys: int, n: int, device: torch.device) -> list[_Part]:
    """The pairs i - j >= n, for queries of the last tokens."""
    if num_keys <= n:
        return []
    past = num_keys - num_queries
    tokens = torch.arange(num_keys, device=device)
    earliest = max(past, n)  # the first query with a far key
    parts = [_Part(tokens[None, earliest:] - past, tokens[None, earliest - n : num_keys - n])]
    if past > n:
        parts.append(_Part(tokens[None, past:] - past, tokens[None, : past - n], causal=False))
    return parts


class _Joined:
    """The output of attention over disjoint sets of keys, joined part by part."""

    def __init__(self, q: Tensor):
        acc = accumulator_dtype(q.dtype)
        self.out = torch.zeros(q.shape, dtype=acc, device=q.device)
        self.lse = torch.full(q.shape[:3], float("-inf"), dtype=acc, device=q.device)

    def attend(
        self, part: _Part, q: Tensor, k: Tensor, v: Tensor, scale: float, kernel: Kernel
    ) -> object:
        """Join a part's attention. Returns the kernel's state for `_part_backward`."""
        part_out, part_lse, state = kernel.forward(
            _take(q, part.queries_CX), _take(k, part.keys_CX), _take(v, part.keys_CX),
            scale, part.causal,
        )  # fmt: skip
        joined, joined_lse = join_by_lse(
            _take(self.out, part.queries_CX), _take(self.lse, part.queries_CX),
            part_out, part_lse.to(self.lse.dtype),
        )  # fmt: skip
        _put(self.out, part.queries_CX, joined, add=False)
        _put(self.lse, part.queries_CX, joined_lse, add=False)
        return state


def _part_backward(
    part: _Part,
    state: object,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    kernel: Kernel,
    into: tuple[Tensor, Tensor, Tensor],
    dbias: Tensor | None = None,
) -> None:
    """Add a part's gradients to `into` (dq, dk, dv); that of the keys' borrowed channel to `dbias`."""
    rows = part.queries_CX
    # exp(score - inf) = 0: padding has no probability
    real = ((rows >= 0) & (rows < q.shape[2])).repeat(q.shape[0], 1)[:, None]
    part_dq, part_dk, part_dv = kernel.backward(
        (_take(grad_out, rows) * real[..., None]).contiguous(), _take(q, rows),
        _take(k, part.keys_CX), _take(v, part.keys_CX), _take(out, rows).contiguous(),
        _take(lse, rows).masked_fill(~real, float("inf")).contiguous(), state, scale, part.causal,
    )  # fmt: skip
    dq, dk, dv = into
    _put(dq, rows, part_dq, add=True)
    _put(dk, part.keys_CX, part_dk, add=True)
    _put(dv, part.keys_CX, part_dv, add=True)
    if dbias is not None:
        _put(dbias, part.keys_CX, gates.borrowed(part_dk), add=True)


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
        near = _near_parts(q.shape[2], k.shape[2], n, q.device)
        far = _far_parts(q.shape[2], k.shape[2], n, q.device)
        joined = _Joined(q)
        ctx.near = [(part, joined.attend(part, q, near_k, v, scale, kernel)) for part in near]
        ctx.far = [(part, joined.attend(part, q, far_k, v, scale, kernel)) for part in far]
        out = joined.out.to(q.dtype)
        ctx.save_for_backward(q, near_k, far_k, v, out, joined.lse)
        ctx.scale, ctx.kernel = scale, kernel
        ctx.clamped = log_keep_BGT < MASKED
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, near_k, far_k, v, out, lse = ctx.saved_tensors
        grads = tuple(torch.zeros_like(x, dtype=lse.dtype) for x in (q, near_k, v))
        dbias = torch.zeros(near_k.shape[:3], dtype=lse.dtype, device=q.device)
        for parts, k, bias in ((ctx.near, near_k, None), (ctx.far, far_k, dbias)):
            for part, state in parts:
                _part_backward(
                    part, state, grad_out, q, k, v, out, lse, ctx.scale, ctx.kernel, grads, bias
                )
        dq, dk, dv = grads
        gates.borrowed(dq).zero_()
        gates.borrowed(dk).zero_()
        dlog_keep = torch.zeros_like(dbias)
        dlog_keep[..., 1:] = dbias[..., :-1] / (ctx.scale * bias_unit(ctx.scale))
        dlog_keep = dlog_keep.masked_fill(ctx.clamped, 0.0)
        dq, dk, dv = dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)
        return dq, dk, dv, dlog_keep, None, None, None


class _DelayedAttention(torch.autograd.Function):
    """All tensors (B, heads, T, D). `n` is at least 1."""

    @staticmethod
    def forward(ctx, q, k, v, merged_k, merged_v, log_keep_BGT, n, scale, kernel: Kernel):
        near_q, near_k = q.clone(), k.clone()
        gates.borrowed(near_q).zero_()
        gates.borrowed(near_k).zero_()
        joined = _Joined(q)
        near = _near_parts(q.shape[2], k.shape[2], n, q.device)
        ctx.near = [(part, joined.attend(part, near_q, near_k, v, scale, kernel)) for part in near]
        num_entries = k.shape[2] - n  # states that some query sees
        ctx.first = max(0, n - (k.shape[2] - q.shape[2]))  # the first query that sees one
        ctx.states = far = None
        if num_entries > 0:
            far_q, far_k, far_out, far_lse, p_own, ctx.states = shifted_forward(
                q[:, :, ctx.first :], merged_k[:, :, :num_entries], merged_v[:, :, :num_entries],
                log_keep_BGT[..., :num_entries], scale, kernel,
            )  # fmt: skip
            seen = joined.out[:, :, ctx.first :], joined.lse[..., ctx.first :]
            both, lse = join_by_lse(*seen, far_out, far_lse)
            seen[0].copy_(both)
            seen[1].copy_(lse)
            far = far_q, far_k, merged_v, p_own * torch.exp(far_lse - lse)
        out = joined.out.to(q.dtype)
        ctx.save_for_backward(near_q, near_k, v, out, joined.lse, *(far or ()))
        ctx.scale, ctx.kernel = scale, kernel
        ctx.clamped = log_keep_BGT < MASKED
        return out

    @staticmethod
    def backward(ctx, grad_out):
        q, k, v, out, lse, *far = ctx.saved_tensors
        grads = tuple(torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
        for part, state in ctx.near:
            _part_backward(part, state, grad_out, q, k, v, out, lse, ctx.scale, ctx.kernel, grads)
        dq, dk, dv = grads
        gates.borrowed(dq).zero_()
        gates.borrowed(dk).zero_()
        dmerged_k, dmerged_v = torch.zeros_like(k), torch.zeros_like(v)
        dlog_keep = torch.zeros(k.shape[:3], dtype=lse.dtype, device=k.device)
        if far:
            far_q, far_k, merged_v, p_own = far
            num_entries, rows = far_k.shape[2], slice(ctx.first, None)
            far_dq, far_dk, far_dv, dbias = shifted_backward(
                grad_out[:, :, rows], far_q, far_k, merged_v[:, :, :num_entries], out[:, :, rows],
                lse[..., rows], p_own, ctx.states, ctx.scale, ctx.kernel,
            )  # fmt: skip
            dq[:, :, rows] += far_dq
            dmerged_k[:, :, :num_entries] = far_dk
            dmerged_v[:, :, :num_entries] = far_dv
            dlog_keep[..., :num_entries] = dbias.masked_fill(ctx.clamped[..., :num_entries], 0.0)
        dq, dk, dv = dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)
        return dq, dk, dv, dmerged_k, dmerged_v, dlog_keep, None, None, None


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
    kernel, joined = choose_kernel(q, k, v), _Joined(q)
    for part in _near_parts(q.shape[2], k.shape[2], num_recent, q.device):
        joined.attend(part, q, k, v, softmax_scale, kernel)
    return joined.out[0].transpose(0, 1).to(q_TND.dtype), joined.lse[0].T
