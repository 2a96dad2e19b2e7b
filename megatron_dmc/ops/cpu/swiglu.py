"""The gate of an MLP on CPUs, a back end of `ops.backends.SWIGLU`."""

from typing import Any

import torch
from torch import Tensor

from megatron_dmc.ops.cpu import DIM_STEP, operators, tensor_refusal
from megatron_dmc.ops.cpu.outputs import output


def refusal(weight: Tensor) -> str:
    """The reason why the kernel does not take products of this weight (2 C, inputs); "" if it does."""
    return _refusal(weight, weight.shape[0])


def _refusal(x: Tensor, width: int) -> str:
    if reason := tensor_refusal(x):
        return reason
    if width % (2 * DIM_STEP):
        return f"{width} rows; twice a multiple of {DIM_STEP}"
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


def swiglu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of `swiglu(x)`, from that of its output.

    Args:
        grad: (rows, C); x: (rows, 2 C); the same dtype, dense.

    Returns:
        (rows, 2 C).
    """
    out = torch.empty_like(x)
    operators().swiglu_backward.default(x, grad, out)
    return out


def install(fused: Any) -> None:
    """Have Megatron's fused SwiGLU computed here.

    Args:
        fused: the module `megatron.core.fusions.fused_bias_swiglu`. Its functions `swiglu` and `swiglu_back` are
            replaced; what the kernels do not take goes to them as before.
    """
    plain, plain_backward = fused.swiglu, fused.swiglu_back

    def rows_of(x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1]).contiguous()

    def forward(y: Tensor) -> Tensor:
        if _refusal(y, y.shape[-1]):
            return plain(y)
        return swiglu(rows_of(y)).view(*y.shape[:-1], -1)

    def backward(g: Tensor, y: Tensor) -> Tensor:
        if g.dtype != y.dtype or _refusal(y, y.shape[-1]):
            return plain_backward(g, y)
        return swiglu_backward(rows_of(g), rows_of(y)).view_as(y)

    fused.swiglu, fused.swiglu_back = forward, backward
