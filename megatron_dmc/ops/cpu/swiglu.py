"""The gate of an MLP on CPUs, a back end of `ops.backends.SWIGLU`."""

import torch
from torch import Tensor

from megatron_dmc.ops.cpu import DIM_STEP, absence
from megatron_dmc.ops.cpu.decode import operators
from megatron_dmc.ops.cpu.outputs import output


def refusal(weight: Tensor) -> str:
    """The reason why the kernel does not take products of this weight (2 C, inputs); "" if it does."""
    if reason := absence():
        return reason
    if weight.device.type != "cpu":
        return "only tensors on the CPU"
    if weight.dtype not in (torch.bfloat16, torch.float32):
        return f"dtype {weight.dtype}; only bfloat16 and float32"
    if weight.shape[0] % (2 * DIM_STEP):
        return f"{weight.shape[0]} rows; twice a multiple of {DIM_STEP}"
    return ""


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up in one pass, computed in float32.

    Args:
        x: [gate, up], (rows, 2 C), bfloat16 or float32, dense.

    Returns:
        (rows, C), of the same dtype.
    """
    out = output((x.shape[0], x.shape[1] // 2), x.dtype)
    operators().swiglu.default(x, out)
    return out
