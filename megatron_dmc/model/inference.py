"""Modules of a model that infers, computed by the back ends of `ops.backends.LINEAR` and `NORM`."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_dmc.ops.backends import LINEAR, NORM, Op


def use_inference_kernels(model: GPTModel) -> None:
    """Let linear layers and norms compute with the back ends that are best for their weights, where those are not
    PyTorch.

    Changes these modules of the model alone. With gradients enabled they compute as before.
    """
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            weight = module.weight
            if weight is None:  # the output layer of tied embeddings is handed its weight
                weight = model.shared_embedding_or_output_weight()
            if (kernels := _kernels(LINEAR, weight)) is None:
                continue
            if module.config.tensor_model_parallel_size == 1:  # no communication around the product
                module.forward = functools.partial(_linear, module, kernels.linear)
            else:
                module._forward_impl = functools.partial(_product, module, kernels.linear)
        elif (
            isinstance(module, torch.nn.RMSNorm)
            and module.weight is not None
            and (kernels := _kernels(NORM, module.weight)) is not None
        ):
            rms_norm: Any = functools.partial(_norm, module, kernels.rms_norm)
            module.forward = rms_norm  # type: ignore[method-assign]


def _kernels(op: Op, weight: Tensor) -> Any:
    """Those of the back end; None for PyTorch."""
    backend = op.choose(weight)
    return None if backend == "torch" else op.kernels(backend)


def _linear(
    module: Any,
    linear: Callable[..., Tensor],
    input_: Tensor,
    weight: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`forward` of the module on one rank."""
    if torch.is_grad_enabled():
        given = options if weight is None else {"weight": weight, **options}
        return type(module).forward(module, input_, **given)
    out = linear(input_, module.weight if weight is None else weight)
    if module.bias is None or module.skip_bias_add:
        return out, module.bias
    return out + module.bias, None


def _product(
    module: Any,
    linear: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """`_forward_impl` of the module, between its communication."""
    if torch.is_grad_enabled() or options.get("sequence_parallel"):
        return type(module)._forward_impl(module, input=input, weight=weight, bias=bias, **options)
    out = linear(input, weight)
    return out if bias is None else out + bias


def _norm(module: Any, rms_norm: Callable[..., Tensor], x: Tensor) -> Tensor:
    """`forward` of the module."""
    if torch.is_grad_enabled() or x.dtype != module.weight.dtype:
        return type(module).forward(module, x)
    eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
    return rms_norm(x, module.weight, eps)
