"""Dynamic Memory Compression (DMC): merge and attention, in plain PyTorch.

Nawrot et al., "Dynamic Memory Compression: Retrofitting LLMs for Accelerated Inference", ICML 2024,
arXiv 2403.09636. Every token has, for each KV head, a decision (append a cache entry, or merge into the
newest one) and an importance (its weight in the entry): `gates_dmc.py`.

A decision may take effect n tokens later: with a merge delay (n of them), or with delayed eviction (DMS: one
more than its delay, since a token's decision is about the token before it). A query then sees the last n tokens
raw (near) and those before them as the cache holds them (far).

Dimension letters: T tokens, B batch, N query heads, G key/value heads, D head dim, E cache entries,
P entries cached before these tokens, A = 2 D + 1 components of a segment's sums, X tokens of a line (`Ring`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

QUERY_BLOCK = 1024
"""Queries whose scores are computed at a time: bounds the memory of masks in long prompts."""


def weigh(k_TBGD: Tensor, v_TBGD: Tensor, omega_TBG: Tensor) -> Tensor:
    """`[omega k, omega v, omega]`, float32 (float64 for float64 keys): (T, B, G, A)."""
    dtype = torch.float64 if k_TBGD.dtype == torch.float64 else torch.float32
    omega = omega_TBG.to(dtype)[..., None]
    return torch.cat([k_TBGD.to(dtype) * omega, v_TBGD.to(dtype) * omega, omega], dim=-1)


def _later(x: Tensor, steps: int) -> Tensor:
    """x moved `steps` tokens later, zeros in front."""
    if steps == 0:
        return x
    return torch.cat([torch.zeros_like(x[:steps]), x[:-steps]])


def merge_sums(alpha_TBG: Tensor, x_TBGA: Tensor, merge_window: int) -> Tensor:
    """`s_t = alpha_t s_{t-1} + x_t`; with a window W only its latest W terms. Differentiable.

    Without a window by doubling, log2(T) steps: after each, s covers twice as many tokens.
    """
    decay, sums = alpha_TBG.to(x_TBGA.dtype)[..., None], x_TBGA
    num_tokens = x_TBGA.shape[0]
    if merge_window:
        chain = torch.ones_like(decay)
        for age in range(1, min(merge_window, num_tokens)):
            chain = chain * _later(decay, age - 1)
            sums = sums + chain * _later(x_TBGA, age)
        return sums
    step = 1
    while step < num_tokens:
        sums = sums + decay * _later(sums, step)
        decay = decay * _later(decay, step)
        step *= 2
    return sums


def merge(
    k_TBGD: Tensor, v_TBGD: Tensor, alpha_TBG: Tensor, omega_TBG: Tensor, *, merge_window: int = 0
) -> tuple[Tensor, Tensor]:
    """Running weighted means of unrotated keys and values, `y_t = A_t / z_t` with
    `A_t = alpha_t A_{t-1} + omega_t x_t` and `z_t = alpha_t z_{t-1} + omega_t`, in float32.

    With a merge window W only the latest W tokens contribute to y_t.
    """
    sums = merge_sums(alpha_TBG, weigh(k_TBGD, v_TBGD, omega_TBG), merge_window)
    return means(sums, k_TBGD)


def means(sums_TBGA: Tensor, k_TBGD: Tensor) -> tuple[Tensor, Tensor]:
    """The sums' averages, keys and values, in the dtype of `k_TBGD`."""
    y = (sums_TBGA[..., :-1] / sums_TBGA[..., -1:]).to(k_TBGD.dtype)
    key, value = y.split([k_TBGD.shape[-1], y.shape[-1] - k_TBGD.shape[-1]], dim=-1)
    return key, value


