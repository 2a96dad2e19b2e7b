"""Merge of keys and values into running segment averages. docs/method.md, section 2.

Local letters: C tokens of a chunk, X any leading dimensions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc.ops.backends import MERGE
from megatron_dmc.ops.tensors import accumulator_dtype

_CHUNK = 16


def linear_scan(decay_TX: Tensor, x_TXD: Tensor, initial_XD: Tensor | None = None) -> Tensor:
    """`s_t = decay_t * s_{t-1} + x_t`, in chunks: T/C + C sequential steps instead of T.

    Args:
        decay_TX: factors in [0, 1]; `decay_0` applies to `initial_XD`.
        x_TXD: increments, same dtype.
        initial_XD: s_{-1}; zero if None.

    Returns:
        s_TXD. Memory is O(T * C) besides the result. Not differentiable by itself.
    """
    num_tokens = decay_TX.shape[0]
    if num_tokens == 0:
        return x_TXD.clone()
    pad = -num_tokens % _CHUNK
    if pad:
        decay_TX = torch.cat([decay_TX, decay_TX.new_zeros(pad, *decay_TX.shape[1:])])
        x_TXD = torch.cat([x_TXD, x_TXD.new_zeros(pad, *x_TXD.shape[1:])])
    lead = decay_TX.shape[1:]
    dim = x_TXD.shape[-1]
    # (chunks, X, C) and (chunks, X, C, D)
    decay = decay_TX.reshape(-1, _CHUNK, lead.numel()).transpose(1, 2).contiguous()
    x = x_TXD.reshape(-1, _CHUNK, lead.numel(), dim).transpose(1, 2)
    # weights[i, j] = product of decay over (j, i]; entry_decay[i] = product over [0, i]
    weights = x.new_zeros(*decay.shape, _CHUNK)
    entry_decay = torch.empty_like(decay)
    row = weights.new_zeros(*decay.shape[:-1], _CHUNK)
    carried = torch.ones_like(decay[..., 0])
    for i in range(_CHUNK):
        row = row * decay[..., i, None]
        row[..., i] = 1.0
        weights[..., i, :] = row
        carried = carried * decay[..., i]
        entry_decay[..., i] = carried
    local = weights @ x
    state = (
        x.new_zeros(lead.numel(), dim)
        if initial_XD is None
        else initial_XD.reshape(lead.numel(), dim).to(x.dtype)
    )
    entering = []
    for c in range(decay.shape[0]):
        entering.append(state)
        state = entry_decay[c, :, -1, None] * state + local[c, :, -1]
    out = local + entry_decay[..., None] * torch.stack(entering).unsqueeze(2)
    out = out.transpose(1, 2).reshape(-1, *lead, dim)
    return out[:num_tokens]


def _window_band(decay_TX: Tensor, merge_window: int) -> Tensor:
    """band_TXW: the product of decay over (t - age, t] for ages W-1 to 0; 0 where t < age."""
    num_tokens = decay_TX.shape[0]
    columns = [torch.ones_like(decay_TX)]
    for age in range(1, min(merge_window, num_tokens)):
        factor = decay_TX[1 : num_tokens - age + 1] * columns[-1][age:]
        columns.append(F.pad(factor, (0, 0, age, 0)))
    columns += [torch.zeros_like(decay_TX)] * (merge_window - len(columns))
    return torch.stack(columns[::-1], dim=-1)


def _banded_product(band_TXW: Tensor, x_TXD: Tensor) -> Tensor:
    """out_TXD: `out_t` = sum over the latest W tokens of `band_t` times x, as a product per chunk.

    x is read once, forward and backward, instead of once per token of the window. Memory is
    O(T * (C + W)) besides the result.
    """
    num_tokens, num_columns, merge_window = band_TXW.shape
    dim, back = x_TXD.shape[-1], merge_window - 1
    chunk = max(2 * _CHUNK, back)
    pad = -num_tokens % chunk
    band = F.pad(band_TXW, (0, 0, 0, 0, 0, pad))
    band = band.reshape(-1, chunk, num_columns, merge_window).transpose(1, 2)
    # Row i moves i places to the right: W values and C zeros a row, read back one shorter.
    shifted = F.pad(band, (0, chunk)).flatten(2)[..., : chunk * (chunk + back)]
    weights = shifted.unflatten(2, (chunk, chunk + back))
    x = F.pad(x_TXD, (0, 0, 0, 0, 0, pad)) if pad else x_TXD
    x = x.reshape(-1, chunk, num_columns, dim).transpose(1, 2)
    if back:
        before = torch.cat([torch.zeros_like(x[:1, :, -back:]), x[:-1, :, -back:]])
        x = torch.cat([before, x], dim=2)
    return (weights @ x).transpose(1, 2).reshape(-1, num_columns, dim)[:num_tokens]


def window_scan(decay_TX: Tensor, x_TXD: Tensor, merge_window: int) -> Tensor:
    """`s_t` = sum of the latest `merge_window` x_j, each times the product of decay over (j, t].

    Args:
        decay_TX: factors in [0, 1].
        x_TXD: same dtype.
        merge_window: W, positive.

    Returns:
        s_TXD. Differentiable.
    """
    band = _window_band(decay_TX.flatten(1), merge_window)
    return _banded_product(band, x_TXD.flatten(1, -2)).view_as(x_TXD)


def _windowed(x_TBGE: Tensor, alpha_TBG: Tensor, omega_TBG: Tensor, merge_window: int) -> Tensor:
    """Windowed average of `x`, differentiable.

    The weights are normalised before the product with x: they are narrower than x.
    """
    omega = F.pad(omega_TBG.flatten(1), (0, 0, merge_window - 1, 0))
    weights = _window_band(alpha_TBG.flatten(1), merge_window) * omega.unfold(0, merge_window, 1)
    weights = weights / weights.sum(-1, keepdim=True)
    return _banded_product(weights, x_TBGE.flatten(1, 2)).view_as(x_TBGE)


class _UnlimitedMerge(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TBGE, alpha_TBG, omega_TBG):
        weighted = torch.cat([x_TBGE * omega_TBG[..., None], omega_TBG[..., None]], dim=-1)
        sums = linear_scan(alpha_TBG, weighted)
        z = sums[..., -1:].clone()  # a view would keep all of `sums` for the backward
        y = sums[..., :-1] / z
        ctx.save_for_backward(x_TBGE, alpha_TBG, omega_TBG, y, z)
        return y

    @staticmethod
    def backward(ctx, gy):
        x, alpha, omega, y, z = ctx.saved_tensors
        # reverse scan: g_t = source_t + alpha_{t+1} * g_{t+1}
        source = torch.cat([gy / z, -(gy * y).sum(-1, keepdim=True) / z], dim=-1)
        decay = torch.cat([torch.zeros_like(alpha[:1]), alpha[1:].flip(0)])
        grad = linear_scan(decay, source.flip(0)).flip(0)
        g_sum, g_z = grad[..., :-1], grad[..., -1]
        gx = omega[..., None] * g_sum
        gomega = (g_sum * x).sum(-1) + g_z
        zero = torch.zeros_like(z[:1])
        z_prev = torch.cat([zero, z[:-1]])
        y_prev = torch.cat([torch.zeros_like(y[:1]), y[:-1]])
        galpha = (g_sum * (y_prev * z_prev)).sum(-1) + g_z * z_prev[..., 0]
        return gx, galpha, gomega


def merge(
    k_TBGD: Tensor,
    v_TBGD: Tensor,
    alpha_TBG: Tensor,
    omega_TBG: Tensor,
    *,
    merge_window: int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Running weighted means of keys and values, `y_t = A_t / z_t` with

        A_t = alpha_t A_{t-1} + omega_t x_t        z_t = alpha_t z_{t-1} + omega_t

    over the unrotated keys and the values (docs/method.md, section 2). Differentiable in all tensors.

    Args:
        k_TBGD, v_TBGD: any floating dtype. The borrowed channel of the keys is merged like any
            other; callers zero it first.
        alpha_TBG: decisions in [0, 1]. `alpha_0` has no effect: nothing stands before token 0.
        omega_TBG: importances, positive.
        merge_window: W; only the latest W tokens contribute to y_t. 0 is unlimited.
        backend: of `ops.backends.MERGE`; None: the first that can.

    Returns:
        merged keys and values in the inputs' shapes and dtype. Sums are float32 (float64 for
        float64 inputs).

    Raises:
        ValueError: if `merge_window` is negative, shapes do not fit, or the backend cannot.
    """
    if merge_window < 0:
        raise ValueError(f"merge_window={merge_window} must be 0 (unlimited) or positive")
    if k_TBGD.shape[:3] != alpha_TBG.shape or alpha_TBG.shape != omega_TBG.shape:
        raise ValueError(
            f"merge: keys {tuple(k_TBGD.shape)}, alpha {tuple(alpha_TBG.shape)} and omega "
            f"{tuple(omega_TBG.shape)} must agree in (T, B, G)"
        )
    chosen = MERGE.choose(k_TBGD, v_TBGD, merge_window, backend=backend)
    if chosen != "torch":
        merged: tuple[Tensor, Tensor] = MERGE.kernels(chosen).merge(
            k_TBGD, v_TBGD, alpha_TBG, omega_TBG, merge_window=merge_window
        )
        return merged
    acc = accumulator_dtype(k_TBGD.dtype)
    kv = torch.cat([k_TBGD.to(acc), v_TBGD.to(acc)], dim=-1)
    alpha = alpha_TBG.to(acc)
    if alpha.shape[0] > 0:
        alpha = torch.cat([torch.zeros_like(alpha[:1]), alpha[1:]])
    if merge_window:
        y = _windowed(kv, alpha, omega_TBG.to(acc), merge_window)
    else:
        y = _UnlimitedMerge.apply(kv, alpha, omega_TBG.to(acc))
    y = y.to(k_TBGD.dtype)
    return y.split([k_TBGD.shape[-1], v_TBGD.shape[-1]], dim=-1)


