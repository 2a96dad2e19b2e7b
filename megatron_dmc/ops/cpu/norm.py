"""RMSNorm on CPUs, a back end of `ops.backends.NORM`: one pass, where PyTorch makes ten operators of it."""

from torch import Tensor

from megatron_dmc.ops.cpu import operators, tensor_refusal
from megatron_dmc.ops.cpu.outputs import output


def refusal(weight: Tensor) -> str:
    """The reason why the kernel does not take this weight; "" if it does."""
    return tensor_refusal(weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32.

    Args:
        x: (..., C); weight: (C); the same dtype, bfloat16 or float32.
    """
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    out = output(rows.shape, x.dtype)
    operators().rms_norm.default(rows, weight, out, eps)
    return out if rows is x else out.view(x.shape)


def add_rms_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `megatron_dmc.ops.triton.norm.add_rms_norm`."""
    return rms_norm(x.add_(added), weight, eps)
