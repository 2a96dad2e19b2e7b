"""Stock flash attention kernels behind one interface: the back ends of `ATTENTION`.

Each runs forward to (out, log-sum-exp) and backward from any (out, log-sum-exp), which
docs/method.md, section 3, makes use of.

Tensors come as (B, heads, T, D) views of any strides with contiguous channels; N is a multiple of G, heads
ordered by group.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.ops.backends import Backend, Op
from megatron_dmc.ops.training.flash_check import fault

logger = logging.getLogger(__name__)

_HALF = (torch.float16, torch.bfloat16)
_EFFICIENT_ALIGNMENT = 32

aten = torch.ops.aten


@dataclass(frozen=True)
class Kernel:
    """A stock kernel.

    Attributes:
        takes: (q, k, v, causal) -> "", or why it cannot run these tensors.
        forward: (q, k, v, scale, causal) -> (out_BNTD, lse_BNT float32, state for the backward).
        backward: (grad_out, q, k, v, out, lse, state, scale, causal) -> (dq, dk, dv).
    """

    name: str
    takes: Callable[[Tensor, Tensor, Tensor, bool], str]
    forward: Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor, Any]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]

    def refusal(self, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> str:
        """The reason why it cannot run these tensors; "" if it can. On a GPU it must also agree with a small dense
        computation: compared once for each device, dtype and shape of heads."""
        reason = self.takes(q, k, v, causal)
        if reason or self.name == "dense" or not _on_gpu(q):
            return reason
        if q.is_cuda and torch.cuda.is_current_stream_capturing():
            return ""  # nothing can be read here; what ran before the capture was checked
        kind = (q.device, q.dtype, q.shape[1], k.shape[1], q.shape[3])
        if reason := fault(self, KERNELS["dense"], *kind, causal):
            _report(self.name, *kind, reason)
        return reason


def _on_gpu(q: Tensor) -> bool:
    return q.is_cuda


def _capability(q: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(q.device)


def _bthd(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, heads, T, D) to (B, T, heads, D) or back: views."""
    return tuple(x.transpose(1, 2) for x in tensors)


@functools.cache
def _package(name: str, *functions: str) -> Any:
    """The module if it is installed and has the functions, otherwise None."""
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError):  # a build for another torch or CUDA fails to load
        return None
    return module if all(hasattr(module, f) for f in functions) else None


def _package_takes(q: Tensor, name: str) -> str:
    if not _on_gpu(q) or q.dtype not in _HALF:
        return "only half precision on a GPU"
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"head dim {q.shape[-1]}: a multiple of 8, at most 256"
    if _package(name, "_flash_attn_forward", "_flash_attn_backward") is None:
        return f"{name} is not installed"
    return ""


# --- flash-attn 3 -----------------------------------------------------------------------------------

_FA3 = "flash_attn_interface"


def _fa3_takes(q, k, v, causal) -> str:
    reason = _package_takes(q, _FA3)
    if not reason and _capability(q)[0] != 9:
        reason = "only Hopper GPUs"
    return reason


def _fa3_forward(q, k, v, scale, causal):
    q, k, v = _bthd(q, k, v)
    out, lse, *_ = _package(_FA3)._flash_attn_forward(q, k, v, softmax_scale=scale, causal=causal)
    return out.transpose(1, 2), lse, None


def _fa3_backward(grad_out, q, k, v, out, lse, state, scale, causal):
    grad_out, q, k, v, out = _bthd(grad_out, q, k, v, out)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    # by position: releases disagree about the names (causal, is_causal), not about the order
    _package(_FA3)._flash_attn_backward(
        grad_out, q, k, v, out, lse.contiguous(), None, None, None, None, None, None,
        dq, dk, dv, scale, causal,
    )  # fmt: skip
    return _bthd(dq, dk, dv)


# --- flash-attn 2.7 and later -----------------------------------------------------------------------

_FA2 = "flash_attn.flash_attn_interface"


def _fa2_takes(q, k, v, causal) -> str:
    return _package_takes(q, _FA2)


def _fa2_forward(q, k, v, scale, causal):
    q, k, v = _bthd(q, k, v)
    out, lse, _, rng_state = _package(_FA2)._flash_attn_forward(
        q, k, v, dropout_p=0.0, softmax_scale=scale, causal=causal, window_size_left=-1,
        window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    )  # fmt: skip
    return out.transpose(1, 2), lse, rng_state


