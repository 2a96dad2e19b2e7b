"""RoPE pairs of queries and keys in a model's weights, and their order.

Pair j of a head are its channels j and j + D/2, which RoPE turns as one plane with frequency j. Pairs may stand in any order, the
same for queries and keys, if their frequencies do: no score changes.
"""

from dataclasses import replace

import torch
from torch import Tensor

from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.weights import WeightSource, megatron_shapes, read_tensor
from megatron_dmc.ops.gates import exchange_borrowed_pair


def is_qkv(name: str) -> bool:
    """Whether a tensor of Megatron is a fused QKV weight or bias."""
    return ".linear_qkv." in name and not name.endswith("layer_norm_weight")


def heads_by_pair(qkv: Tensor, d: ModelDescription) -> Tensor:
    """A view of a fused QKV tensor (rows, ...) as (G, N/G + 2, 2, D/2, ...): a group's queries, its key, its value."""
    per_group = d.num_attention_heads // d.num_query_groups
    return qkv.view(d.num_query_groups, per_group + 2, 2, d.kv_channels // 2, *qkv.shape[1:])


def pair_rows(qkv: Tensor, d: ModelDescription, pair: int) -> Tensor:
    """A view of a pair's rows in a fused QKV tensor (rows, ...): (G, N/G + 1, 2, ...), a group's queries and its key."""
    return heads_by_pair(qkv, d)[:, :-1, :, pair]


def rotate_rows(rows: Tensor, angles_G: Tensor) -> None:
    """Rotate the plane of a pair by an angle for each group.

    Args:
        rows: of `pair_rows`; mutated.
        angles_G: radians, of any floating dtype.
    """
    first, second = rows.unbind(2)
    shape = (-1, *[1] * (first.dim() - 1))
    cos, sin = (turn.to(rows.dtype).view(shape) for turn in (angles_G.cos(), angles_G.sin()))
    rows.copy_(torch.stack([cos * first + sin * second, cos * second - sin * first], dim=2))


class ExchangedPair:
    """Weights with a RoPE pair of queries and keys and the last pair exchanged: a `WeightSource`.

    Args:
        source: of the model as it is.
        description: of it; its own order is not looked at.
        pair: None: nothing changes.
    """

    def __init__(self, source: WeightSource, description: ModelDescription, pair: int | None):
        self._source, self._description, self._pair = source, description, pair

    def fill(self, name: str, out: Tensor) -> None:
        """See `WeightSource`."""
        self._source.fill(name, out)
        if name.endswith(("q_layernorm.weight", "k_layernorm.weight")):  # QK-norm
            by_pair = out.view(2, -1)
        elif is_qkv(name):
            by_pair = heads_by_pair(out, self._description)[:, :-1].movedim(3, -1)
        else:
            return
        by_pair.copy_(exchange_borrowed_pair(by_pair, self._pair))


def in_usual_order(
    description: ModelDescription, source: WeightSource
) -> tuple[ModelDescription, WeightSource]:
    """The same model with its RoPE pairs in the order of their frequencies; neither argument changes."""
    pair = description.borrowed_rope_pair
    if pair is None:
        return description, source
    usual = replace(description, borrowed_rope_pair=None)
    return usual, ExchangedPair(source, description, pair)


class RotatedLastPair:
    """Weights with the last RoPE pair of every KV head's query and key rotated: a `WeightSource`.

    Args:
        source: of the model as it is.
        angles_LG: of each layer and KV head, in radians.
    """

    def __init__(self, source: WeightSource, description: ModelDescription, angles_LG: Tensor):
        self._source, self._description, self._angles_LG = source, description, angles_LG

    def fill(self, name: str, out: Tensor) -> None:
        """See `WeightSource`. The rotation is computed in float32 or wider."""
        if not is_qkv(name):
            self._source.fill(name, out)
            return
        d = self._description
        dtype = torch.promote_types(torch.float32, d.dtype)
        qkv = read_tensor(self._source, name, megatron_shapes(d)[name], dtype)
        rotate_rows(pair_rows(qkv, d, -1), self._angles_LG[int(name.split(".")[2])])
        out.copy_(qkv)
