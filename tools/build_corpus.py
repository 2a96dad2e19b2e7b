"""Build a text corpus from the running Python's standard library and its documentation.

Writes `train.jsonl`, `validation.jsonl`, `heldout.jsonl` (one `{"text": ..., "path": ...}` per line) and `meta.json`.
Settings are chosen on the validation documents; figures are reported on the held-out ones, which
nothing is chosen on. A document's side and its place in the order depend on its path alone, so that a file held out on
one machine is held out on every machine and under every Python version.
"""

import argparse
import fnmatch
import hashlib
import importlib
import inspect
import json
import platform
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

HELDOUT_FRACTION = 0.04
VALIDATION_FRACTION = 0.02
EXCLUDED_DIRS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
TABLE_ENCODINGS = (
    *("aliases", "big5*", "cp*", "euc_*", "gb*", "hp_roman8", "iso*", "johab", "koi*", "kz1048"),
    *("mac_*", "palmos", "ptcp154", "shift_*", "tis_620"),
)
# Generated tables, and files that describe the machine rather than the language.
EXCLUDED_FILES = (
    *(f"encodings/{name}.py" for name in TABLE_ENCODINGS),
    "html/entities.py",
    "pydoc_data/*",
    "_sysconfigdata*",
    "config-*/*",
)
EXCLUDED_MODULES = ("_test*", "_xx*", "xx*", "_ctypes_test", "readline")


class CorpusError(Exception):
    """The corpus cannot be built here; the message says why."""


def path_hash(path: str, purpose: str) -> int:
    """64 bits that depend on `path` and `purpose` only."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{path}".encode()).digest()[:8])


def side_of(path: str) -> str:
    """ "train", "validation" or "heldout"."""
    place = path_hash(path, "split") / 2**64
    if place < HELDOUT_FRACTION:
        return "heldout"
    return "validation" if place < HELDOUT_FRACTION + VALIDATION_FRACTION else "train"


def is_excluded(path: str) -> bool:
    """Whether the stdlib-relative posix `path` is a test, a table or machine-specific."""
    return not EXCLUDED_DIRS.isdisjoint(path.split("/")[:-1]) or any(
        fnmatch.fnmatchcase(path, pattern) for pattern in EXCLUDED_FILES
    )


def source_documents(stdlib: Path) -> Iterator[tuple[str, str]]:
    """(path, text) of every source file of the standard library that is worth reading."""
    paths = {file.relative_to(stdlib).as_posix(): file for file in stdlib.rglob("*.py")}
    paths = {path: file for path, file in paths.items() if not is_excluded(path)}
    if not paths:
        raise CorpusError(
            f"no standard library sources (*.py) under {stdlib}: this Python ships without them; "
            "run the tool with another interpreter or name a folder with --stdlib"
        )
    for path, file in tqdm(sorted(paths.items()), desc="sources", unit="file"):
        try:
            with tokenize.open(file) as stream:  # honours PEP 263 encoding declarations
                yield path, stream.read()
        except (SyntaxError, UnicodeDecodeError):  # deliberately broken sample files
            continue


def topic_documents() -> Iterator[tuple[str, str]]:
    """The language reference's sections that back `help("topic")`."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name, text in sorted(topics.items()):
        yield f"topic:{name}", text


def binary_modules() -> list[str]:
    """Names of the modules that have no Python source: built in, or C extensions."""
    names = set(sys.builtin_module_names)
    if folder := sysconfig.get_config_var("DESTSHARED"):
        names.update(file.name.split(".")[0] for file in Path(folder).glob("*.so"))
    return sorted(
        name
        for name in names
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in EXCLUDED_MODULES)
    )


def _has_own_doc(member: object) -> bool:
    return inspect.isclass(member) or inspect.isroutine(member) or inspect.isdatadescriptor(member)


def module_text(module: object) -> str:
    """Docstrings of a module, its functions and classes, and the classes' own members."""
    name = module.__name__
    parts = [(name, inspect.getdoc(module))]
    for key, member in sorted(vars(module).items()):
        if not _has_own_doc(member):
            continue
        parts.append((f"{name}.{key}", inspect.getdoc(member)))
        if inspect.isclass(member):
            parts += [
                (f"{name}.{key}.{inner}", inspect.getdoc(value))
                for inner, value in sorted(vars(member).items())
                if not inner.startswith("__") and _has_own_doc(value)
            ]
    return "\n\n".join(f"{title}\n{doc}" for title, doc in parts if doc)


def module_documents() -> Iterator[tuple[str, str]]:
    for name in tqdm(binary_modules(), desc="module docs", unit="module"):
        try:
            with warnings.catch_warnings(action="ignore"):
                module = importlib.import_module(name)
        except ImportError:  # built without the library that it wraps
            continue
        yield f"doc:{name}", module_text(module)


def split(documents: Iterator[tuple[str, str]]) -> dict[str, list[dict[str, str]]]:
    """Assign sides, order by hash, drop empty and repeated texts.

    Training comes first, so that a text of another side that also occurs in training is the one to
    go.
    """
    ordered = sorted(documents, key=lambda item: (path_hash(item[0], "order"), item[0]))
    seen: set[bytes] = set()
    sides: dict[str, list[dict[str, str]]] = {}
    for side in ("train", "validation", "heldout"):
        sides[side] = []
        for path, text in ordered:
            digest = hashlib.sha256(text.strip().encode(errors="replace")).digest()
            if side_of(path) != side or not text.strip() or digest in seen:
                continue
            seen.add(digest)
            sides[side].append({"text": text, "path": path})
    return sides


def build(stdlib: Path, output_dir: Path) -> dict:
    """Write the corpus to `output_dir` and return what `meta.json` holds."""

    def documents() -> Iterator[tuple[str, str]]:
        yield from source_documents(stdlib)
        yield from topic_documents()
        yield from module_documents()

    sides = split(documents())
    output_dir.mkdir(parents=True, exist_ok=True)
    meta = {
        "python": platform.python_version(),
        "heldout_fraction": HELDOUT_FRACTION,
        "validation_fraction": VALIDATION_FRACTION,
    }
    for side, rows in sides.items():
        with open(output_dir / f"{side}.jsonl", "w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
        meta[side] = {
            "documents": len(rows),
            "bytes": sum(len(row["text"].encode(errors="replace")) for row in rows),
        }
    (output_dir / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return meta


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument(
        "--stdlib",
        type=Path,
        default=Path(sysconfig.get_path("stdlib")),
        help="folder of the library's sources (default: the running Python's)",
    )
    args = parser.parse_args(argv)
    try:
        meta = build(args.stdlib, args.output_dir)
    except (CorpusError, OSError) as error:
        print(f"build_corpus: {error}", file=sys.stderr)
        return 2
    print(json.dumps(meta))
    return 0


if __name__ == "__main__":
    sys.exit(main())
