"""Locations of a model's tensors among the stored tensors of a `torch_dist` checkpoint."""

import re
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.weights import EXPERT, TE_NAMES

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


class Place(NamedTuple):
    """Location of a model's tensor in a checkpoint: `tensor[at]` of a stored tensor."""

    key: str
    at: tuple[int, ...]
    shape: tuple[int, ...]
    """Of the whole stored tensor."""


def places_of(name: str, shape: tuple[int, ...], d: ModelDescription) -> list[Place]:
    """Megatron's locations of a name of `megatron_shapes`; `write` uses the first.

    Layers, and a layer's experts, are stacked or (layers that differ) stored one by one; a norm has
    the name of the local or of the Transformer Engine layer spec.
    """
    match = _LAYER.fullmatch(name)
    if not match:
        return [Place(name, (), shape)]
    layer, inner = int(match[1]), match[2]
    index: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    inners = [TE_NAMES[inner], inner] if inner in TE_NAMES else [inner]
    if expert := EXPERT.fullmatch(inner):
        assert d.num_experts is not None
        inners = [f"mlp.experts.experts.{expert[2]}"]
        index, sizes = (int(expert[1]),), (d.num_experts,)
    return [
        place
        for inner in inners
        for place in (
            Place(f"decoder.layers.{inner}", (layer, *index), (d.num_layers, *sizes, *shape)),
            Place(f"decoder.layers.{layer}.{inner}", index, (*sizes, *shape)),
        )
    ]


def chunk_of(place: Place) -> ChunkStorageMetadata:
    """The part of a stored tensor that is one tensor of the model."""
    rest = place.shape[len(place.at) :]
    return ChunkStorageMetadata(
        torch.Size((*place.at, *(0 for _ in rest))),
        torch.Size((*(1 for _ in place.at), *rest)),
    )
