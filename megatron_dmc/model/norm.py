"""Normalisation without Transformer Engine and Apex, under sequence parallelism too."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dmc.errors import UnsupportedConfig


def torch_norm(
    config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused
) -> torch.nn.Module:
    """`torch.nn.RMSNorm` or `LayerNorm` as `config.normalization` says; Megatron's builder protocol.

    Under sequence parallelism its parameters are marked `sequence_parallel`, so that Megatron sums
    their gradients over the tensor-parallel ranks, each of which saw a part of the sequence.

    Raises:
        UnsupportedConfig: for a norm that PyTorch does not have.
    """
    classes = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
    if config.normalization not in classes or config.layernorm_zero_centered_gamma:
        raise UnsupportedConfig(
            f"--normalization {config.normalization} (zero-centred gamma: "
            f"{config.layernorm_zero_centered_gamma}) needs Transformer Engine; without it use "
            "LayerNorm or RMSNorm"
        )
    if config.memory_efficient_layer_norm:
        raise UnsupportedConfig(
            "--memory-efficient-layer-norm is Apex's norm, with LayerNorm and Transformer Engine's "
            "layers; PyTorch's norm has no such mode; leave it out"
        )
    norm = classes[config.normalization](hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return norm
