"""Products of weights in inference by the back ends of `ops.backends.LINEAR`."""

import functools
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_dmc.ops.backends import LINEAR


def use_linear_kernels(model: GPTModel) -> None:
    """Let the linear layers multiply with the back end that is best for their weights, where that is not PyTorch.

    Changes these modules of the model alone. With gradients enabled they compute as before.
    """
    for module in model.modules():
        if not isinstance(module, ColumnParallelLinear | RowParallelLinear):
            continue
        weight = module.weight
        if weight is None:  # the output layer of tied embeddings is handed its weight
            weight = model.shared_embedding_or_output_weight()
        backend = LINEAR.choose(weight)
        if backend != "torch":
            kernels = LINEAR.kernels(backend)
            module._forward_impl = functools.partial(_product, module, kernels.linear)


def _product(
    module: Any,
    linear: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Megatron's `_forward_impl` of the module."""
    if torch.is_grad_enabled() or options.get("sequence_parallel"):
        return type(module)._forward_impl(module, input=input, weight=weight, bias=bias, **options)
    out = linear(input, weight)
    return out if bias is None else out + bias
