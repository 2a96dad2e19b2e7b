"""A Hugging Face model's tensors as parts of Megatron's."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.families import family_named
from megatron_dmc.checkpoint.weights import megatron_shapes

BLOCK_BYTES = 64_000_000
"""Large tensors are read in blocks of rows of at most this size, as float32."""


@dataclass(frozen=True)
class Piece:
    """One Hugging Face tensor as a part of a Megatron tensor."""

    hf_name: str
    hf_shape: tuple[int, ...]
    megatron_name: str
    kind: str

    def view(self, tensor: Tensor, d: ModelDescription) -> Tensor:
        """The part of the Megatron tensor, as a view (of another shape than `hf_shape` for qkv)."""
        per_group = d.num_attention_heads // d.num_query_groups
        if self.kind in ("q", "k", "v"):
            # rows of a group: its query heads, its key head, its value head
            qkv = tensor.view(d.num_query_groups, per_group + 2, d.kv_channels, *tensor.shape[1:])
            first, last = {
                "q": (0, per_group),
                "k": (per_group, per_group + 1),
                "v": (per_group + 1, per_group + 2),
            }[self.kind]
            return qkv[:, first:last]
        if self.kind in ("gate", "up"):
            return tensor.chunk(2)[self.kind == "up"]
        if self.kind == "vocab":
            return tensor[: d.vocab_size]
        return tensor


def layer_rows(d: ModelDescription) -> list[tuple[str, str, str]]:
    """(Hugging Face name, Megatron name, kind) of a layer's tensors, both below the layer.

    Parts of one Megatron tensor follow each other.
    """
    rows = [("input_layernorm.weight", "input_layernorm.weight", "whole")]
    for what in ("weight", "bias") if d.add_qkv_bias else ("weight",):
        rows += [
            (f"self_attn.{part}_proj.{what}", f"self_attention.linear_qkv.{what}", part)
            for part in "qkv"
        ]
    if d.qk_layernorm:
        rows += [
            (f"self_attn.{part}_norm.weight", f"self_attention.{part}_layernorm.weight", "whole")
            for part in "qk"
        ]
    rows += [
        ("self_attn.o_proj.weight", "self_attention.linear_proj.weight", "whole"),
        ("post_attention_layernorm.weight", "pre_mlp_layernorm.weight", "whole"),
    ]
    experts = family_named(d.model_type).experts
    mlps = [("mlp.{part}", ("gate_proj", "up_proj", "down_proj"), "mlp")]
    if experts is not None:
        rows.append((f"{experts.router}.weight", "mlp.router.weight", "whole"))
        mlps = [
            (experts.expert.replace("{e}", str(e)), experts.parts, f"mlp.experts.local_experts.{e}")
            for e in range(d.num_experts or 0)
        ]
    for template, (gate, up, down), megatron in mlps:
        rows += [
            (template.replace("{part}", part) + ".weight", f"{megatron}.{target}.weight", kind)
            for part, target, kind in (
                (gate, "linear_fc1", "gate"),
                (up, "linear_fc1", "up"),
                (down, "linear_fc2", "whole"),
            )
        ]
    return rows


def pieces(d: ModelDescription) -> list[Piece]:
    """All tensors of the Hugging Face model; parts of one Megatron tensor follow each other."""
    rows = [("model.embed_tokens.weight", "embedding.word_embeddings.weight", "vocab")]
    layer = layer_rows(d)
    for i in range(d.num_layers):
        rows += [(f"model.layers.{i}.{a}", f"decoder.layers.{i}.{b}", kind) for a, b, kind in layer]
    rows.append(("model.norm.weight", "decoder.final_layernorm.weight", "whole"))
    if not d.share_embeddings_and_output_weights:
        rows.append(("lm_head.weight", "output_layer.weight", "vocab"))
    shapes = megatron_shapes(d)
    kv_rows = d.num_query_groups * d.kv_channels

    def shape(megatron: str, kind: str) -> tuple[int, ...]:
        whole = shapes[megatron]
        first = {
            "q": d.num_attention_heads * d.kv_channels, "k": kv_rows, "v": kv_rows,
            "gate": whole[0] // 2, "up": whole[0] // 2, "vocab": d.vocab_size, "whole": whole[0],
        }[kind]  # fmt: skip
        return (first, *whole[1:])

    return [Piece(hf, shape(megatron, kind), megatron, kind) for hf, megatron, kind in rows]


class PieceSource(ABC):
    """A `WeightSource` of a file that holds Hugging Face's tensors.

    Attributes:
        pieces: all of them, as `description` has them.
    """

    description: ModelDescription
    pieces: list[Piece]

    def _set_description(self, description: ModelDescription) -> None:
        self.description, self.pieces = description, pieces(description)
        self._parts: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            self._parts.setdefault(piece.megatron_name, []).append(piece)

    @abstractmethod
    def read_rows(self, piece: Piece, first: int, last: int) -> Tensor:
        """Rows `first` to `last` (not included) of a tensor."""

    def fill(self, name: str, out: Tensor) -> None:
        """See `WeightSource`."""
        for piece in self._parts[name]:
            if piece.kind == "vocab":
                out[self.description.vocab_size :] = 0
            view, num_rows = piece.view(out, self.description), piece.hf_shape[0]
            if view.shape != piece.hf_shape:
                view.copy_(self.read_rows(piece, 0, num_rows).view(view.shape))
                continue
            # a file stays mapped while it is open: in blocks, less of it is in memory at once
            row_bytes = 4 * max(1, torch.Size(piece.hf_shape[1:]).numel())
            step = max(1, BLOCK_BYTES // row_bytes)
            for first in range(0, num_rows, step):
                rows = view[first : first + step]
                rows.copy_(self.read_rows(piece, first, first + len(rows)))
