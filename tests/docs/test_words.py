"""Prose is standard English: no words that have a plainer equivalent, no titles that are clauses.

Prose is Markdown outside of code, comments, and in Python every string with a space (in tests only docstrings).
`python tests/docs/test_words.py [PATH ...]` lists the findings of any path.
"""

import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

WORDS = {
    r"so many": "give the number a name (`count` pages)",
    r"sees? to it": "ensure, reserve, check",
    r"giv(e|es|en|ing) up|gave up": "evict, release, stop, abandon",
    r"whoever": "the caller, any reader",
    r"shall": "must, should",
    r"but for": "except for, without",
    r"as if nothing had happened": "bitwise identical to an uninterrupted run",
    r"beside": "next to; besides: in addition to, beyond",
    r"no more(?! than)|any more": "no longer",
    r"had": "present or past tense",
    r"one behind the other": "consecutive, one after another",
    r"takes? in|taking in|taken in(?! order| the)": "accept, read, receive",
    r"tells?|telling|told": "report, return, distinguish",
    r"go(es|ing)? on|went on": "continue, resume",
    r"comes? to lie|held on to|holds? on to": "keep, reuse",
    r"anew": "again, regenerate",
    r"lest": "so that ... does not",
    r"(nobody|anybody|somebody)('s)?": "no caller, nothing, someone; non-blocking",
    r"faults? of ours": "bug",
}
"""Pattern of a word (spaces also match a line break) -> what to write instead."""

TITLE = r"(What|How|Where|Why|Who|Which|When|All that|That which)\b"
ROOT = Path(__file__).parents[2]
NOT_PROSE = ("tests/docs/test_words.py", "requirements.lock", "examples/models/")
HASH = (".sh", ".toml", ".yml", ".yaml", ".cfg", ".txt", "Makefile", "Dockerfile", ".ci/run")
SLASH = (".h", ".cpp", ".cu", ".cuh", ".js")
SKIPPED = {tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING}


def python_prose(source: str, docstrings_only: bool) -> dict[int, str]:
    """Line number -> prose of that line."""
    lines: dict[int, str] = {}
    previous = tokenize.NEWLINE
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        text = token.string
        is_string = token.type in (tokenize.STRING, tokenize.FSTRING_MIDDLE)
        is_docstring = token.type == tokenize.STRING and previous == tokenize.NEWLINE
        prose = is_docstring or (is_string and " " in text and not docstrings_only)
        if prose or token.type == tokenize.COMMENT:
            for offset, line in enumerate(text.splitlines()):
                number = token.start[0] + offset
                lines[number] = lines.get(number, "") + " " + line.strip(" #")
        if token.type not in SKIPPED:
            previous = token.type
    return lines


def prose(path: str, source: str) -> dict[int, str]:
    if path.endswith(".py"):
        return python_prose(source, docstrings_only=path.startswith("tests/"))
    lines = dict(enumerate(source.splitlines(), 1))
    if path.endswith(".md"):
        fenced = re.compile(r"^ *(```|~~~).*?^ *\1", re.MULTILINE | re.DOTALL)
        source = fenced.sub(lambda block: "\n" * block[0].count("\n"), source)
        source = re.sub(r"^ {4}.*", "", source, flags=re.MULTILINE)  # indented code
        return {n: re.sub(r"`[^`]*`", "``", t) for n, t in enumerate(source.splitlines(), 1)}
    if path.endswith(HASH):
        return {n: t.split("#", 1)[1] for n, t in lines.items() if re.search(r"(^|\s)#", t)}
    if path.endswith(SLASH):
        comment = re.compile(r"(?://|/\*|^\s*\*)(.*)")
        return {n: match[1] for n, t in lines.items() if (match := comment.search(t))}
    return {}


def titles(path: str, source: str) -> list[tuple[int, str]]:
    lines, head = dict(enumerate(source.splitlines(), 1)), r'[ \t]*[rf]?"""(\w.*)'
    if path.endswith(".md"):
        lines, head = prose(path, source), r"#+ (.*)"
    return [(n, match[1]) for n, line in lines.items() if (match := re.match(head, line))]


def findings(path: str, source: str) -> list[str]:
    lines = prose(path, source)
    text = "\n".join(lines.get(n, "\0") for n in range(1, max(lines, default=0) + 1))
    found = []
    for pattern, remedy in WORDS.items():
        spaced = pattern.replace(" ", r"\s+")
        for match in re.finditer(rf"(?<![\w-])({spaced})(?![\w-])", text, re.IGNORECASE):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{path}:{line}: '{' '.join(match[0].split())}' -> {remedy}")
    if path.endswith((".py", ".md")):
        for line, title in titles(path, source):
            if re.match(TITLE, title):
                found.append(f"{path}:{line}: '{title[:50]}' -> a noun phrase or an imperative")
    return found


def files() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    return [p for p in listed.stdout.decode().split("\0") if p and not p.startswith(NOT_PROSE)]


def test_words():
    found = [
        finding
        for path in files()
        if (ROOT / path).is_file()
        for finding in findings(path, (ROOT / path).read_text(encoding="utf-8", errors="ignore"))
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source", "line"),
    [
        ("a.py", '"""Numbers."""\n# The pages, so\n# many as asked.\n', 2),
        ("a.py", 'raise ValueError(\n    f"{count} pages shall be free")\n', 2),
        ("a.py", 'def f():\n    """What it does."""\n', 2),
        ("a.md", "# Pages\n\nIt goes on.\n", 3),
        ("a.md", "# Where pages lie\n", 1),
        ("a.h", "int pages;  // beside the others\n", 1),
        ("tests/a.py", '"""Pages."""\nx = "what I had"\n# told\n', 3),
    ],
)
def test_finds(path, source, line):
    found = findings(path, source)
    assert len(found) == 1 and found[0].startswith(f"{path}:{line}: "), found


def test_lets_pass():
    good = 'shall = "tell me"\n"""Pages, no more than there are."""\n'
    assert findings("tests/a.py", good) == []
    assert findings("a.md", "```\n# What it had\n```\n`shall`, besides\n") == []


if __name__ == "__main__":
    import sys

    for path in files():
        if path.startswith(tuple(sys.argv[1:] or [""])) and (ROOT / path).is_file():
            for finding in findings(path, (ROOT / path).read_text(errors="ignore")):
                print(finding)
