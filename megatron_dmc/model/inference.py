"""Modules of a model that infers, computed by the back ends of `ops.backends.LINEAR`, `NORM` and `SWIGLU`.

Dimension letters: T packed tokens, N query heads, G key/value heads, D head dimension, F of RoPE's angles.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import WrappedTensor
from torch import Tensor
from torch.nn import functional

from megatron_dmc.model.attention import DMCSelfAttention, PagedAttentionContext
from megatron_dmc.ops.backends import LINEAR, NORM, SWIGLU, Op
from megatron_dmc.ops.cpu import advise_huge_pages


def use_inference_kernels(model: GPTModel) -> None:
    """Let linear layers and norms compute with the back ends that are best for their weights, where those are not
    PyTorch; on a CPU whole blocks of dense layers with gated MLPs, with as few operators as they need.

    Changes these modules of the model alone. With gradients enabled they compute as before.
    """
    for parameter in model.parameters():
        advise_huge_pages(parameter, is_filled=True)
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
    block = getattr(model, "decoder", None)
    if block is not None and all(_is_plain(layer) for layer in block.layers):
        block.forward = functools.partial(_block, block, [_Layer(layer) for layer in block.layers])


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
    return rms_norm(x, module.weight, _eps(module))


def _eps(norm: torch.nn.RMSNorm) -> float:
    return torch.finfo(norm.weight.dtype).eps if norm.eps is None else norm.eps


def _is_plain(layer: Any) -> bool:
    """Whether `_Layer` computes what the layer does, on a CPU with kernels for its norms."""
    if type(layer) is not TransformerLayer:
        return False
    config, norms = layer.config, (layer.input_layernorm, layer.pre_mlp_layernorm)
    return (
        type(layer.self_attention) is DMCSelfAttention
        and isinstance(layer.mlp, MLP)
        and all(isinstance(x, IdentityOp) for x in (layer.cross_attention, layer.cross_attn_bda))
        and all(isinstance(norm, torch.nn.RMSNorm) for norm in norms)
        and all(norm.weight.is_cpu and NORM.choose(norm.weight) == "cpu" for norm in norms)
        and config.tensor_model_parallel_size == 1
        and config.gated_linear_unit
        and config.activation_func is functional.silu
        and not config.activation_func_clamp_value
        and not config.glu_linear_offset
        and not config.add_bias_linear
        and not config.fp32_residual_connection
        and not config.sequence_parallel
    )


class _Layer:
    """A dense layer that infers: two norms, four products and a gate, residuals added by the products."""

    def __init__(self, layer: Any):
        attention, mlp = layer.self_attention, layer.mlp
        self.attention: DMCSelfAttention = attention
        self.num_groups = attention.num_query_groups_per_partition
        self.head_dim = attention.hidden_size_per_attention_head
        self.norms = [(x.weight, _eps(x)) for x in (layer.input_layernorm, layer.pre_mlp_layernorm)]
        self.qkv_bias = attention.linear_qkv.bias
        modules = (attention.linear_qkv, attention.linear_proj, mlp.linear_fc1, mlp.linear_fc2)
        self.qkv, self.proj, self.fc1, self.fc2 = (_Product(module.weight) for module in modules)
        self.rms_norm = _kernels(NORM, layer.input_layernorm.weight).rms_norm
        gate = _kernels(SWIGLU, mlp.linear_fc1.weight)
        self.swiglu = _swiglu if gate is None else gate.swiglu

    def __call__(
        self, x: Tensor, context: PagedAttentionContext, freqs_SF: Tensor | None
    ) -> Tensor:
        """The layer's output for x (T, hidden)."""
        (weight, eps), (mlp_weight, mlp_eps) = self.norms
        qkv = self.qkv(self.rms_norm(x, weight, eps))
        if self.qkv_bias is not None:
            qkv = qkv + self.qkv_bias
        out_TND = self.attention.attend_cached(context, *self.heads(qkv), freqs_SF)
        x = self.proj(out_TND.flatten(1), x)
        gated = self.swiglu(self.fc1(self.rms_norm(x, mlp_weight, mlp_eps)))
        return self.fc2(gated, x)

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q_TND, k_TGD and v_TGD, after QK-norm if the model has it."""
        groups = qkv.view(len(qkv), self.num_groups, -1, self.head_dim)
        q, k, v = groups[:, :, :-2].flatten(1, 2), groups[:, :, -2], groups[:, :, -1]
        if self.attention.q_layernorm is not None:
            q = self.attention.q_layernorm(q)
        if self.attention.k_layernorm is not None:
            k = self.attention.k_layernorm(k)
        return q, k, v


class _Product:
    """x weight^T (+ residual) in the back end that is best for the weight."""

    def __init__(self, weight: Tensor):
        kernels = _kernels(LINEAR, weight)
        self.weight, self.kernel = weight, None if kernels is None else kernels.linear

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.kernel is not None:
            return self.kernel(x, self.weight, residual)
        out = functional.linear(x, self.weight)
        return out if residual is None else out.add_(residual)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _block(
    block: Any,
    layers: Sequence[_Layer],
    hidden_states: Any,
    attention_mask: Tensor | None = None,
    *,
    inference_context: Any = None,
    rotary_pos_emb: Tensor | None = None,
    **options: Any,
) -> Any:
    """`forward` of the block."""
    if torch.is_grad_enabled() or inference_context is None:
        return type(block).forward(
            block, hidden_states, attention_mask, inference_context=inference_context,
            rotary_pos_emb=rotary_pos_emb, **options,
        )  # fmt: skip
    if isinstance(hidden_states, WrappedTensor):
        hidden_states = hidden_states.unwrap()
    # Megatron's embedding leaves strides with which a product of the tokens becomes one for each
    x = hidden_states.flatten(0, 1)
    freqs = None if rotary_pos_emb is None else rotary_pos_emb.flatten(0, 2)
    for layer in layers:
        x = layer(x, inference_context, freqs)
    x = x.unsqueeze(1)
    return x if block.final_layernorm is None else block.final_layernorm(x)
