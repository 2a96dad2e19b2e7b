"""Modules of a model that infers, computed by the back ends of `ops.backends.LINEAR`, `NORM` and `SWIGLU`.

Dimension letters: T packed tokens, N query heads, G key/value heads, D head dimension, F of RoPE's angles.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import WrappedTensor
from torch import Tensor
from torch.nn import functional

from megatron_dmc.model.attention import DMCSelfAttention, PagedAttentionContext
from megatron_dmc.ops.backends import LINEAR, NORM, SWIGLU, Op
from megatron_dmc.ops.cpu import advise_huge_pages
from megatron_dmc.ops.cpu.decode import copied
from megatron_dmc.ops.cpu.outputs import next_part


def use_inference_kernels(model: GPTModel) -> None:
    """Let linear layers and norms compute with the back ends that are best for their weights, where those are not
    PyTorch; and whole blocks of dense layers with RMSNorm and SwiGLU, with as few operators as they need.

    Changes these modules of the model alone. With gradients enabled they compute as before.
    """
    for parameter in model.parameters():
        advise_huge_pages(parameter, at_once=True)
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
    """Whether `_Layer` computes what the layer does, and there are kernels for its norms."""
    if type(layer) is not TransformerLayer:
        return False
    config, norms = layer.config, (layer.input_layernorm, layer.pre_mlp_layernorm)
    return (
        type(layer.self_attention) is DMCSelfAttention
        and isinstance(layer.mlp, MLP)
        and all(isinstance(x, IdentityOp) for x in (layer.cross_attention, layer.cross_attn_bda))
        and all(isinstance(norm, torch.nn.RMSNorm) for norm in norms)
        and all(_kernels(NORM, norm.weight) is not None for norm in norms)
        and config.gated_linear_unit
        and config.activation_func is functional.silu
        and not config.activation_func_clamp_value
        and not config.glu_linear_offset
        and not config.add_bias_linear
        and not config.fp32_residual_connection
        and not config.sequence_parallel
    )


class _Layer:
    """A dense layer that infers: two norms, four products and a gate. Residuals are added by the products, or, where
    these have to be summed over ranks first, by the norm that follows."""

    def __init__(self, layer: Any):
        attention, mlp = layer.self_attention, layer.mlp
        self.attention: DMCSelfAttention = attention
        self.num_groups = attention.num_query_groups_per_partition
        self.head_dim = attention.hidden_size_per_attention_head
        self.norm, self.mlp_norm = _Norm(layer.input_layernorm), _Norm(layer.pre_mlp_layernorm)
        self.qkv, self.fc1 = _Product(attention.linear_qkv), _Product(mlp.linear_fc1)
        self.proj, self.fc2 = _Product(attention.linear_proj), _Product(mlp.linear_fc2)
        gate = _kernels(SWIGLU, mlp.linear_fc1.weight)
        self.swiglu = _swiglu if gate is None else gate.swiglu

    def __call__(
        self,
        x: Tensor,
        added: Tensor | None,
        context: PagedAttentionContext,
        freqs_SF: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The layer's output for x + added, both (T, hidden), as such a sum itself; x is mutated."""
        qkv = self.qkv(self.norm(x, added))
        out_TND = self.attention.attend_cached(context, *self.heads(qkv), freqs_SF)
        x, added = self.proj.add_to(x, out_TND.flatten(1))
        gated = self.swiglu(self.fc1(self.mlp_norm(x, added)))
        return self.fc2.add_to(x, gated)

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q_TND, k_TGD and v_TGD, after QK-norm if the model has it."""
        groups = qkv.view(len(qkv), self.num_groups, -1, self.head_dim)
        q, k, v = groups[:, :, :-2], groups[:, :, -2], groups[:, :, -1]
        if q.shape[2] > 1 and self.qkv.kernel is not None:
            q = copied(q)  # `flatten` would, but not in recorded work
        q = q.flatten(1, 2)
        if self.attention.q_layernorm is not None:
            q = self.attention.q_layernorm(q)
        if self.attention.k_layernorm is not None:
            k = self.attention.k_layernorm(k)
        return q, k, v


class _Norm:
    """RMSNorm of x + added, which x becomes."""

    def __init__(self, norm: torch.nn.RMSNorm):
        self.weight, self.eps, kernels = norm.weight, _eps(norm), _kernels(NORM, norm.weight)
        self.rms_norm, self.add_rms_norm = kernels.rms_norm, kernels.add_rms_norm

    def __call__(self, x: Tensor, added: Tensor | None) -> Tensor:
        if added is None:
            return self.rms_norm(x, self.weight, self.eps)
        return self.add_rms_norm(x, added, self.weight, self.eps)


class _Product:
    """x weight^T + bias in the back end that is best for the weight."""

    def __init__(self, module: Any):
        kernels = _kernels(LINEAR, module.weight)
        self.weight, self.bias = module.weight, module.bias
        self.kernel = None if kernels is None else kernels.linear
        # the ranks whose products add up; None: this one's is all
        self.ranks = module.tp_group if module.config.tensor_model_parallel_size > 1 else None

    def __call__(self, x: Tensor) -> Tensor:
        if self.kernel is None:
            return functional.linear(x, self.weight, self.bias)
        out = self.kernel(x, self.weight)
        return out if self.bias is None else out + self.bias

    def add_to(self, residual: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """residual + the ranks' products, as a sum of which only the first part may be there; mutates residual."""
        if self.ranks is not None:
            out = reduce_from_tensor_model_parallel_region(self(x), group=self.ranks)
            return residual, out
        if self.kernel is None:
            return residual.addmm_(x, self.weight.t()), None
        return self.kernel(x, self.weight, residual), None


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
    """`forward` of the block; mutates `hidden_states`, which in inference are the embedding's."""
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

    def compute(x: Tensor) -> Tensor:
        added = None
        for layer in layers:
            next_part()
            x, added = layer(x, added, inference_context, freqs)
        if added is not None:
            x.add_(added)
        x = x.unsqueeze(1)
        return x if block.final_layernorm is None else block.final_layernorm(x)

    return inference_context.run_layers(compute, x, freqs)
