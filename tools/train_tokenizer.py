"""Train a SentencePiece BPE tokenizer, and write it for SentencePiece and for `AutoTokenizer`.

Every text without U+2581 (SentencePiece's own mark for a space) round-trips exactly: nothing is
normalised, runs of spaces are pieces, what no piece covers falls back to bytes, and runs of
newlines are symbols of their own. As no piece crosses a newline, training on lines, which is all
that SentencePiece's trainer can do, loses nothing.

Neither `<s>` nor `</s>` is ever added, or read from text: text that spells a special token is text.
"""

import argparse
import io
import json
import string
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from tqdm import tqdm

SPACE = "\u2581"
NEWLINES = ["\n", "\n\n", "\n\n\n"]
MAX_LINE_BYTES = 1 << 16
UNK, BOS, EOS = "<unk>", "<s>", "</s>"


class TokenizerError(Exception):
    """The tokenizer cannot be trained; the message says why."""


def corpus_lines(path: Path) -> Iterator[str]:
    """Non-empty lines of the documents of a JSONL corpus, without their newlines.

    NUL, which the trainer refuses, is left out: byte fallback covers it.
    """
    with open(path, encoding="utf-8") as stream:
        for number, row in enumerate(tqdm(stream, desc="read", unit="doc"), 1):
            try:
                text = json.loads(row)["text"].replace("\0", "")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise TokenizerError(f"{path}:{number}: no JSON object with a text") from error
            yield from (line for line in text.split("\n") if line)


def train(lines: Iterator[str], vocab_size: int) -> bytes:
    """The serialised SentencePiece model."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=NEWLINES,
            required_chars=string.ascii_letters + string.digits + string.punctuation + "\t",
            max_sentence_length=MAX_LINE_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise TokenizerError(f"training failed: {' '.join(str(error).split())}") from error
    return model.getvalue()


def to_fast(model: bytes) -> Tokenizer:
    """The same tokenizer for the `tokenizers` library.

    SentencePiece joins the neighbours whose union is the best-ranked piece, however the union
    splits; here each way to split a piece is one merge, ranked by the piece.
    """
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = range(sp.get_piece_size())
    pieces = [sp.id_to_piece(i) for i in ids]
    symbols = [i for i in ids if pieces[i] in NEWLINES]
    special = [i for i in ids if sp.is_control(i) or sp.is_unknown(i)]
    normal = {
        pieces[i]: i for i in ids if i not in symbols and i not in special and not sp.is_byte(i)
    }
    merges = []
    for piece in sorted(normal, key=lambda piece: (-sp.get_score(normal[piece]), normal[piece])):
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += sorted(
            (pair for pair in splits if pair[0] in normal and pair[1] in normal),
            key=lambda pair: (normal[pair[0]], normal[pair[1]]),
        )
    fast = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            unk_token=UNK,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    fast.normalizer = normalizers.Replace(" ", SPACE)
    fast.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    fast.add_special_tokens([AddedToken(pieces[i], normalized=False) for i in special])
    fast.add_tokens([AddedToken(pieces[i], normalized=False, special=False) for i in symbols])
    return fast


def save(model: bytes, output_dir: Path) -> None:
    """Write the files that SentencePiece and `AutoTokenizer.from_pretrained` read."""
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "tokenizer.model").write_bytes(model)
    (output_dir / "tokenizer.json").write_text(to_fast(model).to_str(), encoding="utf-8")
    special = {"unk_token": UNK, "bos_token": BOS, "eos_token": EOS}
    config = special | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # as SentencePiece: "</s>" in a text is four characters
        "model_max_length": 10**30,
    }
    for name, content in (("tokenizer_config", config), ("special_tokens_map", special)):
        (output_dir / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, required=True, help="corpus, JSON lines with a text")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=4096)
    args = parser.parse_args(argv)
    try:
        # Read up front: an error inside the trainer's iterator would come back without its cause.
        lines = list(corpus_lines(args.input))
        save(train(iter(lines), args.vocab_size), args.output_dir)
    except (TokenizerError, OSError) as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 2
    print(f"{args.output_dir}: {args.vocab_size} pieces")
    return 0


if __name__ == "__main__":
    sys.exit(main())
