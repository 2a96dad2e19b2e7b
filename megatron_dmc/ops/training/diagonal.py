"""The diagonal term (each token's own key) added to a stock kernel's attention. docs/method.md, section 3.

`past_` marks what the stock kernel gave for queries 1 to T-1 over keys 0 to T-2; for T = 1 these are None.
"""

import torch
from torch import Tensor

from megatron_dmc.ops import gates
from megatron_dmc.ops.tensors import accumulator_dtype


def _by_group(x_BNTX: Tensor, num_kv_heads: int) -> Tensor:
    return x_BNTX.unflatten(1, (num_kv_heads, -1))


def join(
    q_BNTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    past_out_BNTD: Tensor | None,
    past_lse_BNT: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention to earlier keys joined by log-sum-exp with attention to the own key.

    Args:
        q_BNTD, k_BGTD: the borrowed channel does not count.

    Returns:
        out_BNTD in q's dtype; lse_BNT and the own key's probability p_own_BNT, float32 (float64).
    """
    num_kv_heads = k_BGTD.shape[1]
    acc = accumulator_dtype(q_BNTD.dtype)
    q_own = _by_group(gates.content_channels(q_BNTD), num_kv_heads).to(acc)
    k_own = gates.content_channels(k_BGTD)[:, :, None].to(acc)
    lse = ((q_own * k_own).sum(-1) * scale).flatten(1, 2)
    out = v_BGTD[:, :, None].expand(_by_group(q_BNTD, num_kv_heads).shape).flatten(1, 2)
    if past_out_BNTD is None or past_lse_BNT is None:
        return out, lse, torch.ones_like(lse)
    own = lse[:, :, 1:]
    past_lse = past_lse_BNT.to(acc)
    joint = torch.logaddexp(past_lse, own)
    p_own = torch.exp(own - joint)
    tail = past_out_BNTD.to(acc) * torch.exp(past_lse - joint)[..., None]
    tail = tail + out[:, :, 1:].to(acc) * p_own[..., None]
    return (
        torch.cat([out[:, :, :1], tail.to(out.dtype)], dim=2),
        torch.cat([lse[:, :, :1], joint], dim=2),
        torch.cat([torch.ones_like(lse[:, :, :1]), p_own], dim=2),
    )


def add_gradients(
    grad_out_BNTD: Tensor,
    q_BNTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    out_BNTD: Tensor,
    p_own_BNT: Tensor,
    past_grads: tuple[Tensor, Tensor, Tensor] | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v: the stock kernel's `past_grads` (dq, dk, dv) and the own keys' part.

    Returns:
        dq_BNTD, dk_BGTD, dv_BGTD in the inputs' dtype; those of the borrowed channel are 0.
    """
    num_kv_heads, acc = k_BGTD.shape[1], p_own_BNT.dtype
    g, o = grad_out_BNTD.to(acc), out_BNTD.to(acc)
    g_group = _by_group(g, num_kv_heads)
    ds = (g_group * v_BGTD[:, :, None].to(acc)).sum(-1).flatten(1, 2) - (g * o).sum(-1)
    ds = _by_group(p_own_BNT * ds * scale, num_kv_heads)[..., None]
    dq = (ds * k_BGTD[:, :, None].to(acc)).flatten(1, 2)
    dk = (ds * _by_group(q_BNTD, num_kv_heads).to(acc)).sum(2)
    dv = (_by_group(p_own_BNT, num_kv_heads)[..., None] * g_group).sum(2)
    if past_grads is not None:
        dq[:, :, 1:] += past_grads[0].to(acc)
        dk[:, :, :-1] += past_grads[1].to(acc)
        dv[:, :, :-1] += past_grads[2].to(acc)
    gates.borrowed(dq).zero_()
    gates.borrowed(dk).zero_()
    return dq.to(q_BNTD.dtype), dk.to(k_BGTD.dtype), dv.to(v_BGTD.dtype)
