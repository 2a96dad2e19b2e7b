"""Decoding's Triton kernels, a back end of `ops.backends.DECODE`."""

import torch
from torch import Tensor

from megatron_dmc.ops.refusals import gpu_refusal
from megatron_dmc.ops.triton.decode_append import decode_append
from megatron_dmc.ops.triton.decode_attention import paged_decode_attention, plan
from megatron_dmc.ops.triton.launch import INTERPRETED

__all__ = ["decode_append", "paged_decode_attention", "plan", "refusal"]


def refusal(x: Tensor, page_size: int, group: int = 1) -> str:
    """See `ops.backends`."""
    if not (x.is_cuda or INTERPRETED):
        return "only tensors on a GPU"
    return gpu_refusal(x, (torch.float32, torch.bfloat16, torch.float16))
