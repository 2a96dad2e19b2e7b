"""Near tokens, open states and their join to a stock kernel's output on CPUs, a back end of `ops.backends.NEAR`."""

import torch
from torch import Tensor

from megatron_dmc.ops.cpu import DIM_STEP, operators, tensor_refusal
from megatron_dmc.ops.tensors import dense_channels, empty_tokens_first
from megatron_dmc.ops.training.near import KeyValue

MAX_NEAR = 65
"""Raw tokens that a query sees: of more, products of whole blocks (`ops.training.band`) are faster."""


def refusal(q_BNTD: Tensor, n: int) -> str:
    """See `ops.backends`."""
    if reason := tensor_refusal(q_BNTD):
        return reason
    if n > MAX_NEAR:
        return f"a query sees {n} raw tokens, more than {MAX_NEAR}"
    if q_BNTD.shape[-1] % DIM_STEP:
        return f"head_dim={q_BNTD.shape[-1]}; the kernels take multiples of {DIM_STEP}"
    return ""


def _dense(keys: KeyValue | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if keys is None else (dense_channels(keys.k), dense_channels(keys.v))


def join(q_BNTD, near, opened, far, n, scale):
    """As `megatron_dmc.ops.training.near.join`."""
    q = dense_channels(q_BNTD)
    out, lse = empty_tokens_first(q), torch.empty(q.shape[:3], dtype=torch.float32)
    far_out, far_lse = (None, None) if far is None else far
    if far is not None:
        far_out = dense_channels(far_out).to(q.dtype)
        far_lse = far_lse.to(torch.float32).contiguous()
    operators().near_join.default(
        q, *_dense(near), *_dense(opened), far_out, far_lse, out, lse, n, scale
    )
    return out, lse, None


def add_gradients(
    grad_out_BNTD, q_BNTD, out_BNTD, lse_BNT, near, opened, far_grads, n, scale, state
):
    """As `megatron_dmc.ops.training.near.add_gradients`."""
    g, q, out = (dense_channels(x) for x in (grad_out_BNTD, q_BNTD, out_BNTD))
    far = (None,) * 3
    if far_grads is not None:
        far = tuple(dense_channels(x).to(q.dtype) for x in far_grads)
    dq = empty_tokens_first(q)
    keys = near or opened
    d_near, d_open = (
        None if x is None else KeyValue(*(empty_tokens_first(keys.k) for _ in "kv"))
        for x in (near, opened)
    )
    operators().near_gradients.default(
        g, q, out, lse_BNT.contiguous(), *_dense(near), *_dense(opened), *far, dq,
        *(d_near or (None, None)), *(d_open or (None, None)), n, scale,
    )  # fmt: skip
    return dq, d_near, d_open
