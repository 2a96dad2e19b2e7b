"""Products of weights in bfloat16 on CPUs that do not multiply it natively, a back end of `ops.backends.LINEAR`."""

import torch
from torch import Tensor

from megatron_dmc.ops.cpu import DIM_STEP, absence
from megatron_dmc.ops.cpu.decode import operators

OUTPUT_STEP = 4
"""Output features are multiples."""


def refusal(weight: Tensor) -> str:
    """The reason why the kernel does not multiply by this weight (outputs, inputs); "" if it does."""
    if reason := absence():
        return reason
    if weight.device.type != "cpu":
        return "only tensors on the CPU"
    if weight.dtype != torch.bfloat16:
        return f"dtype {weight.dtype}; only bfloat16"
    capabilities = torch.cpu.get_capabilities()
    if any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
        return "this CPU multiplies bfloat16 natively, which PyTorch makes use of"
    outputs, inputs = weight.shape
    if outputs % OUTPUT_STEP or inputs % DIM_STEP or not weight.is_contiguous():
        return (
            f"a weight of {outputs} x {inputs}; multiples of {OUTPUT_STEP} x {DIM_STEP}, contiguous"
        )
    return ""


def linear(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """x weight^T, summed in float32, plus what it is added to. The result of a row does not depend on the other rows.

    Args:
        x: (..., inputs), bfloat16; weight: (outputs, inputs), bfloat16.
        residual: (..., outputs), bfloat16, dense: added to the product after that is rounded.

    Returns:
        (..., outputs), bfloat16.
    """
    outputs, is_flat = weight.shape[0], x.dim() == 2
    rows = x if is_flat else x.reshape(-1, x.shape[-1])
    out = torch.empty(rows.shape[0], outputs, dtype=x.dtype)
    added = residual if residual is None or is_flat else residual.view(-1, outputs)
    operators().linear.default(rows, weight, added, out)
    return out if is_flat else out.view(*x.shape[:-1], outputs)
