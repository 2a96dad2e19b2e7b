"""A Hugging Face folder's weights, read and written one tensor at a time."""

import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.field_checks import read_json_object, shown
from megatron_dmc.checkpoint.hf_config import to_hf_config
from megatron_dmc.checkpoint.hf_tensors import Piece, PieceSource, layer_rows, pieces
from megatron_dmc.checkpoint.rope_pairs import in_usual_order
from megatron_dmc.checkpoint.weights import (
    StateSource,
    WeightSource,
    megatron_shapes,
    read_tensor,
)
from megatron_dmc.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
HEADER_BYTES = INDEX_BYTES = 16 * 2**20
"""Longer headers and indices are refused; those of known models are shorter."""
SHARD_BYTES = 5_000_000_000
"""A folder's weights are split into files of at most this size."""


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


class HFFolder(PieceSource):
    """The safetensors files of a Hugging Face folder.

    Raises:
        CheckpointError: names the file that is missing or broken, and every tensor that is missing,
            unknown or of another shape than `description` says.
    """

    def __init__(self, path: str | Path, description: ModelDescription):
        self.path, self.description = Path(path), description
        self.stored: dict[str, _Stored] = {}
        for file, expected in self._files().items():
            self._read_header(file, expected)
        self._check_count()
        self._set_description(description)
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
            weight_map = read_json_object(index, most_bytes=INDEX_BYTES).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{index}: not a safetensors index; copy it again")
            files: dict[Path, set[str] | None] = {}
            for name, file in weight_map.items():
                if not isinstance(file, str) or not 0 < len(file) < 256:
                    raise CheckpointError(
                        f"{index}: {shown(name)} is in {shown(file)}, not a file name"
                    )
                if PurePath(file).is_absolute() or ".." in PurePath(file).parts:
                    raise CheckpointError(
                        f"{index}: says that {shown(name)} is in {shown(file)}, outside of its folder; put "
                        "the weights into the folder and correct the index"
                    )
                names = files.setdefault(self.path / file, set())
                assert names is not None
                names.add(name)
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
            with open(file, "rb") as head:
                length = int.from_bytes(head.read(8), "little")
            if length > HEADER_BYTES:
                raise CheckpointError(
                    f"{file}: truncated or not a safetensors file (a header of {length} bytes); copy it "
                    "again"
                )
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
                    if name in self.stored:
                        other = self.stored[name].file
                        raise CheckpointError(
                            f"{file}: {name} is in {other.name} too; remove the file that is not the model's"
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

    def _check_count(self) -> None:
        """Before a list of all tensors is made: whether as many could be there."""
        d = self.description
        expected = 3 - d.share_embeddings_and_output_weights + d.num_layers * len(layer_rows(d))
        if expected > 10 * len(self.stored) + 100:
            experts = f" with num_experts={d.num_experts}" if d.num_experts else ""
            raise CheckpointError(
                f"{self.path}: config.json describes {expected} tensors (num_hidden_layers="
                f"{d.num_layers}{experts}), the files hold {len(self.stored)}; correct config.json or copy "
                "the missing files"
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

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Rows `first` to `last` (not included) of one tensor, as stored; all without `last`."""
        file = self.stored[name].file
        try:
            with safe_open(file, framework="pt") as f:
                return f.get_slice(name)[first:last]
        except (SafetensorError, OSError) as e:
            raise CheckpointError(f"{file}: cannot read {name} ({e})") from e

    def read_rows(self, piece: Piece, first: int, last: int) -> Tensor:
        """See `PieceSource`."""
        return self.read(piece.hf_name, first, last)


def _plan_files(d: ModelDescription, shard_bytes: int) -> tuple[list[list[Piece]], int]:
    """(pieces of every file, bytes in all): files of at most `shard_bytes` or one tensor."""
    files: list[list[Piece]] = [[]]
    size = total = 0
    for piece in pieces(d):
        nbytes = _nbytes(piece, d.dtype)
        if files[-1] and size + nbytes > shard_bytes:
            files.append([])
            size = 0
        files[-1].append(piece)
        size += nbytes
        total += nbytes
    return files, total


def _nbytes(piece: Piece, dtype: torch.dtype) -> int:
    return torch.Size(piece.hf_shape).numel() * dtype.itemsize


def _header(content: list[Piece], dtype: torch.dtype) -> bytes:
    """The head of a safetensors file: length, then JSON with dtype, shape and place of each tensor."""
    name = next(key for key, value in _SAFETENSORS_DTYPES.items() if value == dtype)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in content:
        begin, end = end, end + _nbytes(piece, dtype)
        entries[piece.hf_name] = {
            "dtype": name, "shape": list(piece.hf_shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_folder(
    path: Path,
    weights: WeightSource | Mapping[str, Tensor],
    d: ModelDescription,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = False,
) -> None:
    """Write `config.json` and the safetensors files, in `d.dtype`, one tensor at a time.

    A plain model is written with its RoPE pairs in the usual order, which is all that transformers' own models know.

    Args:
        path: an existing folder.
        weights: a source, or Megatron's tensors by name.

    Raises:
        OSError: the files cannot be written.
        CheckpointError: the source cannot be read.
    """
    source = StateSource(weights) if isinstance(weights, Mapping) else weights
    if d.dmc is None:
        d, source = in_usual_order(d, source)
    (path / "config.json").write_text(json.dumps(to_hf_config(d), indent=2) + "\n")
    files, total = _plan_files(d, shard_bytes)
    shapes = megatron_shapes(d)
    weight_map: dict[str, str] = {}
    current, tensor = "", torch.empty(0)
    bar = tqdm(
        total=sum(map(len, files)), desc="converting weights", unit="tensor",
        disable=None if progress else True,
    )  # fmt: skip
    with bar:
        for i, content in enumerate(files):
            file = SINGLE_FILE
            if len(files) > 1:
                file = f"model-{i + 1:05d}-of-{len(files):05d}.safetensors"
            # the library writes whole files from memory, so this writes their simple format itself
            with open(path / file, "wb") as f:
                f.write(_header(content, d.dtype))
                for piece in content:
                    if piece.megatron_name != current:
                        del tensor  # before the next is allocated
                        current = piece.megatron_name
                        tensor = read_tensor(source, current, shapes[current], d.dtype)
                    part = piece.view(tensor, d).contiguous()
                    f.write(part.view(-1).view(torch.uint8).numpy().data)
                    bar.update()
            weight_map |= dict.fromkeys((piece.hf_name for piece in content), file)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