def _fa2_backward(grad_out, q, k, v, out, lse, state, scale, causal):
    grad_out, q, k, v, out = _bthd(grad_out, q, k, v, out)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _package(_FA2)._flash_attn_backward(
        grad_out, q, k, v, out, lse.contiguous(), dq, dk, dv, dropout_p=0.0, softmax_scale=scale,
        causal=causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        deterministic=torch.are_deterministic_algorithms_enabled(), rng_state=state,
    )  # fmt: skip
    return _bthd(dq, dk, dv)


# --- ATen on a GPU ----------------------------------------------------------------------------------


def _aten_params(q, k, v, causal):
    gqa = q.shape[1] != k.shape[1]
    return torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, causal, gqa)


def _cudnn_takes(q, k, v, causal) -> str:
    if not _on_gpu(q) or q.dtype not in _HALF:
        return "only half precision on a GPU"
    if _capability(q)[0] < 9:
        return "only Hopper GPUs and later"  # it runs on earlier ones, behind flash attention
    if not torch.backends.cuda.can_use_cudnn_attention(_aten_params(q, k, v, causal)):
        return "this shape on this machine"
    return ""


def _cudnn_forward(q, k, v, scale, causal):
    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = (
        aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
    )
    # cuDNN's statistics have a dimension of 1 at the end
    state = (lse.shape, cum_q, cum_k, max_q, max_k, seed, offset)
    return out, lse.reshape(q.shape[:3]), state


def _cudnn_backward(grad_out, q, k, v, out, lse, state, scale, causal):
    shape, cum_q, cum_k, max_q, max_k, seed, offset = state
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad_out, q, k, v, out, lse.contiguous().view(shape), seed, offset, None, cum_q, cum_k,
        max_q, max_k, 0.0, causal, scale=scale,
    )  # fmt: skip


def _flash_takes(q, k, v, causal) -> str:
    if not _on_gpu(q) or q.dtype not in _HALF:
        return "only half precision on a GPU"
    if not torch.backends.cuda.can_use_flash_attention(_aten_params(q, k, v, causal)):
        return "this shape on this machine"
    return ""


def _flash_forward(q, k, v, scale, causal):
    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = (
        aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    )
    return out, lse, (cum_q, cum_k, max_q, max_k, seed, offset)


def _flash_backward(grad_out, q, k, v, out, lse, state, scale, causal):
    cum_q, cum_k, max_q, max_k, seed, offset = state
    return aten._scaled_dot_product_flash_attention_backward(
        grad_out, q, k, v, out, lse.contiguous(), cum_q, cum_k, max_q, max_k, 0.0, causal, seed,
        offset, scale=scale,
    )  # fmt: skip


def _repeat(x_BGTD: Tensor, num_heads: int) -> Tensor:
    """A key or value head for each query head; a view where every group has one query head."""
    group = num_heads // x_BGTD.shape[1]
    return x_BGTD if group == 1 else x_BGTD[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)


def _sum_groups(x_BNTD: Tensor, num_kv_heads: int) -> Tensor:
    """The sum of `_repeat`'s gradient over the query heads of a group."""
    return (
        x_BNTD
        if x_BNTD.shape[1] == num_kv_heads
        else x_BNTD.unflatten(1, (num_kv_heads, -1)).sum(2)
    )


def _efficient_takes(q, k, v, causal) -> str:
    if not _on_gpu(q) or q.dtype not in (*_HALF, torch.float32):
        return "only half and single precision on a GPU"
    return ""


def _efficient_forward(q, k, v, scale, causal):
    k, v = _repeat(k, q.shape[1]), _repeat(v, q.shape[1])
    out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, causal, scale=scale
    )
    # the tokens of the log-sum-exp are padded to a multiple of 32
    return out, lse[..., : q.shape[2]], (seed, offset)


def _efficient_backward(grad_out, q, k, v, out, lse, state, scale, causal):
    num_kv_heads, num_heads = k.shape[1], q.shape[1]
    pad = -lse.shape[-1] % _EFFICIENT_ALIGNMENT
    # exp(score - inf) = 0: padding has no probability
    lse = torch.nn.functional.pad(lse.float(), (0, pad), value=float("inf"))
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad_out, q, _repeat(k, num_heads), _repeat(v, num_heads), None, out, lse, *state, 0.0,
        [True, True, True, False], causal, scale=scale,
    )  # fmt: skip
    return dq, _sum_groups(dk, num_kv_heads), _sum_groups(dv, num_kv_heads)


# --- ATen on a CPU ----------------------------------------------------------------------------------


def _cpu_takes(q, k, v, causal) -> str:
    return "" if q.device.type == "cpu" else "only tensors on the CPU"


