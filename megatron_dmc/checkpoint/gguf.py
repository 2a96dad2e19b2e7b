"""A GGUF file (llama.cpp's format) of a Llama, Mistral, Qwen2 or Qwen3 model, read tensor by tensor.

Weights are dequantised by the `gguf` library; the tokenizer is rebuilt by transformers and gets what the
file says of its pre-tokenizer.
"""

import atexit
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.families import family_named
from megatron_dmc.checkpoint.field_checks import shown
from megatron_dmc.checkpoint.gguf_tokenizer import build_tokenizer
from megatron_dmc.checkpoint.hf_config import LLAMA3_ROPE, from_hf_config
from megatron_dmc.checkpoint.hf_tensors import Piece, PieceSource
from megatron_dmc.errors import CheckpointError, UnsupportedConfig

SUFFIX = ".gguf"

_FAMILIES = ("llama", "qwen2", "qwen3")
"""Values of `general.architecture`, named as Hugging Face's model types. Mistral's files say "llama"."""

_INTERLEAVED = "llama"
"""The architecture whose query and key rows llama.cpp reorders: RoPE's pairs stand side by side there."""

_SIZES = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
}
"""config.json's name -> the file's, below the architecture."""

_ROPE_FACTORS = "rope_freqs.weight"

LONGEST_ARRAY = 64
"""Longer metadata (the vocabulary, its scores and merges) is left to the tokenizer's reader."""


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path leads to: itself, or the only one of a folder without safetensors.

    Raises:
        CheckpointError: the folder has several.
    """
    if path.is_file():
        return path if path.suffix == SUFFIX else None
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    files = sorted(path.glob(f"*{SUFFIX}"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:10])
        raise CheckpointError(f"{path}: holds {len(files)} GGUF files ({names}); name one of them")
    return files[0] if files else None


class GGUFFile(PieceSource):
    """A GGUF file's weights.

    Attributes:
        description: of the model. Its dtype is bfloat16 where weights are quantised, else the stored one.

    Raises:
        CheckpointError: the file is damaged, or one of several parts; or tensors are missing, unknown or of
            other shapes than its metadata says.
        UnsupportedConfig: the model has a part without a counterpart here.
    """

    def __init__(self, file: Path):
        self.file = file
        self._tokenizer: Path | None = None
        reader = _read(file)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.metadata: dict[str, Any] = {
            name: _value(field)
            for name, field in reader.fields.items()
            if len(field.data) <= LONGEST_ARRAY
        }
        self._set_description(self._describe())
        self._names = self._map_names()
        self._check_tensors()

    def tokenizer_folder(self) -> Path:
        """A folder with its tokenizer and chat template as transformers saves them. It is there until the
        process ends.

        Raises:
            CheckpointError: the tokenizer is damaged or not known.
        """
        if self._tokenizer is None:
            folder = tempfile.TemporaryDirectory(prefix="megatron-dmc-tokenizer-")
            atexit.register(folder.cleanup)
            build_tokenizer(self.file, self.metadata).save_pretrained(folder.name)
            self._tokenizer = Path(folder.name)
        return self._tokenizer

    def read_rows(self, piece: Piece, first: int, last: int) -> Tensor:
        """See `PieceSource`; dequantised to float32."""
        import gguf

        stored = self._tensors[self._names[piece.hf_name]]
        try:
            values = gguf.dequantize(stored.data[first:last], stored.tensor_type)
        except (NotImplementedError, ValueError) as e:
            raise CheckpointError(f"{self.file}: {stored.name} cannot be dequantised ({e})") from e
        rows = torch.tensor(values).reshape(last - first, *piece.hf_shape[1:])
        if piece.kind in ("q", "k") and self._architecture == _INTERLEAVED:
            half = self.description.kv_channels // 2
            rows = rows.unflatten(0, (-1, half, 2)).transpose(1, 2).flatten(0, 2)
        return rows

    @property
    def _architecture(self) -> str:
        return self.metadata["general.architecture"]

    def _describe(self) -> ModelDescription:
        architecture = self.metadata.get("general.architecture")
        if architecture not in _FAMILIES:
            raise UnsupportedConfig(
                f"{self.file}: general.architecture is {shown(architecture)}; supported in GGUF files: "
                f"{', '.join(_FAMILIES)} (Mistral's say llama)"
            )

        def field(name: str, default: Any = None) -> Any:
            return self.metadata.get(f"{architecture}.{name}", default)

        if field("expert_count", 0):
            raise UnsupportedConfig(
                f"{self.file}: has {field('expert_count')} experts; models with experts are read from "
                "Hugging Face folders only"
            )
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise CheckpointError(f"{self.file}: has no token_embd.weight; copy it again")
        config = {name: field(key) for name, key in _SIZES.items() if field(key) is not None}
        config |= {
            "architectures": [family_named(architecture).architecture],
            "model_type": architecture,
            "vocab_size": int(embedding.shape[-1]),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "dtype": self._dtype(),
            "bos_token_id": self.metadata.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.metadata.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.metadata.get("tokenizer.ggml.padding_token_id"),
            **self._rope_scaling(field),
        }
        try:
            description = from_hf_config(config)
        except UnsupportedConfig as e:
            reason = str(e).removeprefix("config.json: ")
            raise UnsupportedConfig(f"{self.file}: {reason}") from e
        for name in ("attention.value_length", "rope.dimension_count"):
            size = field(name, description.kv_channels)
            if size != description.kv_channels:
                raise UnsupportedConfig(
                    f"{self.file}: {architecture}.{name} is {shown(size)}; only the head dim, "
                    f"{description.kv_channels}, is supported"
                )
        return description

    def _rope_scaling(self, field: Any) -> dict[str, Any]:
        """Llama 3's scaling is stored as one factor for each frequency; that of the lowest is the model's."""
        kind = field("rope.scaling.type", "none")
        if kind != "none":
            factor = field("rope.scaling.factor")
            return {"rope_scaling": {"rope_type": kind, "factor": factor}}
        if _ROPE_FACTORS not in self._tensors:
            return {}
        stored = torch.from_numpy(self._tensors[_ROPE_FACTORS].data.copy()).float()
        factor = float(f"{float(stored.max()):.6g}")
        expected = _llama3_factors(factor, 2 * len(stored), float(field("rope.freq_base", 10000.0)))
        if not torch.allclose(stored, expected, rtol=1e-3):
            raise UnsupportedConfig(
                f"{self.file}: {_ROPE_FACTORS} is not Llama 3's RoPE scaling with {LLAMA3_ROPE}; other "
                "scalings are not supported"
            )
        return {"rope_scaling": {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}}

    def _dtype(self) -> str:
        stored = {t.tensor_type.name for t in self._tensors.values() if len(t.shape) > 1}
        if stored == {"F32"}:
            return "float32"
        return "float16" if stored <= {"F16", "F32"} else "bfloat16"

    def _map_names(self) -> dict[str, str]:
        """Hugging Face's names to the file's."""
        import gguf

        kind = gguf.MODEL_ARCH[self._architecture.upper()]
        names = gguf.get_tensor_name_map(kind, self.description.num_layers)
        return {
            piece.hf_name: str(names.get_name(piece.hf_name, try_suffixes=(".weight", ".bias")))
            for piece in self.pieces
        }

    def _check_tensors(self) -> None:
        wanted = {self._names[piece.hf_name]: piece for piece in self.pieces}
        missing = sorted(set(wanted) - set(self._tensors))
        unknown = sorted(set(self._tensors) - set(wanted) - {_ROPE_FACTORS})
        complaints = []
        if missing:
            complaints.append(f"missing tensors: {', '.join(missing[:20])}")
        if unknown:
            complaints.append(f"unknown tensors: {', '.join(unknown[:20])}")
        for name, piece in wanted.items():
            shape = (
                tuple(int(n) for n in reversed(self._tensors[name].shape))
                if name in self._tensors
                else None
            )
            if shape is not None and shape != piece.hf_shape:
                complaints.append(
                    f"{name} has shape {list(shape)}, the metadata says {list(piece.hf_shape)}"
                )
        if complaints:
            raise CheckpointError(f"{self.file}: {'; '.join(complaints[:20])}")


def _read(file: Path) -> Any:
    try:
        import gguf
    except ModuleNotFoundError as e:
        raise CheckpointError(
            f"{file}: {e.name} is not installed: pip install 'megatron-dmc[gguf]'"
        ) from e
    try:
        reader = gguf.GGUFReader(file)
        parts = reader.get_field("split.count")
        num_parts = parts.contents() if parts is not None else 1
    except Exception as e:  # of a damaged file, many kinds
        raise CheckpointError(f"{file}: truncated or not a GGUF file ({e}); copy it again") from e
    if num_parts > 1:
        raise CheckpointError(
            f"{file}: is one of {num_parts} parts; join them first (llama-gguf-split --merge)"
        )
    return reader


def _value(field: Any) -> Any:
    """A field's value; a number that was stored in 32 bits as the one with the fewest digits."""
    value = field.contents()
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _llama3_factors(factor: float, head_dim: int, base: float) -> Tensor:
    """Divisors of the frequencies, [head_dim / 2] (Llama 3.1's model code)."""
    context = LLAMA3_ROPE["original_max_position_embeddings"]
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    frequencies = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    turns = context * frequencies / (2 * torch.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
