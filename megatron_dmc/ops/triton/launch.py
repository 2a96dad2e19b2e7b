"""Where Triton's kernels run, and what their host sides ask about it."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Kernels run on the CPU, by Triton's interpreter (TRITON_INTERPRET=1 before the import)."""


def on_device(x: Tensor) -> AbstractContextManager:
    """Triton launches on the current device: the one of `x`, within this."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def capability(x: Tensor) -> int:
    """Major compute capability of the GPU; the interpreter stands for 9."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9
