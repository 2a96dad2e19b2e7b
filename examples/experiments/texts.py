"""Kinds of text that every machine with this project has, in windows of tokens; and the copying tasks.

Dimension letters: X windows, T tokens.
"""

import importlib.metadata
import json
import random
import string
import sys
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from build_corpus import path_hash

from token_classes import CLASSES, PLACES, classify

PACKAGES = ("einops", "megatron-core", "numpy", "psutil", "rich", "safetensors", "sentencepiece",
            "torch", "tqdm", "transformers")  # fmt: skip
"""This project's dependencies whose descriptions and licences are read."""


@dataclass
class Windows:
    """Windows of one kind of text; labels are indices into CLASSES and PLACES, None where not known."""

    ids_XT: np.ndarray
    """int64, one token more than what a window feeds to the model."""
    classes_XT: np.ndarray | None = None
    places_XT: np.ndarray | None = None


def heldout_documents(corpus: Path) -> Iterator[tuple[str, str]]:
    """(path, text) of what tools/build_corpus.py keeps from training."""
    with open(corpus / "heldout.jsonl", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            yield row["path"], row["text"]


def read_files(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    for file in files:
        try:
            yield file.name, file.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue


def _files(folder: Path, pattern: str) -> list[Path]:
    """In an order that depends on the names alone."""
    return sorted(folder.rglob(pattern), key=lambda file: path_hash(file.name, "kinds"))


def package_texts(licences: bool) -> Iterator[tuple[str, str]]:
    """Descriptions, or licences, of the installed packages."""
    for name in PACKAGES:
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if licences:
            found = [f for f in package.files or [] if f.name.upper().startswith(("LICEN", "COPY"))]
            yield from read_files(Path(str(file.locate())) for file in found)
        elif description := package.metadata.get_payload():
            yield name, str(description)


def documents_of_kinds(corpus: Path) -> dict[str, Iterator[tuple[str, str]]]:
    """Kinds of text, of which the model was trained on none of the documents."""
    stdlib, include = (Path(sysconfig.get_path(name)) for name in ("stdlib", "include"))
    heldout = list(heldout_documents(corpus))
    return {
        "library code": iter([d for d in heldout if d[0].endswith(".py")]),
        "library tests": read_files(_files(stdlib / "test", "test_*.py")),
        "language reference": iter([d for d in heldout if not d[0].endswith(".py")]),
        "package descriptions": package_texts(licences=False),
        "licences": package_texts(licences=True),
        "C headers": read_files(_files(include, "*.h")),
    }


def ordinary_tokens(processor: SentencePieceProcessor) -> np.ndarray:
    """Ids that stand for text: no special and no byte tokens."""
    return np.array([
        i for i in range(processor.vocab_size())
        if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
    ])  # fmt: skip


def kinds_of_text(
    corpus: Path, processor: SentencePieceProcessor, *, length: int, count: int
) -> dict[str, Windows]:
    """At most `count` windows of each kind, evenly spaced; a kind with none is left out."""
    kinds = {}
    for kind, documents in documents_of_kinds(corpus).items():
        stream: list[tuple[int, int, int]] = []
        for _, text in documents:
            if kind == "library code":
                try:
                    ids, classes, places = classify(processor, text)
                except (SyntaxError, tokenize.TokenError):
                    continue
                labels = (map(CLASSES.index, classes), map(PLACES.index, places))
                stream += zip(ids, *labels, strict=True)
            else:
                stream += ((token, -1, -1) for token in processor.encode(text))
            stream.append((processor.eos_id(), -1, -1))
            if kind != "library code" and len(stream) > 4 * count * length:
                break
        if len(stream) <= length:
            continue
        rows = spaced_windows(np.array(stream, dtype=np.int64), length, count)
        labelled = kind == "library code"
        kinds[kind] = Windows(rows[..., 0], *(rows[..., i] if labelled else None for i in (1, 2)))
    draw = np.random.default_rng(1)
    ids_XT = draw.choice(ordinary_tokens(processor), (count, length + 1))
    kinds["random tokens"] = Windows(ids_XT)
    return kinds


def spaced_windows(stream: np.ndarray, length: int, count: int | None) -> np.ndarray:
    """(X, length + 1, ...): windows that overlap in one token, evenly spaced where there are more than
    `count` (None: all)."""
    available = (len(stream) - 1) // length
    chosen = np.arange(available)
    if count is not None and count < available:
        chosen = np.linspace(0, available - 1, count).round().astype(int)
    return np.stack([stream[w * length : w * length + length + 1] for w in chosen])


@dataclass
class Repeats:
    """Windows that end with the second occurrence of a string."""

    ids_XT: np.ndarray
    """int64, one token more than what a window feeds to the model."""
    scored: list[range]
    """Places in each window whose token is scored: inside the second occurrence."""


NAME_LETTERS, LINE_TOKENS = 10, 16


def repeats(
    variant: str,
    distance: int | None,
    filler: np.ndarray,
    processor: SentencePieceProcessor,
    *,
    length: int,
    count: int,
) -> Repeats:
    """A string, other code, and the string again: what a model that copies can predict.

    Args:
        variant: "name": a line that begins with a name of random letters, scored from the name's third
            piece on; "code": tokens of code from elsewhere, scored from the fifth on.
        distance: tokens from the first occurrence's start to the second's; None: another string of the
            same kind stands first, `length // 4` tokens before, and there is nothing to copy.
        filler: tokens of held-out code.
        length: T.
    """
    rows, scored = [], []
    for i in range(count):
        draw = random.Random(f"{variant} {distance} {i}")
        second, skipped, end = _string(variant, draw, filler, processor)
        first = second
        if distance is None:
            first = _string(variant, draw, filler, processor)[0]
        apart = length // 4 if distance is None else distance
        gap = apart - len(first)
        before = length + 1 - len(first) - gap - len(second)
        at = draw.randrange(len(filler) - before - gap)
        code = filler[at : at + before + gap].tolist()
        rows.append(code[:before] + first + code[before:] + second)
        start = length + 1 - len(second)
        scored.append(range(start + skipped, start + end))
    return Repeats(np.array(rows, dtype=np.int64), scored)


def _string(
    variant: str, draw: random.Random, filler: np.ndarray, processor: SentencePieceProcessor
) -> tuple[list[int], int, int]:
    """Ids, how many are not scored, and where the scored ones end."""
    if variant == "code":
        at = draw.randrange(len(filler) - LINE_TOKENS)
        return filler[at : at + LINE_TOKENS].tolist(), 4, LINE_TOKENS
    name = "".join(draw.choices(string.ascii_lowercase, k=NAME_LETTERS))
    ids = processor.encode(f"\n{name} = ")
    named = len(processor.encode(f"\n{name}"))
    return ids, 3, named  # the line's end and two pieces come before
