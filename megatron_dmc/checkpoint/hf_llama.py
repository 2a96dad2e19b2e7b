"""Weights of Hugging Face's LlamaForCausalLM, tensor by tensor, as Megatron's GPTModel has them.

Names of Megatron tensors are those of `GPTModel.state_dict()` with the local layer spec; `TE_NAMES`
gives the Transformer Engine spec's. Dimension letters: N query heads, G key/value heads (query
groups), D head dim, H hidden size, F feed-forward size, V vocabulary size.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
"""A folder's weights are split into files of at most this size."""

TE_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Per layer: name in the local layer spec -> name in the Transformer Engine layer spec.

In `torch_dist` checkpoints both specs use the right-hand names."""


def megatron_shapes(d: ModelDescription) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of the GPTModel."""
    qkv_rows = (d.num_attention_heads + 2 * d.num_query_groups) * d.kv_channels
    layer = {
        "input_layernorm.weight": (d.hidden_size,),
        "self_attention.linear_qkv.weight": (qkv_rows, d.hidden_size),
        "self_attention.linear_proj.weight": (
            d.hidden_size,
            d.num_attention_heads * d.kv_channels,
        ),
        "pre_mlp_layernorm.weight": (d.hidden_size,),
        "mlp.linear_fc1.weight": (2 * d.ffn_hidden_size, d.hidden_size),
        "mlp.linear_fc2.weight": (d.hidden_size, d.ffn_hidden_size),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (d.padded_vocab_size, d.hidden_size)
    }
    for i in range(d.num_layers):
        shapes |= {f"decoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["decoder.final_layernorm.weight"] = (d.hidden_size,)
    if not d.share_embeddings_and_output_weights:
        shapes["output_layer.weight"] = (d.padded_vocab_size, d.hidden_size)
    return shapes


def empty_state(d: ModelDescription) -> dict[str, Tensor]:
    """Zero tensors of all names and shapes, in `d.dtype` on the CPU."""
    return {name: torch.zeros(shape, dtype=d.dtype) for name, shape in megatron_shapes(d).items()}


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
            qkv = tensor.view(d.num_query_groups, per_group + 2, d.kv_channels, d.hidden_size)
            first, last = {
                "q": (0, per_group),
                "k": (per_group, per_group + 1),
                "v": (per_group + 1, per_group + 2),
            }[self.kind]
            return qkv[:, first:last]
        if self.kind == "gate":
            return tensor[: d.ffn_hidden_size]
        if self.kind == "up":
            return tensor[d.ffn_hidden_size :]
        if self.kind == "vocab":
            return tensor[: d.vocab_size]
        return tensor


def pieces(d: ModelDescription) -> list[Piece]:
    """All tensors of the Hugging Face model, in its order."""
    H, F, D = d.hidden_size, d.ffn_hidden_size, d.kv_channels
    q_rows, kv_rows = d.num_attention_heads * D, d.num_query_groups * D
    out = [
        Piece("model.embed_tokens.weight", (d.vocab_size, H),
              "embedding.word_embeddings.weight", "vocab")
    ]  # fmt: skip
    layer = [
        ("input_layernorm", (H,), "input_layernorm", "whole"),
        ("self_attn.q_proj", (q_rows, H), "self_attention.linear_qkv", "q"),
        ("self_attn.k_proj", (kv_rows, H), "self_attention.linear_qkv", "k"),
        ("self_attn.v_proj", (kv_rows, H), "self_attention.linear_qkv", "v"),
        ("self_attn.o_proj", (H, q_rows), "self_attention.linear_proj", "whole"),
        ("post_attention_layernorm", (H,), "pre_mlp_layernorm", "whole"),
        ("mlp.gate_proj", (F, H), "mlp.linear_fc1", "gate"),
        ("mlp.up_proj", (F, H), "mlp.linear_fc1", "up"),
        ("mlp.down_proj", (H, F), "mlp.linear_fc2", "whole"),
    ]
    for i in range(d.num_layers):
        for hf, shape, megatron, kind in layer:
            out.append(
                Piece(f"model.layers.{i}.{hf}.weight", shape,
                      f"decoder.layers.{i}.{megatron}.weight", kind)
            )  # fmt: skip
    out.append(Piece("model.norm.weight", (H,), "decoder.final_layernorm.weight", "whole"))
    if not d.share_embeddings_and_output_weights:
        out.append(Piece("lm_head.weight", (d.vocab_size, H), "output_layer.weight", "vocab"))
    return out


def _some(names: set[str]) -> str:
    ordered = sorted(names)
    rest = f" and {len(ordered) - 20} more" if len(ordered) > 20 else ""
    return ", ".join(ordered[:20]) + rest


class _Stored(NamedTuple):
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


class LlamaFolder:
    """The safetensors files of a Hugging Face folder, read one tensor at a time.

    Raises:
        CheckpointError: names the file that is missing or broken, and every tensor that is missing,
            unknown or of another shape than `description` says.
    """

    def __init__(self, path: str | Path, description: ModelDescription):
        self.path = Path(path)
        self.description = description
        self.pieces = pieces(description)
        self.stored: dict[str, _Stored] = {}
        for file, expected in self._files().items():
            self._read_header(file, expected)
        self._check_tensors()

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest dtype that holds every tensor exactly."""
        dtypes = [self.stored[p.hf_name].dtype for p in self.pieces]
        widest = dtypes[0]
        for dtype in dtypes[1:]:
            widest = torch.promote_types(widest, dtype)
        return widest

    def _files(self) -> dict[Path, set[str] | None]:
        single, index = self.path / SINGLE_FILE, self.path / INDEX_FILE
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
                files: dict[Path, set[str] | None] = {}
                for name, file in weight_map.items():
                    names = files.setdefault(self.path / file, set())
                    assert names is not None
                    names.add(name)
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                raise CheckpointError(f"{index}: not a safetensors index ({e})") from e
            return files
        if single.is_file():
            return {single: None}
        if any(self.path.glob("*.bin")):
            raise CheckpointError(
                f"{self.path}: holds pickled weights (*.bin) only; save the model as safetensors "
                "first"
            )
        raise CheckpointError(f"{self.path}: has neither {SINGLE_FILE} nor {INDEX_FILE}")

    def _read_header(self, file: Path, expected: set[str] | None) -> None:
        if not file.is_file():
            raise CheckpointError(f"{file}: is missing, and {INDEX_FILE} names it; copy it again")
        try:
            with safe_open(file, framework="pt") as f:
                names = set(f.keys())
                for name in names:
                    part = f.get_slice(name)
                    dtype = _SAFETENSORS_DTYPES.get(part.get_dtype())
                    if dtype is None:
                        raise CheckpointError(
                            f"{file}: {name} has dtype {part.get_dtype()}; only "
                            f"{', '.join(_SAFETENSORS_DTYPES)} are supported"
                        )
                    self.stored[name] = _Stored(file, tuple(part.get_shape()), dtype)
        except (SafetensorError, OSError) as e:
            raise CheckpointError(
                f"{file}: truncated or not a safetensors file ({e}); copy it again"
            ) from e
        if expected is not None and expected - names:
            raise CheckpointError(
                f"{file}: lacks tensors that {INDEX_FILE} says it has: {_some(expected - names)}"
            )

    def _check_tensors(self) -> None:
        wanted = {p.hf_name: p for p in self.pieces}
        missing = set(wanted) - set(self.stored)
        unknown = {
            n for n in set(self.stored) - set(wanted) if not n.endswith("rotary_emb.inv_freq")
        }
        tied_head = "lm_head.weight"
        if self.description.share_embeddings_and_output_weights and tied_head in unknown:
            if not torch.equal(self.read(tied_head), self.read("model.embed_tokens.weight")):
                raise CheckpointError(
                    f"{self.path}: config.json has tie_word_embeddings=true, but {tied_head} "
                    "differs from model.embed_tokens.weight; correct config.json"
                )
            unknown.remove(tied_head)
        complaints = []
        if missing:
            complaints.append(f"missing tensors: {_some(missing)}")
        if unknown:
            complaints.append(f"unknown tensors: {_some(unknown)}")
        complaints += [
            f"{name} has shape {list(self.stored[name].shape)}, config.json says "
            f"{list(piece.hf_shape)}"
            for name, piece in wanted.items()
            if name in self.stored and self.stored[name].shape != piece.hf_shape
        ][:20]
        if complaints:
            raise CheckpointError(f"{self.path}: {'; '.join(complaints)}")

    def read(self, name: str) -> Tensor:
        """One tensor, as stored."""
        file = self.stored[name].file
        try:
            with safe_open(file, framework="pt") as f:
                return f.get_tensor(name)
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{file}: cannot read {name} ({e})") from e

    def load_into(self, state: dict[str, Tensor], *, progress: bool = False) -> None:
        """Copy the weights into Megatron's tensors; rows of the padded vocabulary become zero.

        Args:
            state: tensors of the names and shapes of `megatron_shapes`, in any dtype.
        """
        with torch.no_grad():
            for piece in tqdm(
                self.pieces,
                desc="reading weights",
                unit="tensor",
                disable=None if progress else True,
            ):
                target = state[piece.megatron_name]
                if piece.kind == "vocab":
                    target[self.description.vocab_size :] = 0
                view = piece.view(target, self.description)
                view.copy_(self.read(piece.hf_name).view(view.shape))


def from_megatron(
    state: dict[str, Tensor], d: ModelDescription
) -> Iterator[tuple[str, tuple[int, ...], Tensor]]:
    """(name, shape, view of the Megatron tensor) of every Hugging Face tensor."""
    for piece in pieces(d):
        yield piece.hf_name, piece.hf_shape, piece.view(state[piece.megatron_name], d)


def write_folder(
    path: Path,
    state: dict[str, Tensor],
    d: ModelDescription,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Write `config.json` and the safetensors files, in `d.dtype`.

    Args:
        path: an existing folder.
        state: Megatron's tensors.

    Raises:
        OSError, SafetensorError: the files cannot be written.
    """
    (path / "config.json").write_text(json.dumps(d.to_hf_config(), indent=2) + "\n")
    shards: list[list[tuple[str, tuple[int, ...], Tensor]]] = [[]]
    sizes = [0]
    for name, shape, view in from_megatron(state, d):
        nbytes = view.numel() * d.dtype.itemsize
        if shards[-1] and sizes[-1] + nbytes > shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append((name, shape, view))
        sizes[-1] += nbytes
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(
        tqdm(shards, desc="writing weights", unit="file", disable=None if progress else True)
    ):
        file = (
            SINGLE_FILE
            if len(shards) == 1
            else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        )
        tensors = {
            name: view.detach()
            .to(d.dtype, copy=True, memory_format=torch.contiguous_format)
            .view(shape)
            for name, shape, view in shard
        }
        save_file(tensors, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
        (path / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
