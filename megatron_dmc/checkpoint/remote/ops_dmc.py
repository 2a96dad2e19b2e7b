"""Dynamic Memory Compression (DMC): merge and attention, in plain PyTorch.

Nawrot et al., "Dynamic Memory Compression: Retrofitting LLMs for Accelerated Inference", ICML 2024,
arXiv 2403.09636. Every token has, for each KV head, a decision (append a cache entry, or merge into the
newest one) and an importance (its weight in the entry): `gates_dmc.py`.

Dimension letters: T tokens, B batch, N query heads, G key/value heads, D head dim, E cache entries,
P entries cached before these tokens, A = 2 D + 1 components of a segment's sums.
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


def attend(
    q_TBND: Tensor,
    k_EBGD: Tensor,
    v_EBGD: Tensor,
    log_keep_TBG: Tensor | None,
    *,
    softmax_scale: float,
    cached_BGP: Tensor | None = None,
    document_TB: Tensor | None = None,
    implementation: str = "sdpa",
) -> tuple[Tensor, Tensor | None]:
    """Causal attention in which key j counts for a later query with weight `1 - alpha_{j+1}`:

        score_ij = q_i . y_j / sqrt(D) + log_keep_{j+1}   (j < i)      score_ii = q_i . y_i / sqrt(D)

    Args:
        k_EBGD, v_EBGD: P cached entries, then the T own states (E = P + T); rotated.
        log_keep_TBG: `log(1 - alpha_t)`; None: nothing merges.
        cached_BGP: bool, which of the cached entries exist and are visible.
        document_TB: number of each token's document; other documents are invisible.
        implementation: "sdpa", or "eager", which also returns the weights.

    Returns:
        out_TBND, and weights_BNTE or None.
    """
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_TBND, k_EBGD, v_EBGD))
    num_tokens, num_past = q.shape[2], k.shape[2] - q.shape[2]
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (k, v))
    index = torch.arange(num_tokens, device=q.device)
    if log_keep_TBG is None:
        superseded = q.new_zeros(1, 1, num_tokens)
    else:
        superseded = F.pad(log_keep_TBG[1:], (0, 0, 0, 0, 0, 1)).permute(1, 2, 0).to(q.dtype)
    outs, all_weights = [], []
    for start in range(0, num_tokens, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, num_tokens)
        i, j = index[start:stop, None], index[:stop]
        bias = superseded[:, :, None, :stop].masked_fill(i == j, 0.0)
        hidden = (j > i)[None, None]
        if document_TB is not None:
            rows = document_TB.T[:, None]
            hidden = hidden | (rows[:, :, start:stop, None] != rows[:, :, None, :stop])
        bias = bias.masked_fill(hidden, float("-inf"))
        if num_past:
            assert cached_BGP is not None
            past = torch.zeros_like(cached_BGP, dtype=q.dtype).masked_fill(
                ~cached_BGP, float("-inf")
            )
            past = past[:, :, None].expand(-1, -1, stop - start, -1)
            bias = torch.cat([past, bias.expand(*past.shape[:2], -1, -1)], dim=-1)
        if bias.shape[1] > 1:
            bias = bias.repeat_interleave(group, dim=1)
        keys, values = k[:, :, : num_past + stop], v[:, :, : num_past + stop]
        if implementation == "eager":
            scores = softmax_scale * q[:, :, start:stop] @ keys.transpose(2, 3) + bias
            wide = torch.promote_types(q.dtype, torch.float32)
            weights = scores.to(wide).softmax(-1).to(q.dtype)
            outs.append(weights @ values)
            all_weights.append(F.pad(weights, (0, num_tokens - stop)))
        else:
            outs.append(
                F.scaled_dot_product_attention(
                    q[:, :, start:stop], keys, values, attn_mask=bias, scale=softmax_scale
                )
            )
    out = torch.cat(outs, dim=2).permute(2, 0, 1, 3)
    return out, torch.cat(all_weights, dim=2) if all_weights else None
