"""Layer specs with DMC attention, made from Megatron's own specs, which stay as they are."""

import copy
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)

from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.model.attention import DMCSelfAttention, NoCoreAttention
from megatron_dmc.model.config import DMCTransformerConfig
from megatron_dmc.model.decisions import DecisionRecorder
from megatron_dmc.model.norm import torch_norm


def with_dmc_attention(spec: Any, recorder: DecisionRecorder | None = None) -> Any:
    """A copy of a layer spec (or of a block's submodules) in which self-attention is DMC's.

    Args:
        spec: a `ModuleSpec` of a TransformerLayer, or `TransformerBlockSubmodules`.
        recorder: injected into every attention layer; None for inference.

    Raises:
        UnsupportedConfig: if the self-attention is not Megatron's `SelfAttention`, or the layer has
            cross attention.
    """
    if isinstance(spec, TransformerBlockSubmodules):
        spec = copy.copy(spec)
        spec.layer_specs = [with_dmc_attention(layer, recorder) for layer in spec.layer_specs or []]
        return spec
    spec = copy.copy(spec)
    spec.submodules = copy.copy(spec.submodules)
    attention = spec.submodules.self_attention
    if getattr(attention, "module", attention) is not SelfAttention:
        raise UnsupportedConfig(
            "DMC replaces Megatron's SelfAttention; this layer spec has "
            f"{getattr(attention, 'module', attention)}"
        )
    if spec.submodules.cross_attention is not IdentityOp:
        raise UnsupportedConfig(
            "this layer spec has cross attention, over an encoder's keys; DMC compresses a decoder's own keys "
            "only"
        )
    submodules = copy.copy(attention.submodules)
    submodules.core_attention = NoCoreAttention
    spec.submodules.self_attention = ModuleSpec(
        module=DMCSelfAttention,
        params={**attention.params, "recorder": recorder},
        submodules=submodules,
        metainfo=dict(attention.metainfo),
    )
    return spec


def with_torch_norm(spec: Any, config: DMCTransformerConfig, vp_stage: int | None) -> Any:
    """Block submodules whose norms are PyTorch's, whatever is installed: Megatron's local spec takes Apex's
    or Transformer Engine's for some where it finds them, and asserts that none is under sequence
    parallelism."""
    if isinstance(spec, TransformerBlockSubmodules):
        layers = spec.layer_specs or []
    else:
        layers = [spec] * get_num_layers_to_build(config, vp_stage)
    copies = []
    for layer in layers:
        layer = copy.copy(layer)
        layer.submodules = copy.copy(layer.submodules)
        for name in ("input_layernorm", "pre_mlp_layernorm"):
            if getattr(layer.submodules, name) is not IdentityOp:
                setattr(layer.submodules, name, torch_norm)
        attention = layer.submodules.self_attention = copy.copy(layer.submodules.self_attention)
        attention.submodules = copy.copy(attention.submodules)
        for name in ("q_layernorm", "k_layernorm"):
            if getattr(attention.submodules, name) not in (None, IdentityOp, L2Norm):
                setattr(attention.submodules, name, torch_norm)
        copies.append(layer)
    return TransformerBlockSubmodules(layer_specs=copies, layer_norm=torch_norm)


def dmc_layer_spec(
    config: DMCTransformerConfig,
    *,
    recorder: DecisionRecorder | None = None,
    use_transformer_engine: bool | None = None,
    vp_stage: int | None = None,
) -> Any:
    """The layer spec of a GPT with DMC attention.

    Args:
        config: decides dense or mixture-of-experts, norms, QK-norm, implementation.
        recorder: see `with_dmc_attention`.
        use_transformer_engine: default: as `config.transformer_impl` says.
        vp_stage: virtual pipeline stage, where the pipeline is interleaved.

    Returns:
        what `GPTModel(transformer_layer_spec=...)` takes.
    """
    if use_transformer_engine is None:
        use_transformer_engine = config.transformer_impl == "transformer_engine"
    if config.num_moe_experts is not None:
        spec = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=use_transformer_engine,
            normalization=config.normalization,
            qk_l2_norm=config.qk_l2_norm,
            vp_stage=vp_stage,
        )
    elif use_transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=config.qk_layernorm, qk_l2_norm=config.qk_l2_norm
        )
    else:
        spec = get_gpt_layer_local_spec(
            qk_layernorm=config.qk_layernorm,
            qk_l2_norm=config.qk_l2_norm,
            normalization=config.normalization,
        )
    if not use_transformer_engine:
        spec = with_torch_norm(spec, config, vp_stage)
    return with_dmc_attention(spec, recorder)
