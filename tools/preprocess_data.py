"""Tokenize text into Megatron's indexed datasets: `PREFIX_text_document.bin` and `.idx`.

Takes the flags of Megatron-LM's tool of the same name. Input is JSON lines (`*.jsonl`, `*.json`)
or, under any other suffix, plain text, one document per file. Outputs appear under their names
when they are complete, or not at all.
"""

import argparse
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from itertools import starmap
from pathlib import Path

from tqdm import tqdm

JSON_SUFFIXES = {".jsonl", ".json"}
SURROGATE = re.compile("[\ud800-\udfff]")
TOKENIZER_TYPES = ("SentencePieceTokenizer", "HuggingFaceTokenizer")


class DataError(Exception):
    """The input or the tokenizer cannot be used; the message says why, on one line."""


class TextTokenizer:
    """`encode`, `eod` and `vocab_size` of a tokenizer on disk."""

    def __init__(self, kind: str, model: str):
        if kind == "SentencePieceTokenizer" and not os.path.isfile(model):
            raise DataError(f"no tokenizer model {model}")
        if kind == "HuggingFaceTokenizer" and os.path.isfile(model):
            raise DataError(f"{model} is a file: {kind} takes a folder or a hub name")
        try:
            self.encode, self.vocab_size, self.eod = (
                self._sentencepiece(model)
                if kind == "SentencePieceTokenizer"
                else self._huggingface(model)
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise DataError(f"cannot load {kind} {model}: {' '.join(str(error).split())}") from None

    @staticmethod
    def _sentencepiece(model: str) -> tuple[Callable[[str], list[int]], int, int | None]:
        import sentencepiece

        sp = sentencepiece.SentencePieceProcessor(model_file=model)
        return sp.encode, sp.get_piece_size(), sp.eos_id() if sp.eos_id() >= 0 else None

    @staticmethod
    def _huggingface(model: str) -> tuple[Callable[[str], list[int]], int, int | None]:
        from transformers import AutoTokenizer

        hf = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        return partial(hf.encode, add_special_tokens=False), len(hf), hf.eos_token_id


class Encoder:
    """Turns one JSON line or text into the token ids of each key. Pickled to the workers."""

    def __init__(self, kind: str, model: str, keys: list[str], append_eod: bool):
        self.kind, self.model, self.keys, self.append_eod = kind, model, keys, append_eod
        self._tokenizer: TextTokenizer | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_tokenizer": None}

    @property
    def tokenizer(self) -> TextTokenizer:
        if self._tokenizer is None:
            self._tokenizer = TextTokenizer(self.kind, self.model)
        return self._tokenizer

    def texts(self, where: str, content: str, is_json: bool) -> list[str]:
        if not is_json:
            return [content]
        try:
            row = json.loads(content)
        except ValueError as error:
            raise DataError(f"{where}: malformed JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: not a JSON object")
        for key in self.keys:
            if key not in row:
                raise DataError(f"{where}: no key {key!r}")
            if not isinstance(row[key], str):
                raise DataError(f"{where}: the value of {key!r} is not a string")
        return [row[key] for key in self.keys]

    def __call__(self, where: str, content: str, is_json: bool) -> list[list[int]]:
        """Token ids per key; empty for an empty text."""
        documents = []
        for text in self.texts(where, content, is_json):
            if SURROGATE.search(text):
                raise DataError(f"{where}: lone surrogate in the text")
            tokens = list(self.tokenizer.encode(text))
            if tokens and self.append_eod:
                tokens.append(self.tokenizer.eod)
            documents.append(tokens)
        return documents


_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder


def _encode_in_worker(item: tuple[str, str, bool]) -> list[list[int]]:
    return _encoder(*item)


def read_inputs(paths: list[Path]) -> Iterator[tuple[str, str, bool]]:
    """(where, content, is_json) of each JSON line that is not blank, and of each text file."""
    for path in paths:
        is_json = path.suffix in JSON_SUFFIXES
        with open(path, "rb") as stream:
            for number, raw in enumerate(stream if is_json else [stream.read()], 1):
                where = f"{path}:{number}" if is_json else str(path)
                try:
                    content = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise DataError(f"{where}: not UTF-8: {error.reason}") from None
                if content.strip() or not is_json:
                    yield where, content, is_json


class DatasetWriter:
    """An indexed dataset written under temporary names; `commit` gives it its own."""

    def __init__(self, prefix: str, vocab_size: int):
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

        self.prefix = prefix
        self.builder = IndexedDatasetBuilder(
            self._partial("bin"), dtype=DType.optimal_dtype(vocab_size)
        )

    def _partial(self, suffix: str) -> str:
        return f"{self.prefix}.{suffix}.partial-{os.getpid()}"

    def add(self, tokens: list[int]) -> None:
        self.builder.add_document(tokens, [len(tokens)])

    def finalize(self) -> None:
        self.builder.finalize(self._partial("idx"))

    def commit(self) -> None:
        """Delete the index first and write it last, so that it never describes the wrong data."""
        Path(f"{self.prefix}.idx").unlink(missing_ok=True)
        for suffix in ("bin", "idx"):
            os.replace(self._partial(suffix), f"{self.prefix}.{suffix}")

    def discard(self) -> None:
        """Remove what was not committed."""
        with suppress(OSError):  # the disk that was full while writing still is
            self.builder.data_file.close()
        for suffix in ("bin", "idx"):
            Path(self._partial(suffix)).unlink(missing_ok=True)


def preprocess(
    inputs: list[Path], prefix: str, encoder: Encoder, workers: int = 1
) -> dict[str, int]:
    """Write one dataset per key; returns the numbers of documents, tokens and empty documents."""
    for path in inputs:
        if not path.is_file():
            raise DataError(f"no input file {path}")
        if not os.access(path, os.R_OK):
            raise DataError(f"no permission to read {path}")
    if encoder.keys != ["text"] and any(path.suffix not in JSON_SUFFIXES for path in inputs):
        raise DataError("plain text input has one key, text")
    if encoder.append_eod and encoder.tokenizer.eod is None:
        raise DataError(f"--append-eod: {encoder.model} has no end-of-document token")
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    counts = {"documents": 0, "tokens": 0, "empty": 0}
    with ExitStack() as stack:
        writers = []
        for key in encoder.keys:
            writers.append(DatasetWriter(f"{prefix}_{key}_document", encoder.tokenizer.vocab_size))
            stack.callback(writers[-1].discard)
        if workers > 1:
            pool = multiprocessing.get_context("spawn").Pool(workers, _start_worker, (encoder,))
            encoded = stack.enter_context(pool).imap(_encode_in_worker, read_inputs(inputs), 16)
        else:
            encoded = starmap(encoder, read_inputs(inputs))
        bar = stack.enter_context(tqdm(encoded, desc="tokenize", unit="doc"))
        for documents in bar:
            for writer, tokens in zip(writers, documents, strict=True):
                if tokens:
                    writer.add(tokens)
                counts["documents" if tokens else "empty"] += 1
                counts["tokens"] += len(tokens)
            bar.set_postfix(tokens=counts["tokens"], refresh=False)
        if not counts["documents"]:
            raise DataError(f"no text in {', '.join(map(str, inputs))}")
        for writer in writers:
            writer.finalize()
        for writer in writers:
            writer.commit()
    return counts


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, nargs="+", required=True)
    parser.add_argument("--json-keys", nargs="+", default=["text"])
    parser.add_argument("--output-prefix", required=True)
    parser.add_argument("--tokenizer-type", choices=TOKENIZER_TYPES, required=True)
    parser.add_argument("--tokenizer-model", required=True)
    parser.add_argument("--append-eod", action="store_true", help="end documents with </s>")
    parser.add_argument("--workers", type=int, default=1, help="processes that tokenize")
    args = parser.parse_args(argv)
    try:
        encoder = Encoder(
            args.tokenizer_type, args.tokenizer_model, args.json_keys, args.append_eod
        )
        counts = preprocess(args.input, args.output_prefix, encoder, args.workers)
    except DataError as error:
        print(f"preprocess_data: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"preprocess_data: cannot write {args.output_prefix}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
