"""Classes of the tokens of a Python source: by Python's own tokenizer, and by position in a word."""

import io
import keyword
import tokenize
from collections.abc import Iterator
from itertools import accumulate

from sentencepiece import SentencePieceProcessor

CLASSES = ("layout", "space", "keyword", "name", "operator", "number", "string", "docstring",
           "comment")  # fmt: skip
"""layout: ends of lines and indentation; space: between tokens. A piece with a space and something behind it
belongs to what is behind. Names that are not keywords are all "name"."""
PLACES = ("first piece", "later piece", "no word")
"""Of a piece in a word, a run of letters, digits and underscores."""


def character_classes(source: str) -> list[str]:
    """The class of each character.

    Raises:
        SyntaxError, tokenize.TokenError: the source is not Python.
    """
    lines = source.splitlines(keepends=True)
    # form feeds and the like end no line for tokenize
    if "".join(lines) != source or any(line[:-1].count("\x0c") for line in lines):
        lines = io.StringIO(source, newline="").readlines()
    starts = [0, *accumulate(map(len, lines))]
    classes = ["space"] * len(source)
    for start, line in zip(starts, lines, strict=False):
        for i, character in enumerate(line):
            if not character.isspace():
                break
            classes[start + i] = "layout"
        for i in range(len(line.rstrip("\r\n")), len(line)):
            classes[start + i] = "layout"
    begins_statement = True
    for token in tokenize.generate_tokens(io.StringIO(source, newline="").readline):
        kind = _class_of(token, begins_statement)
        if kind:
            first = starts[token.start[0] - 1] + token.start[1]
            last = starts[token.end[0] - 1] + token.end[1]
            classes[first:last] = [kind] * (last - first)
        if token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            begins_statement = True
        elif token.type not in (tokenize.NL, tokenize.COMMENT, tokenize.ENCODING):
            begins_statement = False
    return classes


def _class_of(token: tokenize.TokenInfo, begins_statement: bool) -> str | None:
    match token.type:
        case tokenize.NAME:
            return "keyword" if keyword.iskeyword(token.string) else "name"
        case tokenize.OP:
            return "operator"
        case tokenize.NUMBER:
            return "number"
        case tokenize.COMMENT:
            return "comment"
        case tokenize.STRING:
            return "docstring" if begins_statement else "string"
        case tokenize.FSTRING_START | tokenize.FSTRING_MIDDLE | tokenize.FSTRING_END:
            return "string"
    return None


def pieces(processor: SentencePieceProcessor, text: str) -> Iterator[tuple[int, int, int]]:
    """(id, first character, end) of each token of the text.

    Raises:
        ValueError: the tokenizer changes the text before it cuts it.
    """
    encoded = processor.encode(text, return_type="proto")
    # of a character in several byte tokens only the last has the text
    if "".join(piece.surface for piece in encoded.pieces) != text:
        raise ValueError("the tokenizer normalises its text; places in it are not known")
    at = 0
    for piece in encoded.pieces:
        yield piece.id, at, at + len(piece.surface)
        at += len(piece.surface)


def classify(
    processor: SentencePieceProcessor, source: str
) -> tuple[list[int], list[str], list[str]]:
    """Ids of a source's tokens, and of each its class and its place in a word."""
    by_character = character_classes(source)
    ids, classes, places = [], [], []
    for token, first, end in pieces(processor, source):
        span = range(first, max(end, min(first + 1, len(source))))
        at = next((i for i in span if not source[i].isspace()), None)
        ids.append(token)
        if at is None:
            blank = [by_character[i] for i in span]
            classes.append("layout" if "layout" in blank else blank[0])
            places.append("no word")
            continue
        classes.append(by_character[at])
        if not _in_word(source[at]):
            places.append("no word")
        else:
            follows = at > 0 and _in_word(source[at - 1])
            places.append("later piece" if follows else "first piece")
    return ids, classes, places


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_"
