"""The keys that are not the stock kernel's: a query's raw tokens and its open state, joined to what the kernel gave.

    near    i - n < j <= i    score_ij = scale q_i . k_j         raw key and value
    open    j = i - n         score_ij = scale q_i . y_j         the state of the open segment
    far     the keys before these, with a bias: a stock kernel's output and log-sum-exp

Plain DMC has n = 0 and nothing near: each token's own state is open, the diagonal of docs/method.md, section 3. DMC
with the merge delay w has n = w; eviction (DMS) with the delay w has n = w + 1 and no open state, since its decision
about a token is read from the token after it.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dmc.ops import gates
from megatron_dmc.ops.tensors import accumulator_dtype
from megatron_dmc.ops.training.band import choose_band


class KeyValue(NamedTuple):
    """Keys and values of tokens, (B, G, T, D); what the keys' borrowed channel holds does not count."""

    k: Tensor
    v: Tensor


def _by_group(x_BNTX: Tensor, num_kv_heads: int) -> Tensor:
    return x_BNTX.unflatten(1, (num_kv_heads, -1))


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


class _Open:
    """The last queries, which have an open state, and the states."""

    def __init__(self, q_BNTD: Tensor, opened: KeyValue, n: int, scale: float):
        num_keys = opened.k.shape[2]
        self.count = min(q_BNTD.shape[2], max(0, num_keys - n))
        self.num_kv_heads, self.acc, self.scale = (
            opened.k.shape[1],
            accumulator_dtype(q_BNTD.dtype),
            scale,
        )
        self.keys = slice(num_keys - n - self.count, num_keys - n)
        self.q, self.k, self.v = (
            self.rows(q_BNTD),
            *(x[:, :, None, self.keys].to(self.acc) for x in opened),
        )

    def rows(self, x_BNTX: Tensor) -> Tensor:
        """(B, G, R, T, X) of the queries with an open state."""
        x = x_BNTX[:, :, x_BNTX.shape[2] - self.count :]
        return _by_group(x, self.num_kv_heads).to(self.acc)

    def scores(self) -> Tensor:
        q, k = gates.content_channels(self.q), gates.content_channels(self.k)
        return (q * k).sum(-1) * self.scale

    def gradients(self, p, g, delta) -> tuple[Tensor, Tensor, Tensor]:
        """Of q_BNTD, k_BGTD, v_BGTD, from the probabilities (B, G, R, T)."""
        ds = (p * ((g * self.v).sum(-1) - delta) * self.scale)[..., None]
        return (ds * self.k).flatten(1, 2), (ds * self.q).sum(2), (p[..., None] * g).sum(2)


def _join_last(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor) -> None:
    """Join what the last queries see besides, in place."""
    rows = slice(out.shape[2] - part_out.shape[2], None)
    joined, joined_lse = join_by_lse(
        out[:, :, rows], lse[:, :, rows], part_out, part_lse.to(lse.dtype)
    )
    out[:, :, rows], lse[:, :, rows] = joined, joined_lse


def join(
    q_BNTD: Tensor,
    near: KeyValue | None,
    opened: KeyValue | None,
    far: tuple[Tensor, Tensor] | None,
    n: int,
    scale: float,
) -> tuple[Tensor, Tensor, Any]:
    """Attention to all of a query's keys from the far part's.

    Args:
        q_BNTD: queries of the last tokens; the borrowed channel does not count.
        near: raw keys and values of all tokens; None exactly if n is 0.
        opened: each token's state; None: no query has an open one.
        far: out_BNTD and lse_BNT of the last queries, all those that have a far key; None: no query has.
        n: raw tokens that a query sees.

    Returns:
        out_BNTD in q's dtype; lse_BNT, float32 (float64); and a state for `add_gradients`.
    """
    acc = accumulator_dtype(q_BNTD.dtype)
    state: Any = None
    if near is not None:
        near_k = gates.zero_borrowed_channel(near.k)
        band = choose_band(q_BNTD, near_k, near.v)
        out, lse, band_state = band.forward(q_BNTD, near_k, near.v, n, scale)
        out, lse, state = out.to(acc), lse.to(acc), (band, band_state)
    if opened is not None:
        states = _Open(q_BNTD, opened, n, scale)
        open_out, open_lse = (
            states.v.expand(states.q.shape).flatten(1, 2),
            states.scores().flatten(1, 2),
        )
        if near is None:
            out, lse = open_out.clone(), open_lse
        else:
            _join_last(out, lse, open_out, open_lse)
    if far is not None:
        _join_last(out, lse, *far)
    # in the queries' layout, tokens first: what the projection behind attention wants
    return torch.empty_like(q_BNTD).copy_(out), lse, state


def add_gradients(
    grad_out_BNTD: Tensor,
    q_BNTD: Tensor,
    out_BNTD: Tensor,
    lse_BNT: Tensor,
    near: KeyValue | None,
    opened: KeyValue | None,
    far_grads: tuple[Tensor, Tensor, Tensor] | None,
    n: int,
    scale: float,
    state: Any,
) -> tuple[Tensor, KeyValue | None, KeyValue | None]:
    """Gradients of the queries and of both kinds of keys: the far part's and those of `join`.

    Args:
        out_BNTD, lse_BNT, state: what `join` returned; the other arguments as there.
        far_grads: dq of the queries with a far key; dk, dv of the first keys, all those that some query
            has as far ones: the states, or without `opened` the raw keys.

    Returns:
        dq_BNTD, and the gradients of `near` and `opened`, in the inputs' dtype; those of the borrowed channel are 0.
    """
    acc = lse_BNT.dtype
    g, o = grad_out_BNTD.to(acc), out_BNTD.to(acc)
    dq = torch.zeros_like(q_BNTD, dtype=acc)
    d_near: list[Tensor] | None = None
    d_open: list[Tensor] | None = None
    if near is not None:
        band, band_state = state
        near_k = gates.zero_borrowed_channel(near.k)
        near_dq, *d_near = band.backward(
            grad_out_BNTD, q_BNTD, near_k, near.v, out_BNTD, lse_BNT, band_state, n, scale
        )
        dq += near_dq
        d_near = [x.to(acc) for x in d_near]
    if opened is not None:
        states = _Open(q_BNTD, opened, n, scale)
        p = torch.exp(states.scores() - states.rows(lse_BNT[..., None])[..., 0])
        delta = states.rows((g * o).sum(-1, keepdim=True))[..., 0]
        open_dq, *open_grads = states.gradients(p, states.rows(g), delta)
        dq[:, :, dq.shape[2] - states.count :] += open_dq
        d_open = [torch.zeros_like(x, dtype=acc) for x in opened]
        for x, grad in zip(d_open, open_grads, strict=True):
            x[:, :, states.keys] = grad
    if far_grads is not None:
        far_dq, *far_dkv = far_grads
        dq[:, :, dq.shape[2] - far_dq.shape[2] :] += far_dq
        d_keys = d_near if d_open is None else d_open
        assert d_keys is not None
        for x, grad in zip(d_keys, far_dkv, strict=True):
            x[:, :, : grad.shape[2]] += grad
    gates.borrowed(dq).zero_()

    def finished(grads: list[Tensor] | None) -> KeyValue | None:
        if grads is None:
            return None
        gates.borrowed(grads[0]).zero_()
        return KeyValue(*(x.to(q_BNTD.dtype) for x in grads))

    return dq.to(q_BNTD.dtype), finished(d_near), finished(d_open)
