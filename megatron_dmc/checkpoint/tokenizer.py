"""Tokenizers as the engine and the tools use them, and where checkpoints keep them."""

import json
import logging
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any, Protocol

from megatron_dmc.checkpoint.companions import copy_companion
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.errors import CheckpointError

_logger = logging.getLogger(__name__)

SENTENCEPIECE_FILE = "tokenizer.model"
TOKENIZER_FOLDER = "tokenizer"
"""Folder inside a Megatron checkpoint folder."""

_FAST_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
_COMPANIONS = (
    SENTENCEPIECE_FILE,
    *_FAST_FILES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


class Tokenizer(Protocol):
    """Text to token ids and back, without special tokens: callers add `bos_id` where wanted."""

    vocab_size: int
    """Largest token id + 1."""
    longest_token_bytes: int
    """UTF-8 bytes of the longest token, at least; servers bound a text's tokens with it."""
    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of token ids; special tokens are left out."""
        ...


class SentencePieceTokenizer:
    """A sentencepiece model file."""

    def __init__(self, file: Path):
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(file.read_bytes())
        except (OSError, RuntimeError) as e:
            raise CheckpointError(f"{file}: not a sentencepiece model ({e}); copy it again") from e
        self.vocab_size: int = self._model.vocab_size()
        pieces = self._model.id_to_piece(list(range(self.vocab_size)))
        self.longest_token_bytes = max(len(piece.encode()) for piece in pieces)
        bos, eos = self._model.bos_id(), self._model.eos_id()
        self.bos_id: int | None = bos if bos >= 0 else None
        self.eos_id: int | None = eos if eos >= 0 else None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self._model.EncodeAsIds(text))

    def decode(self, ids: list[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return str(self._model.DecodeIds([int(i) for i in ids if 0 <= i < self.vocab_size]))


class HuggingFaceTokenizer:
    """A tokenizer that transformers reads.

    Attributes:
        inner: transformers' own, with the special tokens and the chat template.
    """

    def __init__(self, folder: Path):
        from transformers import AutoTokenizer

        try:
            # without trust_remote_code=False it asks at the keyboard where a model brings code
            self.inner: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        except Exception as e:  # transformers raises many kinds
            reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
            raise CheckpointError(f"{folder}: no tokenizer can be read from it ({reason})") from e
        vocab = self.inner.get_vocab()
        self.vocab_size: int = max(vocab.values()) + 1
        self.longest_token_bytes = max(len(piece.encode()) for piece in vocab)
        self.bos_id: int | None = self.inner.bos_token_id
        self.eos_id: int | None = self.inner.eos_token_id

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self.inner.encode(text, add_special_tokens=False))

    def decode(self, ids: list[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return str(self.inner.decode(list(ids), skip_special_tokens=True))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder (or of a sentencepiece file).

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = Path(path)
    file = _sentencepiece_file(path)
    if file is not None:
        return SentencePieceTokenizer(file)
    folder = path.parent if path.is_file() else path
    if any((folder / name).is_file() for name in _FAST_FILES):
        return HuggingFaceTokenizer(folder)
    raise CheckpointError(
        f"{path}: no tokenizer; expected {SENTENCEPIECE_FILE} or {_FAST_FILES[0]} there"
    )


def _sentencepiece_file(path: Path) -> Path | None:
    """The sentencepiece model to use; None: transformers reads the tokenizer.

    A `tokenizer.json` beside it is preferred where tokens were added to it later (a chat model's).
    """
    if path.is_file():
        return None if path.name in _FAST_FILES else path
    file, fast = path / SENTENCEPIECE_FILE, path / _FAST_FILES[0]
    if not file.is_file():
        return None
    if fast.is_file():
        try:
            added = json.loads(fast.read_text()).get("added_tokens") or []
            last = max((int(token["id"]) for token in added), default=-1)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise CheckpointError(f"{fast}: damaged ({e}); copy it again") from e
        if last >= SentencePieceTokenizer(file).vocab_size:
            return None
    return file


def megatron_tokenizer(path: Path) -> tuple[str, Path]:
    """(--tokenizer-type, --tokenizer-model) with which Megatron trains on this tokenizer."""
    file = _sentencepiece_file(path)
    if file is not None:
        return "SentencePieceTokenizer", file
    return "HuggingFaceTokenizer", path.parent if path.is_file() else path


def find_tokenizer(path: str | Path, args: Namespace | None = None) -> Path | None:
    """Where a checkpoint's tokenizer is: beside the weights, in `tokenizer/`, or as trained with.

    Args:
        path: a Hugging Face folder or a Megatron checkpoint folder.
        args: Megatron's saved arguments; `args.tokenizer_model` is the last place to look.

    Returns:
        something for `load_tokenizer`, or None.
    """
    places = [Path(path), Path(path) / TOKENIZER_FOLDER]
    if args is not None and getattr(args, "tokenizer_model", None):
        places.append(Path(args.tokenizer_model))
    for place in places:
        if place.is_file() or any(
            (place / name).is_file() for name in (SENTENCEPIECE_FILE, *_FAST_FILES)
        ):
            return place
    if trained_with := getattr(args, "tokenizer_model", None):
        _logger.warning(
            "%s: has no tokenizer, and the one that it was trained with is not at %s (from %s); copy it to "
            "%s or name it", path, trained_with, Path.cwd(), Path(path) / TOKENIZER_FOLDER,
        )  # fmt: skip
    return None


def check_vocab(tokenizer: Tokenizer, description: ModelDescription) -> None:
    """Raises:
    CheckpointError: the tokenizer has ids for which the model has no embedding.
    """
    if tokenizer.vocab_size > description.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size} token ids, the model's vocabulary "
            f"{description.vocab_size}; use the tokenizer that the model was trained with"
        )


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy tokenizer files (and generation_config.json) into a folder, made if missing.

    Args:
        source: as found by `find_tokenizer`; a single file that is not called like one of the usual
            tokenizer files is taken for a sentencepiece model.
    """
    target.mkdir(exist_ok=True)
    folder = source.parent if source.is_file() else source
    for name in _COMPANIONS:
        if source.is_file() and name == SENTENCEPIECE_FILE and source.name not in _FAST_FILES:
            shutil.copyfile(source, target / name)
        elif (folder / name).is_file() and (source.is_dir() or source.name in _COMPANIONS):
            copy_companion(folder / name, target / name)
