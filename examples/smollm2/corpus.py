"""English documentation and code: documents for training, validation and held-out measurements.

English comes from the sources (reStructuredText, AsciiDoc, POD) of Debian's documentation packages, code from
this Python's standard library and the installed packages. A document's side depends on its name alone.
"""

import gzip
import json
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from build_corpus import path_hash

from smollm2.settings import Data

KINDS = ("english", "code")
DEBIAN_PACKAGES = (r"python3\.[0-9]+-doc", r"linux-doc-[0-9.]+", "git-doc", "perl-doc")
CODE_PACKAGES = ("numpy", "torch", "megatron", "rich", "aiohttp", "fastapi", "networkx", "sympy")
"""Installed packages whose sources are read: none with many copies of one file."""
SHORTEST, LONGEST = 500, 200_000
"""Characters of a document."""
LEAST_ASCII = 0.97
"""Part of a document's characters; translations have less."""


def debian_texts(work: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of the packages' text sources. Nothing is installed.

    Raises:
        ValueError: apt-get or the packages are not available.
    """
    work.mkdir(parents=True, exist_ok=True)
    for pattern in DEBIAN_PACKAGES:
        folder = work / re.sub(r"\W+", "-", pattern)
        if not folder.is_dir():
            _unpack(pattern, work, folder)
        yield from read_texts(folder)


def _unpack(pattern: str, work: Path, folder: Path) -> None:
    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=work, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ValueError(
                f"{' '.join(command)}: {reason}; give texts of your own with --english"
            )
        return done.stdout

    try:
        listed = run("apt-cache", "search", "--names-only", f"^{pattern}$")
        names = sorted(line.split()[0] for line in listed.splitlines())
        if not names:
            raise ValueError(
                f"no Debian package {pattern}: run apt-get update, or give texts of your own with --english"
            )
        run("apt-get", "download", "-q", names[-1])
        (package,) = work.glob(f"{names[-1]}_*.deb")
        run("dpkg-deb", "-x", package.name, f"{folder.name}.part")
        (work / f"{folder.name}.part").rename(folder)
    except FileNotFoundError as e:
        raise ValueError(
            f"{e.filename} is not there, so Debian's documentation is not available; give texts of your own "
            "with --english"
        ) from e


_SOURCES = (".rst", ".rst.txt", ".txt", ".adoc", ".pod", ".md")


def read_texts(folder: Path) -> Iterator[tuple[str, str]]:
    """(path below the folder, text) of the text files, compressed ones too; no copies."""
    seen = set()
    for file in sorted(folder.rglob("*")):
        name = file.name.removesuffix(".gz")
        if not name.endswith(_SOURCES) or not file.is_file():
            continue
        content = file.read_bytes()
        if file.name.endswith(".gz"):
            content = gzip.decompress(content)
        if hash(content) not in seen:
            seen.add(hash(content))
            yield str(file.relative_to(folder)), content.decode("utf-8", errors="replace")


def code_texts(folders: Iterable[Path] | None = None) -> Iterator[tuple[str, str]]:
    """(path, text) of Python sources; default: the standard library and `CODE_PACKAGES`."""
    if folders is None:
        site = Path(sysconfig.get_path("purelib"))
        folders = [Path(sysconfig.get_path("stdlib")), *(site / name for name in CODE_PACKAGES)]
    for folder in folders:
        for file in sorted(folder.rglob("*.py")):
            inside = file.relative_to(folder).parts
            if {"site-packages", "__pycache__", "idle_test"} & set(inside):
                continue
            yield f"{folder.name}/{'/'.join(inside)}", file.read_text("utf-8", errors="replace")


def is_usable(text: str) -> bool:
    ascii_part = sum(map(str.isascii, text)) / max(1, len(text))
    return SHORTEST <= len(text) <= LONGEST and ascii_part >= LEAST_ASCII


def side_of(name: str, data: Data) -> str:
    """train, validation or heldout."""
    place = path_hash(name, "side") / 2**64
    if place < data.heldout_documents:
        return "heldout"
    return "validation" if place < data.heldout_documents + data.validation_documents else "train"


def write_corpus(
    texts: dict[str, Iterable[tuple[str, str]]], out: Path, data: Data
) -> dict[str, int]:
    """Write `train.jsonl` (both kinds mixed), `validation.jsonl`, and `heldout-KIND.jsonl`.

    Returns:
        bytes of text by file.
    """
    out.mkdir(parents=True, exist_ok=True)
    most, sides = int(data.megabytes * 1e6), {}
    for kind, documents in texts.items():
        usable = [(name, text) for name, text in documents if is_usable(text)]
        used = 0
        for name, text in sorted(usable, key=lambda row: path_hash(row[0], "order")):
            side = side_of(name, data)
            if side == "train" and used + len(text) > most:
                continue
            used += len(text) if side == "train" else 0
            file = f"heldout-{kind}" if side == "heldout" else side
            sides.setdefault(file, []).append((name, text))
    sizes = {}
    for file, rows in sides.items():
        rows.sort(key=lambda row: path_hash(row[0], "mixture"))
        with open(out / f"{file}.jsonl", "w", encoding="utf-8") as lines:
            for name, text in rows:
                lines.write(json.dumps({"text": text, "path": name}) + "\n")
        sizes[file] = sum(len(text.encode()) for _, text in rows)
    wanted = {"train", "validation", *(f"heldout-{kind}" for kind in texts)}
    if missing := wanted - sizes.keys():
        raise ValueError(f"no documents for {', '.join(sorted(missing))}: there is too little text")
    return sizes


def tokenize(corpus: Path, out: Path, tokenizer: Path, workers: int) -> dict[str, int]:
    """`.bin/.idx` files of every `.jsonl`, all at the same time; returns tokens by file.

    Raises:
        ValueError: a file cannot be tokenised.
    """
    out.mkdir(parents=True, exist_ok=True)
    processes = {
        file: subprocess.Popen(
            [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(file),
             "--output-prefix", str(out / file.stem), "--tokenizer-type", "HuggingFaceTokenizer",
             "--tokenizer-model", str(tokenizer), "--append-eod", "--workers", str(workers)],
            stdout=subprocess.PIPE, text=True,
        )
        for file in sorted(corpus.glob("*.jsonl"))
    }  # fmt: skip
    outputs = {file: process.communicate()[0] for file, process in processes.items()}
    if failed := [str(file) for file, process in processes.items() if process.returncode]:
        raise ValueError(f"not tokenised: {', '.join(failed)}")
    return {file.stem: json.loads(o.splitlines()[-1])["tokens"] for file, o in outputs.items()}
