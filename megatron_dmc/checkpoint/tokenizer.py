"""Tokenizers as the engine and the tools use them, and where checkpoints keep them."""

import json
import logging
import re
import shutil
from argparse import Namespace
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_dmc.checkpoint.companions import copy_companion
from megatron_dmc.checkpoint.hub import local_path
from megatron_dmc.checkpoint.transformers_tokenizer import read_tokenizer
from megatron_dmc.errors import CheckpointError

if TYPE_CHECKING:
    from megatron_dmc.checkpoint.description import ModelDescription

_logger = logging.getLogger(__name__)

SENTENCEPIECE_FILE = "tokenizer.model"
TOKENIZER_FOLDER = "tokenizer"
"""Folder inside a Megatron checkpoint folder."""

_FAST_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
_CONFIG_FILE = "tokenizer_config.json"
_COMPANIONS = (
    SENTENCEPIECE_FILE,
    *_FAST_FILES,
    "merges.txt",
    _CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
_TEMPLATE_FOLDER = "additional_chat_templates"
"""Folder in which transformers 5 stores chat templates other than the default one."""
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\ufffd"


class Tokenizer(Protocol):
    """Text to token ids and back."""

    vocab_size: int
    """Largest token id + 1."""
    longest_token_bytes: int | None
    """UTF-8 bytes of the longest token, at least; servers bound a text's tokens with it. None: unknown."""
    bos_id: int | None
    eos_id: int | None
    special_ids: frozenset[int]
    """Tokens that `decode` can leave out: begin and end of text, padding, turns of a chat, ..."""

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            add_special_tokens: with the tokens that the tokenizer is set up to put around a text, as
                transformers does by default.
        """
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """UTF-8 of a token as it continues a text, perhaps a part of a character only."""
        ...


class SentencePieceTokenizer:
    """A sentencepiece model file.

    Whether it begins texts with the begin-of-text token (and ends them with the end-of-text token) is
    said by a `tokenizer_config.json` in the same folder; without one it does not.
    """

    def __init__(self, file: Path):
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(file.read_bytes())
        except (OSError, RuntimeError) as e:
            raise CheckpointError(f"{file}: not a sentencepiece model ({e}); copy it again") from e
        self.vocab_size: int = self._model.vocab_size()
        pieces = self._model.id_to_piece(list(range(self.vocab_size)))
        self.longest_token_bytes: int | None = max(len(piece.encode()) for piece in pieces)
        bos, eos = self._model.bos_id(), self._model.eos_id()
        self.bos_id: int | None = bos if bos >= 0 else None
        self.eos_id: int | None = eos if eos >= 0 else None
        self.special_ids = frozenset(filter(self._model.IsControl, range(self.vocab_size)))
        adds_bos, adds_eos = _adds_special_tokens(file.parent / _CONFIG_FILE)
        self._before = [bos] if adds_bos and bos >= 0 else []
        self._after = [eos] if adds_eos and eos >= 0 else []

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """See `Tokenizer.encode`."""
        ids = list(self._model.EncodeAsIds(text))
        return [*self._before, *ids, *self._after] if add_special_tokens else ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """See `Tokenizer.decode`. Ids outside of the vocabulary have no text."""
        text, run = "", []
        for i in [int(i) for i in ids if 0 <= i < self.vocab_size]:
            if i not in self.special_ids:
                run.append(i)
            elif not skip_special_tokens:
                text += self._text(run, begins=not text) + self._model.IdToPiece(i)
                run = []
        return text + self._text(run, begins=not text)

    def token_bytes(self, token_id: int) -> bytes:
        """See `Tokenizer.token_bytes`."""
        piece = self._model.IdToPiece(token_id)
        byte = _BYTE_PIECE.fullmatch(piece) if self._model.IsByte(token_id) else None
        return bytes([int(byte[1], 16)]) if byte else piece.replace("\u2581", " ").encode()

    def _text(self, run: list[int], *, begins: bool) -> str:
        """sentencepiece drops the space that a text begins with; within one it is kept."""
        text = str(self._model.DecodeIds(run))
        is_dropped = run and not begins and self._model.IdToPiece(run[0]).startswith("\u2581")
        return f" {text}" if is_dropped and not text.startswith(" ") else text


class HuggingFaceTokenizer:
    """A tokenizer that transformers reads.

    Args:
        place: its folder, or a tokenizer of transformers.
        trust_remote_code: run the folder's own code where it has some.

    Attributes:
        inner: transformers' own, with the special tokens and the chat template.
    """

    def __init__(self, place: Path | Any, *, trust_remote_code: bool = False):
        self.inner = read_tokenizer(place, trust_remote_code) if isinstance(place, Path) else place
        # settles padding and truncation: from then on encoding changes nothing, in no thread
        self.inner.encode("")
        self._decodes_plainly = _decodes_plainly(self.inner)
        vocab = self.inner.get_vocab()
        self.vocab_size: int = max(vocab.values()) + 1
        self.longest_token_bytes: int | None = max(len(piece.encode()) for piece in vocab)
        self.bos_id: int | None = self.inner.bos_token_id
        self.eos_id: int | None = self.inner.eos_token_id
        added = self.inner.added_tokens_decoder.items()
        self.special_ids = frozenset(
            [*self.inner.all_special_ids, *(i for i, token in added if token.special)]
        )

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """See `Tokenizer.encode`."""
        return list(self.inner.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """See `Tokenizer.decode`. Spaces stay as they are, so that a text only grows at its end."""
        if self._decodes_plainly:  # what transformers' own method comes to, at a third of its time
            return self.inner.backend_tokenizer.decode(
                list(ids), skip_special_tokens=skip_special_tokens
            )
        text = self.inner.decode(
            list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        return str(text)

    def token_bytes(self, token_id: int) -> bytes:
        """See `Tokenizer.token_bytes`."""
        piece = self.inner.convert_ids_to_tokens(token_id)
        if not isinstance(piece, str):  # an id without a token
            return b""
        text = _continuation(self, token_id)
        if _REPLACEMENT not in text:
            return text.encode()
        if byte := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        table = _byte_of_letter()
        if all(letter in table for letter in piece):
            return bytes(table[letter] for letter in piece)
        return text.encode()


class _GivenTokenizer:
    """A caller's object with `encode(text)`, `decode(ids)`, `bos_id` and `eos_id`, which adds no tokens
    to a text."""

    def __init__(self, inner: Any):
        self.inner = inner
        self.bos_id, self.eos_id = inner.bos_id, inner.eos_id
        self.vocab_size: int = getattr(inner, "vocab_size", 0)
        self.longest_token_bytes: int | None = getattr(inner, "longest_token_bytes", None)
        self.special_ids = frozenset({inner.bos_id, inner.eos_id} - {None})

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return list(self.inner.encode(text))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        skipped = self.special_ids if skip_special_tokens else ()
        return str(self.inner.decode([i for i in ids if i not in skipped]))

    def token_bytes(self, token_id: int) -> bytes:
        return _continuation(self, token_id).encode()


def as_tokenizer(given: Any | None) -> Tokenizer | None:
    """Convert a caller's tokenizer to a `Tokenizer`.

    Args:
        given: a `Tokenizer`; a tokenizer of transformers; an object with `encode(text)`, `decode(ids)`,
            `bos_id` and `eos_id`, which is taken to add no tokens; or None.
    """
    if given is None or hasattr(given, "special_ids"):
        return given
    return (
        HuggingFaceTokenizer(given) if hasattr(given, "all_special_ids") else _GivenTokenizer(given)
    )


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a folder, of a sentencepiece file, or of an id of the Hugging Face Hub.

    A folder's is the one that transformers reads there; only one that holds nothing but a sentencepiece
    model is read without it.

    Args:
        trust_remote_code: run the folder's own code, if any; otherwise no code is run, without
            a prompt.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = local_path(path, with_weights=False)
    if path.is_file() and path.name not in _FAST_FILES:
        return SentencePieceTokenizer(path)
    folder = path.parent if path.is_file() else path
    file = folder / SENTENCEPIECE_FILE
    if any((folder / name).is_file() for name in _FAST_FILES) or (
        file.is_file() and (folder / _CONFIG_FILE).is_file()
    ):
        return HuggingFaceTokenizer(folder, trust_remote_code=trust_remote_code)
    if file.is_file():
        return SentencePieceTokenizer(file)
    raise CheckpointError(
        f"{path}: no tokenizer; expected {SENTENCEPIECE_FILE} or {_FAST_FILES[0]} there"
    )


def _decodes_plainly(inner: Any) -> bool:
    """Whether a tokenizer of transformers decodes with the tokenizers library alone."""
    from transformers import PreTrainedTokenizerFast as Fast

    kind = type(inner)
    return issubclass(kind, Fast) and (kind.decode, kind._decode) == (Fast.decode, Fast._decode)


def _adds_special_tokens(config_file: Path) -> tuple[bool, bool]:
    """(begin of text, end of text): whether a `tokenizer_config.json` says that texts get them."""
    if not config_file.is_file():
        return False, False
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        # transformers' Llama tokenizers add the one and not the other by default
        is_llama = str(config.get("tokenizer_class")).startswith("Llama")
        return bool(config.get("add_bos_token", is_llama)), bool(config.get("add_eos_token"))
    except (OSError, ValueError, AttributeError) as e:
        raise CheckpointError(f"{config_file}: damaged ({e}); copy it again") from e


def _continuation(tokenizer: Tokenizer, token_id: int) -> str:
    """A token's text within a text: with its leading space; of a special token its name."""
    anchor = tokenizer.encode("a")[-1:]
    before = tokenizer.decode(anchor, skip_special_tokens=False)
    return tokenizer.decode([*anchor, token_id], skip_special_tokens=False)[len(before) :]


@cache
def _byte_of_letter() -> dict[str, int]:
    """The bytes for which the letters of byte-level vocabularies (GPT-2's) stand."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(others)}


def _sentencepiece_file(path: Path) -> Path | None:
    """The sentencepiece model that Megatron can train with; None: it has transformers read the tokenizer.

    A `tokenizer.json` in the same folder is preferred where tokens were added to it later (a chat
    model's).
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
    """Path of a checkpoint's tokenizer: next to the weights, in `tokenizer/`, or as in training.

    Args:
        path: a Hugging Face folder or a Megatron checkpoint folder.
        args: Megatron's saved arguments; `args.tokenizer_model` is the last place to look.

    Returns:
        something for `load_tokenizer`, or None.
    """
    places = [Path(path), Path(path) / TOKENIZER_FOLDER]
    if args is not None and getattr(args, "tokenizer_model", None):
        trained_with = Path(args.tokenizer_model)
        # Megatron is given a file; the file next to it configures the begin of a text
        has_config = (trained_with.parent / _CONFIG_FILE).is_file()
        is_usual = trained_with.is_file() and trained_with.name == SENTENCEPIECE_FILE
        places.append(trained_with.parent if is_usual and has_config else trained_with)
    for place in places:
        if place.is_file() or any(
            (place / name).is_file() for name in (SENTENCEPIECE_FILE, *_FAST_FILES)
        ):
            return place
    if named := getattr(args, "tokenizer_model", None):
        _logger.warning(
            "%s: has no tokenizer, and the one that it was trained with is not at %s (from %s); copy it to "
            "%s or name it", path, named, Path.cwd(), Path(path) / TOKENIZER_FOLDER,
        )  # fmt: skip
    return None


def check_vocab(tokenizer: Tokenizer, description: "ModelDescription") -> None:
    """Warn where the tokenizer has ids for which the model has no embedding: a padding token that was
    added later, or the tokenizer of another model. A prompt that uses one is refused."""
    if tokenizer.vocab_size > description.vocab_size:
        _logger.warning(
            "the tokenizer has %d token ids, the model's vocabulary %d: prompts with a token from %d on "
            "are refused",
            tokenizer.vocab_size, description.vocab_size, description.vocab_size,
        )  # fmt: skip


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
    if source.is_dir() or source.name in _COMPANIONS:
        for template in sorted((folder / _TEMPLATE_FOLDER).glob("*.jinja")):
            (target / _TEMPLATE_FOLDER).mkdir(exist_ok=True)
            copy_companion(template, target / _TEMPLATE_FOLDER / template.name)
