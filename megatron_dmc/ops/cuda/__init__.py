"""The ops of the paged cache in the CUDA extension `megatron_dmc._C`, if it is built."""

import functools
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.ops.refusals import gpu_refusal

OPERATORS = (
    "decode_append", "plan", "paged_decode_attention", "prefill_write", "prefill_attention",
    "release_pages",
)  # fmt: skip
HEAD_DIMS = (64, 96, 128, 256)
PAGE_SIZES = (8, 16, 32, 64)


def largest_group(head_dim: int) -> int:
    """The most query heads per KV head that decode attention supports."""
    return 16 if head_dim <= 128 else 8


@functools.cache
def absence() -> str:
    """The reason why the extension is missing; "" if it is there."""
    try:
        import megatron_dmc._C  # noqa: F401
    except ImportError as error:
        if error.name == "megatron_dmc._C":
            return "the CUDA extension is not built (pip install --no-build-isolation, with nvcc)"
        return f"the CUDA extension does not load ({error})"
    return ""


@functools.cache
def operators() -> Any:
    """`torch.ops.megatron_dmc`, with versions without data for torch.compile: operators return nothing."""
    assert not absence(), absence()
    for name in OPERATORS:
        torch.library.register_fake(f"megatron_dmc::{name}", lambda *args, **kwargs: None)
    return torch.ops.megatron_dmc


def refusal(x: Tensor, page_size: int, group: int = 1) -> str:
    """The refusals of all ops on entries; see `ops.backends`."""
    if reason := absence():
        return reason
    if not x.is_cuda:
        return "only tensors on a GPU"
    if x.shape[-1] not in HEAD_DIMS:
        return f"head_dim={x.shape[-1]}; built for {HEAD_DIMS}"
    if page_size not in PAGE_SIZES:
        return f"page_size={page_size}; built for {PAGE_SIZES}"
    if group > (most := largest_group(x.shape[-1])):
        return f"{group} query heads for each KV head, more than {most}"
    return gpu_refusal(x, (torch.bfloat16, torch.float16))
