"""The specification in plain PyTorch: naive, dense where that is clearest, and the oracle of every kernel.

Nothing here is fast. Tests call it, and benchmarks before they time anything; nothing else does.
Equations: Nawrot et al., "Dynamic Memory Compression" (arXiv 2403.09636) as fixed in docs/method.md.

Tensors are float32 or float64 unless said otherwise.

Gates are elementwise and live in `ops.gates`; they are the same functions everywhere.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dmc.ops.gates import (  # noqa: F401  (the gates are part of the specification)
    content_channels,
    decision_logit,
    hard_decisions,
    hard_gate,
    importance,
    logistic_noise,
    soft_gate,
    zero_borrowed_channel,
)


def merge(
    k_TBGD: Tensor, v_TBGD: Tensor, alpha_TBG: Tensor, omega_TBG: Tensor, *, merge_window: int = 0
) -> tuple[Tensor, Tensor]:
    """`y_t = A_t / z_t`, token by token, for keys and values alike (section 2).

    With a window, the explicit sum over the latest W tokens:
    `y_t = sum_{t-W < j <= t} (prod_{j < l <= t} alpha_l) omega_j x_j / (same sum without x_j)`.
    """
    x = torch.cat([k_TBGD, v_TBGD], dim=-1)
    rows = []
    if merge_window == 0:
        num = torch.zeros_like(x[0])
        den = torch.zeros_like(omega_TBG[0])
        for t in range(x.shape[0]):
            alpha = alpha_TBG[t] if t else torch.zeros_like(alpha_TBG[t])
            num = alpha[..., None] * num + omega_TBG[t][..., None] * x[t]
            den = alpha * den + omega_TBG[t]
            rows.append(num / den[..., None])
    else:
        for t in range(x.shape[0]):
            num, den = torch.zeros_like(x[t]), torch.zeros_like(omega_TBG[t])
            chain = torch.ones_like(omega_TBG[t])
            for j in range(t, max(t - merge_window, -1), -1):
                num = num + (chain * omega_TBG[j])[..., None] * x[j]
                den = den + chain * omega_TBG[j]
                chain = chain * alpha_TBG[j]
            rows.append(num / den[..., None])
    y = torch.stack(rows)
    return y[..., : k_TBGD.shape[-1]], y[..., k_TBGD.shape[-1] :]


def rotate(x_TXD: Tensor, freqs_TF: Tensor) -> Tensor:
    """RoPE, half-split layout, on the first F channels; the rest pass. T leads, any X between."""
    shape = (freqs_TF.shape[0],) + (1,) * (x_TXD.dim() - 2) + (freqs_TF.shape[1],)
    cos, sin = (
        freqs_TF.cos().to(x_TXD.dtype).view(shape),
        freqs_TF.sin().to(x_TXD.dtype).view(shape),
    )
    rotated, passed = x_TXD.split([freqs_TF.shape[1], x_TXD.shape[-1] - freqs_TF.shape[1]], dim=-1)
    a, b = rotated.chunk(2, dim=-1)
    return torch.cat([rotated * cos + torch.cat([-b, a], dim=-1) * sin, passed], dim=-1)


def training_attention(
    q_TBND: Tensor,
    k_TBGD: Tensor,
    v_TBGD: Tensor,
    log_keep_TBG: Tensor,
    *,
    softmax_scale: float | None = None,
) -> Tensor:
    """The dense formula of section 3, with its T x T scores. The borrowed channel is excluded."""
    num_tokens, _, num_heads, dim = q_TBND.shape
    scale = 1.0 / math.sqrt(dim) if softmax_scale is None else softmax_scale
    repeats = num_heads // k_TBGD.shape[2]
    k, v = (x.repeat_interleave(repeats, dim=2) for x in (k_TBGD, v_TBGD))
    scores = scale * torch.einsum("ibnd,jbnd->bnij", content_channels(q_TBND), content_channels(k))
    shifted = torch.cat([log_keep_TBG[1:], torch.zeros_like(log_keep_TBG[:1])])
    bias = shifted.repeat_interleave(repeats, dim=2).permute(1, 2, 0)[:, :, None, :]
    eye = torch.eye(num_tokens, dtype=torch.bool, device=k.device)
    scores = torch.where(eye, scores, scores + bias)
    future = torch.ones_like(eye).triu(1)
    scores = scores.masked_fill(future, float("-inf"))
    return torch.einsum("bnij,jbnd->ibnd", scores.softmax(-1), v)


def eviction_attention(
    q_TBND: Tensor,
    k_TBGD: Tensor,
    v_TBGD: Tensor,
    log_keep_TBG: Tensor,
    *,
    delay: int,
    softmax_scale: float | None = None,
) -> Tensor:
    """The dense formula of section 8, with its T x T scores. The borrowed channel is excluded."""
    num_tokens, _, num_heads, dim = q_TBND.shape
    scale = 1.0 / math.sqrt(dim) if softmax_scale is None else softmax_scale
    repeats = num_heads // k_TBGD.shape[2]
    k, v = (x.repeat_interleave(repeats, dim=2) for x in (k_TBGD, v_TBGD))
    scores = scale * torch.einsum("ibnd,jbnd->bnij", content_channels(q_TBND), content_channels(k))
    shifted = torch.cat([log_keep_TBG[1:], torch.zeros_like(log_keep_TBG[:1])])
    bias = shifted.repeat_interleave(repeats, dim=2).permute(1, 2, 0)[:, :, None, :]
    tokens = torch.arange(num_tokens, device=k.device)
    age = tokens[:, None] - tokens
    scores = torch.where(age > delay, scores + bias, scores).masked_fill(age < 0, float("-inf"))
    return torch.einsum("bnij,jbnd->ibnd", scores.softmax(-1), v)


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
) -> Tensor:
    """The dense formula of section 9, with its T x T scores. The borrowed channel is excluded.

    A query sees the last `merge_delay` tokens raw and everything before them as entries, the newest
    of which has no bias. A delay of 0 is `training_attention` over the merged keys.
    """
    num_tokens, _, num_heads, dim = q_TBND.shape
    scale = 1.0 / math.sqrt(dim) if softmax_scale is None else softmax_scale
    repeats = num_heads // k_TBGD.shape[2]
    k, v, merged_k, merged_v = (
        x.repeat_interleave(repeats, dim=2) for x in (k_TBGD, v_TBGD, merged_k_TBGD, merged_v_TBGD)
    )
    raw = scale * torch.einsum("ibnd,jbnd->bnij", content_channels(q_TBND), content_channels(k))
    merged = scale * torch.einsum(
        "ibnd,jbnd->bnij", content_channels(q_TBND), content_channels(merged_k)
    )
    shifted = torch.cat([log_keep_TBG[1:], torch.zeros_like(log_keep_TBG[:1])])
    bias = shifted.repeat_interleave(repeats, dim=2).permute(1, 2, 0)[:, :, None, :]
    tokens = torch.arange(num_tokens, device=k.device)
    age = tokens[:, None] - tokens
    merged = torch.where(age > merge_delay, merged + bias, merged)
    scores = torch.where(age < merge_delay, raw, merged).masked_fill(age < 0, float("-inf"))
    weights = scores.softmax(-1)
    near = torch.einsum("bnij,jbnd->ibnd", weights * (age < merge_delay), v)
    return near + torch.einsum("bnij,jbnd->ibnd", weights * (age >= merge_delay), merged_v)


@dataclass
class Segment:
    """An open segment of one (request, layer, KV head): sums in float32, key unrotated (section 6).

    Three verbs: `open` with a token, `merge` a token in, `emit` the entry. For a merge window the
    last W weighted tokens are kept instead of one running sum, oldest first.
    """

    merge_window: int
    kv_sum_D: Tensor
    omega_sum: Tensor
    latest: list[tuple[Tensor, Tensor]]

    @classmethod
    def open(cls, kv_D: Tensor, omega: Tensor, *, merge_window: int) -> "Segment":
        weighted = omega * kv_D
        return cls(merge_window, weighted, omega.clone(), [(weighted, omega)])

    def merge(self, kv_D: Tensor, omega: Tensor) -> None:
        weighted = omega * kv_D
        if self.merge_window:
            self.latest = (self.latest + [(weighted, omega)])[-self.merge_window :]
            self.kv_sum_D = torch.stack([w for w, _ in self.latest]).sum(0)
            self.omega_sum = torch.stack([o for _, o in self.latest]).sum(0)
        else:
            self.kv_sum_D = self.kv_sum_D + weighted
            self.omega_sum = self.omega_sum + omega

    def emit(self) -> Tensor:
        return self.kv_sum_D / self.omega_sum


class HeadCache:
    """The cache of one (request, layer, KV head), as section 6 describes it, with no pages.

    Attributes:
        keys, values: lists of (D,) rotated entries; the last one belongs to the open segment.
        segment: the open segment, or None before the first token.
    """

    def __init__(self, *, merge_window: int = 0):
        self.merge_window = merge_window
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.segment: Segment | None = None

    def append(
        self, k_D: Tensor, v_D: Tensor, is_merge: bool, omega: Tensor, freqs_F: Tensor
    ) -> None:
        """One decoded token: merge into the open segment or open a new one, then write its entry.

        Args:
            k_D: unrotated key with the borrowed channel already 0; v_D: value.
            is_merge: hard decision; ignored for the first token.
            omega: importance, scalar.
            freqs_F: RoPE angles of the token's position.
        """
        kv = torch.cat([k_D, v_D])
        if is_merge and self.segment is not None:
            self.segment.merge(kv, omega)
            self.keys.pop()
            self.values.pop()
        else:
            self.segment = Segment.open(kv, omega, merge_window=self.merge_window)
        entry = self.segment.emit()
        key = rotate(entry[None, : k_D.shape[0]], freqs_F[None])[0]
        self.keys.append(zero_borrowed_channel(key))
        self.values.append(entry[k_D.shape[0] :])

    def attend(self, q_RD: Tensor, *, softmax_scale: float) -> Tensor:
        """Attention of the group's rotated queries over all entries of this head: (R, D)."""
        keys, values = torch.stack(self.keys), torch.stack(self.values)
        return (softmax_scale * q_RD @ keys.T).softmax(-1) @ values


