"""Tensor operations of DMC: tensors and numbers only, no config and no Megatron."""

from megatron_dmc.ops.training.attention import causal_attention, training_attention
from megatron_dmc.ops.training.delayed import delayed_attention, eviction_attention
from megatron_dmc.ops.training.merge import merge

__all__ = [
    "causal_attention",
    "delayed_attention",
    "eviction_attention",
    "merge",
    "training_attention",
]