def rotate(x_TBHD: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE, half-split, with transformers' cos and sin of (B, T, D)."""
    # autocast makes x narrower than the embeddings that cos and sin were made for
    cos, sin = (e.transpose(0, 1).unsqueeze(2).to(x_TBHD.dtype) for e in position_embeddings)
    return x_TBHD * cos + rotate_half(x_TBHD) * sin


def keeps_next(log_keep_XBG: Tensor, num_states: int) -> Tensor:
    """`log_keep` of the token behind each of the first states; 0 where there is none."""
    return F.pad(log_keep_XBG[1:], (0, 0, 0, 0, 0, 1))[:num_states]


def attend(
    q_TBND: Tensor,
    far: tuple[Tensor, Tensor],
    log_keep_XBG: Tensor | None,
    *,
    softmax_scale: float,
    near: tuple[Tensor, Tensor] | None = None,
    n: int = 0,
    evicts: bool = False,
    before_B: Tensor | None = None,
    cached_BGP: Tensor | None = None,
    document_TB: Tensor | None = None,
    implementation: str = "sdpa",
) -> tuple[Tensor, Tensor | None]:
    """Causal attention in which key j counts for a later query with weight `1 - alpha_{j+1}`. For the query i

        i - n < j <= i :  score_ij = q_i . k_j / sqrt(D)                       near: raw
        j = i - n      :  score_ij = q_i . y_j / sqrt(D)                       far; evicting: as below
        j < i - n      :  score_ij = q_i . y_j / sqrt(D) + log_keep_{j+1}      far

    Args:
        far: keys and values (E, B, G, D), rotated: P cached entries, then the states of the line's first
            tokens; evicting: their raw keys and values.
        log_keep_XBG: `log(1 - alpha)` of the line's tokens; None: nothing merges.
        near: rotated raw keys and values of the line, (X, B, G, D). None: n is 0.
        before_B: tokens of the line before the first query; None: none.
        cached_BGP: bool, which of the cached entries exist and are visible; None: none are cached.
        document_TB: number of each token's document, without a cache; other documents are invisible.
        implementation: "sdpa", or "eager", which also returns the weights.

    Returns:
        out_TBND, and weights_BNTY over far and near, or None.
    """
    sources = (far,) if near is None else (far, near)
    q = q_TBND.permute(1, 2, 0, 3)
    k, v = (torch.cat(xs).permute(1, 2, 0, 3) for xs in zip(*sources, strict=True))
    num_tokens, num_past = q.shape[2], 0 if cached_BGP is None else cached_BGP.shape[-1]
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k, v))
    states = torch.arange(far[0].shape[0] - num_past, device=q.device)
    if log_keep_XBG is None:
        keep = q.new_zeros(1, 1, 1, len(states))
    else:
        keep = keeps_next(log_keep_XBG, len(states)).permute(1, 2, 0)[:, :, None].to(q.dtype)
    row = torch.arange(near[0].shape[0] if near else 0, device=q.device)
    at_BT = torch.arange(num_tokens, device=q.device)[None]
    if before_B is not None:
        at_BT = at_BT + before_B[:, None]
    outs, all_weights = [], []
    for start in range(0, num_tokens, QUERY_BLOCK):
        block = slice(start, min(start + QUERY_BLOCK, num_tokens))
        at = at_BT[:, None, block, None]
        # without raw tokens the states are those of the queries: none behind the block is visible
        state = states if near else states[: block.stop]
        hidden_far, hidden_near = state > at - n, (row > at) | (row <= at - n)
        if document_TB is not None:
            of_row = document_TB.T[:, None]
            other = of_row[:, :, block, None] != of_row[:, :, None]
            hidden_far = hidden_far | other[..., : len(state)]
            hidden_near = hidden_near | other[..., : len(row)]
        bias_far = keep[..., : len(state)]
        if not evicts:
            bias_far = bias_far.masked_fill(state == at - n, 0.0)
        parts = [bias_far.masked_fill(hidden_far, float("-inf"))]
        if near:
            parts.append(_hide(hidden_near, q.dtype))
        if cached_BGP is not None:
            parts.insert(0, _hide(~cached_BGP, q.dtype)[:, :, None])
        lead = torch.broadcast_shapes(*(x.shape[:3] for x in parts))
        bias = torch.cat([x.expand(*lead, -1) for x in parts], dim=-1)
        if bias.shape[1] > 1:
            bias = bias.repeat_interleave(group, dim=1)
        keys, values = k[:, :, : bias.shape[-1]], v[:, :, : bias.shape[-1]]
        if implementation == "eager":
            scores = softmax_scale * q[:, :, block] @ keys.transpose(2, 3) + bias
            wide = torch.promote_types(q.dtype, torch.float32)
            weights = scores.to(wide).softmax(-1).to(q.dtype)
            outs.append(weights @ values)
            all_weights.append(F.pad(weights, (0, k.shape[2] - weights.shape[-1])))
        else:
            outs.append(
                F.scaled_dot_product_attention(
                    q[:, :, block], keys, values, attn_mask=bias, scale=softmax_scale
                )
            )
    out = torch.cat(outs, dim=2).permute(2, 0, 1, 3)
    return out, torch.cat(all_weights, dim=2) if all_weights else None


def _hide(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias that hides keys: -inf where `hidden`, else 0."""
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, float("-inf"))
