"""Megatron's tensors by name: shapes, shards, and the sources that fill them one at a time.

Names are those of `GPTModel.state_dict()` with the local layer spec. Every format is read as a
`WeightSource` and written from one, so that a conversion holds one tensor at a time.
"""

import re
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from megatron_dmc.checkpoint.description import ModelDescription

TE_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Per layer: name in the local layer spec -> name in the Transformer Engine layer spec.

With a dense MLP both specs use the right-hand names in `torch_dist` checkpoints. With experts the
Transformer Engine spec keeps `pre_mlp_layernorm.weight`."""

EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
"""An expert's tensor, below the layer."""


class WeightSource(Protocol):
    """Source of a model's weights."""

    def fill(self, name: str, out: Tensor) -> None:
        """Write one tensor into `out`, converting its dtype; rows of vocabulary padding become zero.

        Args:
            name: one of `megatron_shapes`.
            out: of that shape, on the CPU.

        Raises:
            CheckpointError: it cannot be read.
        """
        ...


class StateSource:
    """Tensors that are in memory."""

    def __init__(self, state: Mapping[str, Tensor]):
        self.state = state

    def fill(self, name: str, out: Tensor) -> None:
        """See `WeightSource`."""
        out.copy_(self.state[name].detach())


def megatron_shapes(d: ModelDescription) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of the GPTModel, in the model's order."""
    qkv_rows = (d.num_attention_heads + 2 * d.num_query_groups) * d.kv_channels
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (d.hidden_size,),
        "self_attention.linear_qkv.weight": (qkv_rows, d.hidden_size),
    }
    if d.add_qkv_bias:
        layer["self_attention.linear_qkv.bias"] = (qkv_rows,)
    if d.qk_layernorm:
        layer["self_attention.q_layernorm.weight"] = (d.kv_channels,)
        layer["self_attention.k_layernorm.weight"] = (d.kv_channels,)
    layer["self_attention.linear_proj.weight"] = (
        d.hidden_size,
        d.num_attention_heads * d.kv_channels,
    )
    layer["pre_mlp_layernorm.weight"] = (d.hidden_size,)
    if d.num_experts is None:
        layer["mlp.linear_fc1.weight"] = (2 * d.ffn_hidden_size, d.hidden_size)
        layer["mlp.linear_fc2.weight"] = (d.hidden_size, d.ffn_hidden_size)
    else:
        assert d.moe_ffn_hidden_size is not None
        layer["mlp.router.weight"] = (d.num_experts, d.hidden_size)
        for e in range(d.num_experts):
            expert = f"mlp.experts.local_experts.{e}"
            layer[f"{expert}.linear_fc1.weight"] = (2 * d.moe_ffn_hidden_size, d.hidden_size)
            layer[f"{expert}.linear_fc2.weight"] = (d.hidden_size, d.moe_ffn_hidden_size)
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (d.padded_vocab_size, d.hidden_size)
    }
    for i in range(d.num_layers):
        shapes |= {f"decoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["decoder.final_layernorm.weight"] = (d.hidden_size,)
    if not d.share_embeddings_and_output_weights:
        shapes["output_layer.weight"] = (d.padded_vocab_size, d.hidden_size)
    return shapes


def weight_bytes(d: ModelDescription) -> int:
    """Bytes of all tensors in `d.dtype`."""
    return sum(torch.Size(s).numel() for s in megatron_shapes(d).values()) * d.dtype.itemsize


def read_tensor(source: WeightSource, name: str, shape: tuple[int, ...], dtype) -> Tensor:
    """One tensor of a source, newly allocated."""
    out = torch.empty(shape, dtype=dtype)
    with torch.no_grad():
        source.fill(name, out)
    return out


def _split_dim(name: str) -> int | None:
    """Along which dimension tensor parallelism splits a tensor; None: every rank has all of it."""
    if any(part in name for part in ("linear_proj", "linear_fc2")):
        return 1
    columns = ("linear_qkv", "linear_fc1", "word_embeddings", "output_layer")
    return 0 if any(part in name for part in columns) else None


def shard(name: str, tensor: Tensor, size: int, rank: int) -> Tensor:
    """One tensor-parallel rank's part of a Megatron tensor, as a view where it is one."""
    dim = _split_dim(name)
    if dim is None:
        return tensor
    if "linear_fc1" in name:  # gate and up are split separately
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(size, dim=dim)[rank]


class ShardSource:
    """One tensor-parallel rank's parts of a source's tensors: a `WeightSource` of those shapes."""

    def __init__(self, source: WeightSource, d: ModelDescription, *, size: int, rank: int):
        self._source, self._shapes, self._dtype = source, megatron_shapes(d), d.dtype
        self._size, self._rank = size, rank

    def fill(self, name: str, out: Tensor) -> None:
        """See `WeightSource`."""
        whole = read_tensor(self._source, name, self._shapes[name], self._dtype)
        out.copy_(shard(name, whole, self._size, self._rank))


def join(name: str, shards: list[Tensor], out: Tensor) -> None:
    """The inverse of `shard`: write all ranks' parts into the whole tensor.

    Raises:
        ValueError: the parts differ where every rank has all of the tensor, or do not fit.
    """
    dim = _split_dim(name)
    if dim is None:
        if any(not torch.equal(shards[0], other) for other in shards[1:]):
            raise ValueError("the tensor-parallel ranks' copies differ")
        parts, targets = shards[:1], [out]
    elif "linear_fc1" in name:
        parts = [half for s in shards for half in s.chunk(2)]
        gates, ups = (half.chunk(len(shards)) for half in out.chunk(2))
        targets = [t for pair in zip(gates, ups, strict=True) for t in pair]
    else:
        parts, targets = shards, list(out.chunk(len(shards), dim=dim))
    for part, target in zip(parts, targets, strict=True):
        if part.shape != target.shape:
            raise ValueError(f"a part has shape {list(part.shape)}, not {list(target.shape)}")
        target.copy_(part)
