"""Training attention whose decisions take effect some tokens later: DMC with a merge delay, and Dynamic
Memory Sparsification (DMS). docs/method.md, sections 8 and 9.

A query sees the last n tokens as they are (near) and everything before them compressed (far):

    near              i - j < n                raw
    far, evicting     i - j >= n               biased
    far, merging      i - j >= n, states       `training_attention`, keys n tokens later

DMS with the delay w has n = w + 1, since a token's own decision is read from the token after it; DMC
with the merge delay w has n = w. See `ops.training.compressed`.
"""

import math

from torch import Tensor

from megatron_dmc.ops.tensors import accumulator_dtype
from megatron_dmc.ops.training.attention import training_attention
from megatron_dmc.ops.training.band import choose_band
from megatron_dmc.ops.training.compressed import CompressedAttention
from megatron_dmc.ops.training.flash import Kernel, choose_kernel


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
    q, k, v, log_keep = tensors
    out = CompressedAttention.apply(q, k, v, None, None, log_keep, delay + 1, scale, kernel)
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
    out = CompressedAttention.apply(*tensors, merge_delay, scale, kernel)
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