def paged_decode_attention(
    q_BND: Tensor,
    k_pages_PSD: Tensor,
    v_pages_PSD: Tensor,
    block_table_BGM: Tensor,
    num_entries_BG: Tensor,
    *,
    softmax_scale: float,
) -> Tensor:
    """One query token per request over per-head ragged pages (section 6).

    Args:
        q_BND: rotated queries.
        k_pages_PSD, v_pages_PSD: the pool; a page holds S slots of one KV head of one layer.
        block_table_BGM: int page ids; entry e of a head sits in page `[e // S]`, slot `e % S`.
        num_entries_BG: int, may be 0 (the output is then 0).

    Returns:
        out_BND.
    """
    batch, num_heads, _ = q_BND.shape
    num_kv_heads, page_size = block_table_BGM.shape[1], k_pages_PSD.shape[1]
    group = num_heads // num_kv_heads
    out = torch.zeros_like(q_BND)
    for b in range(batch):
        for g in range(num_kv_heads):
            entries = int(num_entries_BG[b, g])
            if entries == 0:
                continue
            pages = block_table_BGM[b, g, : -(-entries // page_size)].long()
            keys = k_pages_PSD[pages].flatten(0, 1)[:entries]
            values = v_pages_PSD[pages].flatten(0, 1)[:entries]
            heads = slice(g * group, (g + 1) * group)
            out[b, heads] = (softmax_scale * q_BND[b, heads] @ keys.T).softmax(-1) @ values
    return out


def prefill(
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    is_merge_TG: Tensor,
    omega_TG: Tensor,
    freqs_TF: Tensor,
    caches: list[HeadCache],
    *,
    softmax_scale: float,
) -> Tensor:
    """A chunk of one request's prompt, continuing from `caches` (mutated), token by token.

    The oracle for the parallel prefill: by section 6 any chunking gives what decoding the tokens
    one at a time gives, so this simply does that.

    Args:
        q_TND: unrotated queries; k_TGD: unrotated keys; both with the borrowed channel already 0.
        is_merge_TG, omega_TG: hard decisions and importances; freqs_TF: RoPE angles.
        caches: one `HeadCache` for each of the G heads.

    Returns:
        out_TND.
    """
    group = q_TND.shape[1] // k_TGD.shape[1]
    q = zero_borrowed_channel(rotate(q_TND, freqs_TF))
    out = torch.zeros_like(q)
    for t in range(q.shape[0]):
        for g, cache in enumerate(caches):
            cache.append(
                k_TGD[t, g], v_TGD[t, g], bool(is_merge_TG[t, g]), omega_TG[t, g], freqs_TF[t]
            )
            heads = slice(g * group, (g + 1) * group)
            out[t, heads] = cache.attend(q[t, heads], softmax_scale=softmax_scale)
    return out
