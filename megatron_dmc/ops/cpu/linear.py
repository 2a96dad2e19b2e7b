"""Products of weights, a back end of `ops.backends.LINEAR`: its own in bfloat16 on CPUs that do not multiply it natively,
and of few rows in float32; otherwise PyTorch's, as an operator that can be recorded."""

import functools
import sys

import torch
from torch import Tensor

from megatron_dmc.ops.cpu import DIM_STEP, operators, tensor_refusal
from megatron_dmc.ops.cpu.outputs import output

OUTPUT_STEP = 4
"""Output features are multiples."""
FLOAT32_ROWS = 32
"""In float32 PyTorch's kernel is faster for more rows."""


@functools.cache
def most_rows(dtype: torch.dtype) -> int:
    """Rows that the extension's own kernel multiplies; PyTorch multiplies more."""
    capabilities = torch.cpu.get_capabilities()
    if dtype == torch.bfloat16:
        is_native = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        return 0 if is_native else sys.maxsize
    return FLOAT32_ROWS if capabilities.get("avx2") else 0


def refusal(weight: Tensor) -> str:
    """The reason why the kernel does not multiply by this weight (outputs, inputs); "" if it does."""
    if reason := tensor_refusal(weight):
        return reason
    outputs, inputs = weight.shape
    if outputs % OUTPUT_STEP or inputs % DIM_STEP or not weight.is_contiguous():
        return (
            f"a weight of {outputs} x {inputs}; multiples of {OUTPUT_STEP} x {DIM_STEP}, contiguous"
        )
    return ""


def linear(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """x weight^T, summed in float32, plus what it is added to. Up to `most_rows` the result of a row does not depend on
    the other rows; PyTorch multiplies more of them.

    Args:
        x: (..., inputs), bfloat16 or float32; weight: (outputs, inputs), all of one dtype.
        residual: (..., outputs), dense: added to the product, up to `most_rows` after that is rounded.

    Returns:
        (..., outputs), of the same dtype.
    """
    outputs, is_flat = weight.shape[0], x.dim() == 2
    rows = x if is_flat else x.reshape(-1, x.shape[-1])
    added = residual if residual is None or is_flat else residual.view(-1, outputs)
    multiply = operators().linear if len(rows) <= most_rows(x.dtype) else operators().matmul
    out = output((rows.shape[0], outputs), x.dtype)
    multiply.default(rows, weight, added, out)
    return out if is_flat else out.view(*x.shape[:-1], outputs)
