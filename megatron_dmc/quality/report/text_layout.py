"""Lay out a text in columns of a monospaced font, in runs of characters of one segment."""

from collections.abc import Sequence

ADVANCE, PITCH = 0.602, 1.4
"""Of DejaVu Sans Mono: width of a character, and distance of lines, in font sizes."""


def chars_of_line(width: float, size: float, columns: int) -> int:
    """Characters in a line of one of the columns, which stand three characters apart."""
    return max(1, (int(width // (size * ADVANCE)) - 3 * (columns - 1)) // columns)


def fit(
    tokens: Sequence[str], starts: Sequence[bool], width: float, height: float
) -> tuple[float, int, list]:
    """Largest font size in pixels at which the text fits, its columns, and its pieces.

    A text that is too long even for the smallest size is cut at the picture's end.
    """
    longest = max(map(len, "".join(tokens).expandtabs(4).split("\n")))
    for size in range(28, 18, -1):
        for columns in (1, 2, 3):
            chars = chars_of_line(width, size, columns)
            pieces = _lay_out(tokens, starts, columns=chars)
            lines = 1 + max(line for *_, line, _ in pieces)
            if lines <= columns * int(height // (size * PITCH)) and longest <= chars:
                return size, columns, pieces
    return 19, 1, _lay_out(tokens, starts, columns=chars_of_line(width, 19, 1))


def _lay_out(
    tokens: Sequence[str], starts: Sequence[bool], *, columns: int
) -> list[tuple[str, int, bool, int, int]]:
    """(text, segment, starts a segment, line, place in the line) of every run of characters."""
    pieces, line, place, segment = [], 0, 0, -1
    for token, start in zip(tokens, starts, strict=True):
        segment += bool(start)
        for i, part in enumerate(token.expandtabs(4).split("\n")):
            if i:
                line, place = line + 1, 0
            mark = bool(start) and i == 0
            while part or mark:
                if place >= columns:
                    line, place = line + 1, 0
                head, part = part[: columns - place], part[columns - place :]
                pieces.append((head, segment, mark, line, place))
                place, mark = place + len(head), False
    return pieces