def num_kept(merge_window: int) -> int:
    """U: weighted tokens that an open segment keeps. Unlimited merging keeps one running sum."""
    return max(merge_window, 1)


def continue_merge(
    k_TGD: Tensor,
    v_TGD: Tensor,
    is_merge_TG: Tensor,
    omega_TG: Tensor,
    segment_GUA: Tensor,
    *,
    merge_window: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """`merge` with hard decisions for a chunk of one sequence that continues an open segment.

    Args:
        k_TGD, v_TGD: unrotated keys with the borrowed channel zeroed, and values; T at least 1.
        is_merge_TG: bool; the first row says whether the chunk's first token joins `segment_GUA`.
        omega_TG: importances.
        segment_GUA: the open segment, float32 or float64: U = `num_kept(merge_window)` weighted
            tokens (oldest first, zero where there are fewer; for merge_window 0 their one sum), each
            `[omega k, omega v, omega]`. Zero before a sequence's first token. Not changed.
        merge_window: W; 0 is unlimited.

    Returns:
        merged keys and values in the inputs' dtype, and the open segment after the chunk.
    """
    acc = segment_GUA.dtype
    omega = omega_TG.to(acc)[..., None]
    weighted = torch.cat([k_TGD.to(acc) * omega, v_TGD.to(acc) * omega, omega], dim=-1)
    alpha = is_merge_TG.to(acc)
    if merge_window == 0:
        sums = linear_scan(alpha, weighted, segment_GUA[:, 0])
        segment = sums[-1][:, None].clone()
    else:
        # The kept tokens stand before the chunk as tokens that all merge.
        num_old = merge_window
        alpha = torch.cat([alpha.new_ones(num_old, alpha.shape[1]), alpha])
        weighted = torch.cat([segment_GUA.transpose(0, 1), weighted])
        sums = window_scan(alpha, weighted, merge_window)[num_old:]
        # a token is still part of the open segment if everything after it merged
        after = torch.cat([alpha[1:], torch.ones_like(alpha[:1])])[-merge_window:]
        alive = after.flip(0).cumprod(0).flip(0)
        segment = (weighted[-merge_window:] * alive[..., None]).transpose(0, 1).contiguous()
    y = (sums[..., :-1] / sums[..., -1:]).to(k_TGD.dtype)
    key, value = y.split([k_TGD.shape[-1], v_TGD.shape[-1]], dim=-1)
    return key, value, segment
