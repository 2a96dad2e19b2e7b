"""Grouped-query attention from a model with more KV heads, by mean pooling.

Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head
Checkpoints" (EMNLP 2023, arXiv 2305.13245), section 2.1: the projection matrices of the key heads of
a group are averaged into one, and so are those of the value heads; then the model is trained further
on a part of its pretraining data ("up-training", 5 % there). Queries stay as they are. The DMC paper
(arXiv 2403.09636) compares with this at equal cache size: N heads of G give a CR of G / N.
"""

from dataclasses import replace

import torch
from torch import Tensor

from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.weights import WeightSource, megatron_shapes, read_tensor
from megatron_dmc.errors import UnsupportedConfig


class PooledKVHeads:
    """Weights with fewer KV heads, each the mean of a run of the source's: a `WeightSource`.

    Args:
        source: of the model with all its heads.
        before: that model.
        num_kv_heads: to keep.
    """

    def __init__(self, source: WeightSource, before: ModelDescription, num_kv_heads: int):
        self._source, self._before = source, before
        self._num_kv_heads = num_kv_heads

    def fill(self, name: str, out: Tensor) -> None:
        """See `WeightSource`. The mean is computed in float32 or wider."""
        if ".linear_qkv." not in name:
            self._source.fill(name, out)
            return
        d, kept = self._before, self._num_kv_heads
        pooled, per_group = d.num_query_groups // kept, d.num_attention_heads // d.num_query_groups
        dtype = torch.promote_types(torch.float32, d.dtype)
        qkv = read_tensor(self._source, name, megatron_shapes(d)[name], dtype)
        rest = qkv.shape[1:]
        # a group's rows: its query heads, its key head, its value head
        heads = qkv.view(kept, pooled, per_group + 2, d.kv_channels, *rest)
        target = out.view(kept, pooled * per_group + 2, d.kv_channels, *rest)
        target[:, :-2] = heads[:, :, :-2].reshape(kept, pooled * per_group, d.kv_channels, *rest)
        target[:, -2:] = heads[:, :, -2:].mean(1)


def pool_kv_heads(
    description: ModelDescription, source: WeightSource, *, num_kv_heads: int
) -> tuple[ModelDescription, WeightSource]:
    """A model with `num_kv_heads` mean-pooled KV heads; neither argument changes.

    Raises:
        UnsupportedConfig: the number does not divide the model's, or the model has DMC, whose heads
            took decisions of their own.
    """
    heads = description.num_query_groups
    if num_kv_heads < 1 or heads % num_kv_heads:
        raise UnsupportedConfig(
            f"--kv-heads {num_kv_heads}: the model has {heads} KV heads; use a divisor of {heads}"
        )
    if num_kv_heads == heads:
        return description, source
    if description.dmc is not None:
        raise UnsupportedConfig(
            f"--kv-heads {num_kv_heads}: this is a DMC model (stage {description.dmc.stage}), and "
            "its heads have different entries, whose mean is meaningless; pool the base model, then retrofit it"
        )
    pooled = PooledKVHeads(source, description, num_kv_heads)
    return replace(description, num_query_groups=num_kv_heads), pooled
