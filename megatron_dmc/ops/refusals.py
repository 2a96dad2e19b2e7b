"""Refusals that kernels have in common: the reasons why a back end of `ops.backends` cannot run, "" where it can."""

from typing import Any

import torch
from torch import Tensor

MAX_MERGE_WINDOW = 16
"""Longest window that kernels support, except for one over a whole sequence of training. The tiles of longer
ones would not fit into registers."""


def gpu_refusal(x: Tensor, dtypes: tuple[torch.dtype, ...]) -> str:
    """The common refusals of GPU kernels: other dtypes, heads of more than 256 channels, old GPUs."""
    if x.dtype not in dtypes:
        return f"dtype {x.dtype}"
    if x.shape[-1] > 256:
        return f"head_dim={x.shape[-1]}, more than 256"
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] < 8:
        return "GPUs before compute capability 8.0"
    return ""


def prefill_refusal(cache: Any, merge_window: int) -> str:
    """The refusals of prefill's GPU kernels: a `LayerCache` of 8-bit pages, long merge windows."""
    if cache.is_scaled:
        return f"pages in {cache.k_pages_PSD.values_PSD.dtype}"
    if merge_window > MAX_MERGE_WINDOW:
        return f"merge_window={merge_window}, more than {MAX_MERGE_WINDOW}"
    return ""