def _cpu_forward(q, k, v, scale, causal):
    # ATen's CPU kernel wants as many key heads as query heads: one call for each query head of
    # the groups, so that keys are never repeated in memory.
    group = q.shape[1] // k.shape[1]
    parts = [
        aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, r::group], k, v, 0.0, causal, scale=scale
        )
        for r in range(group)
    ]
    if group == 1:
        return *parts[0], None
    out, lse = (torch.stack(part, 2).flatten(1, 2) for part in zip(*parts, strict=True))
    return out, lse, None


def _cpu_backward(grad_out, q, k, v, out, lse, state, scale, causal):
    group = q.shape[1] // k.shape[1]
    dqs, dk, dv = [], None, None
    for r in range(group):
        heads = slice(r, None, group)
        dq_r, dk_r, dv_r = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out[:, heads], q[:, heads], k, v, out[:, heads], lse[:, heads], 0.0, causal,
            scale=scale,
        )  # fmt: skip
        dqs.append(dq_r)
        dk = dk_r if dk is None else dk + dk_r
        dv = dv_r if dv is None else dv + dv_r
    dq = dqs[0] if group == 1 else torch.stack(dqs, 2).flatten(1, 2)
    return dq, dk, dv


# --- dense, for what no kernel takes: float64 on a GPU ----------------------------------------------


def _dense_scores(q, k, scale, causal):
    scores = scale * q @ k.transpose(-1, -2)
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, float("-inf"))
    return scores


def _dense_forward(q, k, v, scale, causal):
    acc = torch.promote_types(q.dtype, torch.float32)
    num_heads = q.shape[1]
    scores = _dense_scores(q.to(acc), _repeat(k, num_heads).to(acc), scale, causal)
    lse = scores.logsumexp(-1)
    out = torch.exp(scores - lse[..., None]) @ _repeat(v, num_heads).to(acc)
    return out.to(q.dtype), lse, None


def _dense_backward(grad_out, q, k, v, out, lse, state, scale, causal):
    acc = torch.promote_types(q.dtype, torch.float32)
    num_heads, num_kv_heads, dtype = q.shape[1], k.shape[1], q.dtype
    k, v = _repeat(k, num_heads).to(acc), _repeat(v, num_heads).to(acc)
    q, g = q.to(acc), grad_out.to(acc)
    p = torch.exp(_dense_scores(q, k, scale, causal) - lse[..., None])
    ds = p * (g @ v.transpose(-1, -2) - (g * out.to(acc)).sum(-1, keepdim=True)) * scale
    dk = _sum_groups(ds.transpose(-1, -2) @ q, num_kv_heads)
    dv = _sum_groups(p.transpose(-1, -2) @ g, num_kv_heads)
    return (ds @ k).to(dtype), dk.to(dtype), dv.to(dtype)


_STOCK = [
    Kernel("flash-attn-3", _fa3_takes, _fa3_forward, _fa3_backward),
    Kernel("flash-attn-2", _fa2_takes, _fa2_forward, _fa2_backward),
    Kernel("flash", _flash_takes, _flash_forward, _flash_backward),
    Kernel("cudnn", _cudnn_takes, _cudnn_forward, _cudnn_backward),
    Kernel("cpu", _cpu_takes, _cpu_forward, _cpu_backward),
    Kernel("efficient", _efficient_takes, _efficient_forward, _efficient_backward),
    Kernel("dense", lambda q, k, v, causal: "", _dense_forward, _dense_backward),
]
KERNELS = {kernel.name: kernel for kernel in _STOCK}
"""By name, in order of preference; flash, cudnn, efficient and cpu are PyTorch's own. cuDNN is often the
faster of PyTorch's two on Hopper, but has open reports of wrong results with few key heads."""


def _backend(kernel: Kernel) -> Backend:
    return Backend(lambda op: kernel)


ATTENTION = Op("attention", **{name: _backend(kernel) for name, kernel in KERNELS.items()})
"""Training attention's stock kernels. The arguments are (q, k, v, causal)."""


@functools.cache
def _report(
    name: str, device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int,
    head_dim: int, reason: str,
) -> None:  # fmt: skip
    logger.warning(
        "attention kernel %r is not used on %s for %s, %d query heads, %d KV heads, head dim %d: %s",
        name, device, dtype, num_heads, num_kv_heads, head_dim, reason,
    )  # fmt: skip


def choose_kernel(
    q_BNTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    *,
    causal: bool = True,
    backend: str | None = None,
) -> Kernel:
    """The stock kernel of `ATTENTION` that runs these tensors; see `ops.backends.Op.choose`."""
    return KERNELS[ATTENTION.choose(q_BNTD, k_BGTD, v_BGTD, causal, backend=backend)]
