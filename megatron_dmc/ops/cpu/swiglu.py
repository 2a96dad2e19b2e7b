"""The gate of an MLP in bfloat16 on CPUs, a back end of `ops.backends.SWIGLU`."""

import torch
from torch import Tensor

from megatron_dmc.ops.cpu import DIM_STEP, absence
from megatron_dmc.ops.cpu.decode import operators


def refusal(weight: Tensor) -> str:
    """The reason why the kernel does not take products of this weight (2 C, inputs); "" if it does."""
    if reason := absence():
        return reason
    if weight.device.type != "cpu":
        return "only tensors on the CPU"
    if weight.dtype != torch.bfloat16:
        return f"dtype {weight.dtype}; only bfloat16"
    if weight.shape[0] % (2 * DIM_STEP):
        return f"{weight.shape[0]} rows; twice a multiple of {DIM_STEP}"
    return ""


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up in one pass, computed in float32.

    Args:
        x: [gate, up], (rows, 2 C), bfloat16, dense.

    Returns:
        (rows, C), bfloat16.
    """
    out = torch.empty(x.shape[0], x.shape[1] // 2, dtype=x.dtype)
    operators().swiglu.default(x, out)
    return out
