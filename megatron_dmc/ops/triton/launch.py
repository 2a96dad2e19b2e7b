"""Device queries and masks shared by the Triton kernels and their host sides."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dmc.ops import gates

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Kernels run on the CPU, by Triton's interpreter (TRITON_INTERPRET=1 before the import)."""


_BORROWED_CHANNEL = tl.constexpr(gates.BORROWED_CHANNEL)


@triton.jit
def borrowed_channel(D: tl.constexpr):
    """The component of a head of D that holds a gate's logit; see `ops.gates`."""
    return (_BORROWED_CHANNEL + D) % D


@triton.jit
def is_content(o_d, D: tl.constexpr):
    """True for the other channels of a head of D."""
    return (o_d >= 0) & (o_d < D) & (o_d != borrowed_channel(D))


def on_device(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: the one of `x`, within this."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def gpu_only(x: Tensor) -> str:
    """The refusals of kernels for any shape: dtypes, other devices; "" if there is none."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype {x.dtype}"
    if not (x.is_cuda or INTERPRETED):
        return "only tensors on a GPU"
    return "" if capability(x) >= 8 else "GPUs before compute capability 8.0"


def capability(x: Tensor) -> int:
    """Major compute capability of the GPU; the interpreter stands for 9."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9
