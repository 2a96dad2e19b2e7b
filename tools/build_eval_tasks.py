"""Writes lm-eval tasks from Python sources: which line comes next, the rest of a line, recall of a value,
perplexity.

    python tools/build_eval_tasks.py OUT                        held-out files of the standard library
    python tools/build_eval_tasks.py OUT --sources megatron_dmc any folder

Held out means: `tools/build_corpus.py` keeps these files from training. The same sources give the same tasks.
`OUT` is for `megatron-dmc eval --include-path OUT --tasks NAME_next_line,...`, NAME being `--name`.
"""

import argparse
import json
import random
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from build_corpus import side_of, source_documents

TASKS: dict[str, dict[str, Any]] = {
    "next_line": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "rest_of_line": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{rest}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 24, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "recall": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "sources": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
}
"""lm-eval's settings of each task, except for its data."""

Document = dict[str, Any]


def context_before(lines: list[str], at: int, most_characters: int) -> str:
    """As many whole lines before line `at` as fit, each with its end."""
    taken: list[str] = []
    for line in reversed(lines[:at]):
        if sum(map(len, taken)) + len(line) > most_characters:
            break
        taken.append(line)
    return "".join(reversed(taken))


def next_line(lines: list[str], draw: random.Random, size: int) -> Document | None:
    """A line and three others of the same file, to follow the lines before it."""
    places = [i for i in range(5, len(lines)) if len(lines[i].strip()) > 12]
    if not places:
        return None
    at = draw.choice(places)
    others = sorted({lines[i] for i in places} - {lines[at]})
    if len(others) < 3:
        return None
    choices = [*draw.sample(others, 3), lines[at]]
    draw.shuffle(choices)
    return {
        "context": context_before(lines, at, size),
        "choices": [choice.rstrip("\n") for choice in choices],
        "answer": choices.index(lines[at]),
    }


def rest_of_line(lines: list[str], draw: random.Random, size: int) -> Document | None:
    """The beginning of a line up to a word that the context already has, and that word to the end."""
    for _ in range(50):
        at = draw.randrange(5, max(6, len(lines)))
        line = lines[at].rstrip("\n") if at < len(lines) else ""
        head, dot, tail = line.rpartition(".")
        context = context_before(lines, at, size)
        if dot and 4 <= len(tail) <= 30 and tail in context and head.strip():
            return {"context": context + head + dot, "rest": tail}
    return None


def recall(lines: list[str], draw: random.Random, size: int) -> Document | None:
    """Values given to names, other code, and one of the names again: its value, of four."""
    names = draw.sample(["width", "offset", "timeout", "retries", "depth", "limit"], 4)
    values = [str(v) for v in draw.sample(range(100, 1000), 4)]
    needle = "".join(f"{name} = {value}\n" for name, value in zip(names, values, strict=True))
    if len(lines) < 30:
        return None
    filler = context_before(lines, draw.randrange(20, len(lines)), size - 2 * len(needle))
    which = draw.randrange(4)
    return {
        "context": f"{needle}\n{filler}\nassert {names[which]} == ",
        "choices": values,
        "answer": which,
    }


def sources(lines: list[str], draw: random.Random, size: int) -> Document | None:
    """A stretch of the file."""
    at = min(len(lines), draw.randrange(20, max(21, len(lines))))
    return {"text": context_before(lines, at, 2 * size)}


MAKERS: dict[str, Callable[[list[str], random.Random, int], Document | None]] = {
    "next_line": next_line, "rest_of_line": rest_of_line, "recall": recall, "sources": sources,
}  # fmt: skip


def make(files: list[tuple[str, str]], kind: str, count: int, size: int) -> list[Document]:
    """`count` documents of a task, from files in turn."""
    documents: list[Document] = []
    for number in range(20 * count):
        path, text = files[number % len(files)]
        draw = random.Random(f"{kind} {path} {number}")
        document = MAKERS[kind](text.splitlines(keepends=True), draw, size)
        if document is not None:
            documents.append(document)
        if len(documents) == count:
            break
    return documents


def write(out: Path, name: str, kind: str, documents: list[Document]) -> None:
    """The data and the YAML file (which is JSON: lm-eval reads both)."""
    data = out / f"{kind}.jsonl"
    data.write_text("".join(json.dumps(d) + "\n" for d in documents), encoding="utf-8")
    task = {
        "task": f"{name}_{kind}",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}},
        "test_split": "test",
        "num_fewshot": 0,
        "target_delimiter": "",
        "metadata": {"version": 1.0},
        **TASKS[kind],
    }
    (out / f"{kind}.yaml").write_text(json.dumps(task, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to")
    parser.add_argument("--sources", type=Path, help="folder of Python files")
    parser.add_argument("--name", default="stdlib", help="first word of the tasks' names")
    parser.add_argument("--count", type=int, default=200, help="documents of a task")
    parser.add_argument("--context", type=int, default=700, help="characters of a context, at most")
    args = parser.parse_args()
    if args.sources is not None:
        files = [
            (str(file.relative_to(args.sources)), file.read_text(encoding="utf-8"))
            for file in sorted(args.sources.rglob("*.py"))
        ]
    else:
        stdlib = Path(sysconfig.get_path("stdlib"))
        files = [(p, text) for p, text in source_documents(stdlib) if side_of(p) == "heldout"]
    files = [(path, text) for path, text in files if text.count("\n") >= 40]
    if not files:
        print(f"{args.sources or stdlib}: no Python file of 40 lines or more", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    for kind in MAKERS:
        documents = make(files, kind, args.count, args.context)
        write(args.out, args.name, kind, documents)
        print(f"{args.name}_{kind}: {len(documents)} documents of {len(files)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
