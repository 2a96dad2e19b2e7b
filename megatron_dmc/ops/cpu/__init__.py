"""The cache ops in the extension for CPUs `megatron_dmc._cpu`, where it is built."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

OPERATORS = (
    "advise_huge_pages", "copy", "decode_append", "linear", "matmul", "merge", "merge_backward",
    "near_gradients", "near_join", "paged_decode_attention", "prefill_attention", "prefill_write",
    "release_pages", "rms_norm", "swiglu", "swiglu_backward",
)  # fmt: skip
REVISION = 5
"""Of what the operators are and take, as in `csrc/cpu/binding.cpp`: both change with them."""
DIM_STEP, MAX_DIM = 32, 256
"""Head dimensions are multiples of the first, up to the second."""
MIN_PAGE_SIZE = 8
MAX_GROUP = 32
"""Query heads of a KV head that decode attention takes."""
_HUGE_PAGE = 1 << 21
LEAST_HUGE_BYTES = 1 << 19
"""Of a tensor that is worth advice about its memory."""


@functools.cache
def operators() -> Any:
    """`torch.ops.megatron_dmc_cpu`, with versions without data for torch.compile: operators return nothing."""
    for name in OPERATORS:
        torch.library.register_fake(f"megatron_dmc_cpu::{name}", lambda *args, **kwargs: None)
    return torch.ops.megatron_dmc_cpu


@functools.cache
def absence() -> str:
    """The reason why the extension is missing; "" if it is there."""
    try:
        import megatron_dmc._cpu  # noqa: F401
    except ImportError as error:
        if error.name == "megatron_dmc._cpu":
            return "the extension for CPUs is not built (pip install --no-build-isolation, with a compiler)"
        return f"the extension for CPUs does not load ({error})"
    revision = getattr(torch.ops.megatron_dmc_cpu, "revision", None)
    if revision is None or revision() != REVISION:
        return "the extension for CPUs is of another release than the package: build it again (pip install --no-build-isolation)"
    if not operators().instruction_set():
        return "the extension for CPUs is built for AVX2 and later, which this machine lacks"
    return ""


def tensor_refusal(x: Tensor) -> str:
    """The refusals of all kernels: no extension, another device, another dtype; see `ops.backends`."""
    if reason := absence():
        return reason
    if x.device.type != "cpu":
        return "only tensors on the CPU"
    if x.dtype not in (torch.bfloat16, torch.float32):
        return f"dtype {x.dtype}; only bfloat16 and float32"
    return ""


def refusal(x: Tensor, page_size: int, group: int = 1) -> str:
    """The refusals of all ops on entries; see `ops.backends`."""
    head_dim = x.shape[-1]
    if reason := tensor_refusal(x):
        return reason
    if head_dim % DIM_STEP or head_dim > MAX_DIM:
        return f"head_dim={head_dim}; the kernels take multiples of {DIM_STEP} up to {MAX_DIM}"
    if page_size < MIN_PAGE_SIZE or page_size & (page_size - 1):
        return f"page_size={page_size}; the kernels take powers of two from {MIN_PAGE_SIZE} on"
    if group > MAX_GROUP:
        return f"{group} query heads for each KV head, more than {MAX_GROUP}"
    return ""


def advise_huge_pages(x: Tensor, *, at_once: bool = False) -> None:
    """Ask the system for huge pages of memory under a large tensor, where it has them and the extension is built:
    with pages of 4 KB every other page of a cache is a miss of the address translation.

    Args:
        at_once: do it at once, where Linux can: what has been written moves.
    """
    if x.device.type == "cpu" and x.nbytes >= LEAST_HUGE_BYTES and not absence():
        torch.ops.megatron_dmc_cpu.advise_huge_pages.default(x, at_once)


def untouched_zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU, contiguous, whose memory is taken when it is first written, in huge pages where the system has
    them. `torch.zeros` writes all of it, in small pages, which then stay.

    Raises:
        MemoryError: the system has no room for them.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _HUGE_PAGE:
        return torch.zeros(*shape, dtype=dtype)
    memory = np.zeros(size + _HUGE_PAGE, dtype=np.uint8)  # the system's own zeros
    first = -memory.ctypes.data % _HUGE_PAGE
    x = torch.from_numpy(memory[first : first + size]).view(dtype).view(*shape)
    advise_huge_pages(x)
    return x
