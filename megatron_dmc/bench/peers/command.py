"""`megatron-dmc bench peers`: this engine next to transformers, vLLM for CPUs and llama.cpp.

Regime: one machine, one model, the same random prompts; each engine alone in a process, in an environment that
the command makes, all of a case's requests given at once, greedy, full-length completions.
Metric: seconds until the last request's first token; tokens per second of all requests after that; resident
memory of the process at most. The last line printed is one JSON document; `--json` writes its rows, one for each
engine and case, and a row that could not be measured has `skipped`, the reason.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_dmc.bench.output import Curves, Result, Row, markdown
from megatron_dmc.bench.peers.cases import MARK
from megatron_dmc.bench.peers.environments import PEERS, python_of
from megatron_dmc.checkpoint.hub import local_path
from megatron_dmc.errors import DMCError

OURS = "megatron-dmc"
FOLDER = Path(__file__).parents[1]
RUN_SCRIPT = """
import runpy, sys
sys.path.append(sys.argv[1])
runpy.run_module(sys.argv[2], run_name="__main__")
"""
"""The folder comes last, so that its other modules hide nothing of the peer's environment."""
COLUMNS = {
    "engine": "engine", "threads": "threads", "batch": "batch", "context": "context", "cr": "CR",
    "decode_tokens_per_s": "decode, tokens/s", "ratio": "/ vLLM", "prefill_s": "prefill, s",
    "peak_memory_gib": "memory, GiB", "skipped": "not measured, because",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the benchmark."""
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder or Hub id, which every engine reads")
    add(
        "--gguf", metavar="FILE", help="the same weights for llama.cpp; without it that is left out"
    )
    add("--engines", nargs="+", choices=PEERS, default=list(PEERS), help="default: all")
    add("--batches", type=int, nargs="+", default=[1, 8, 64], metavar="B", help="default: 1 8 64")
    add("--contexts", type=int, nargs="+", default=[32, 1024, 4096], metavar="T",
        help="tokens of a prompt (default: 32 1024 4096)")  # fmt: skip
    add("--new-tokens", type=int, default=32, metavar="N", help="per request (default: 32)")
    add("--crs", type=float, nargs="+", default=[1.0, 4.0, 8.0], metavar="CR",
        help="imposed on this engine; the others run once (default: 1 4 8)")  # fmt: skip
    add("--threads", type=int, nargs="+", default=None, metavar="N", help="default: all cores")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    add("--timeout", type=float, default=3600, metavar="S", help="of an engine (default: 3600)")
    add("--environments", type=Path, metavar="FOLDER", help="of the peers' virtual environments "
        "(default: peers/ in the user's cache)")  # fmt: skip
    add(
        "--peer-python",
        metavar="FILE",
        help="the interpreter to make them with (default: this one)",
    )
    add("--json", type=Path, metavar="FILE", help="also write the rows here")
    add("--output", metavar="FOLDER", help="also write the document, a CSV and a plot here")


def run(args: argparse.Namespace) -> Result:
    """Measure every engine in turn.

    Raises:
        DMCError: the model cannot be found, or a flag is out of range.
    """
    for flag in ("batches", "contexts", "new_tokens", "crs", "threads"):
        given = getattr(args, flag)
        least = 2 if flag == "new_tokens" else 1
        if any(x < least for x in (given if isinstance(given, list) else [given]) if x is not None):
            raise DMCError(f"--{flag.replace('_', '-')} {given}: at least {least}")
    model = local_path(args.model)
    rows: list[Row] = []
    for threads in args.threads or [os.cpu_count() or 1]:
        for engine in args.engines:
            found = _measure(engine, cases_of(engine, args), str(model), threads, args)
            rows += [{"engine": engine, "threads": threads, **row} for row in found]
            add_ratios(rows)
            print(markdown(rows[-len(found):], COLUMNS), file=sys.stderr)  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    document = {
        "benchmark": "peers",
        "note": "",
        "model": args.model,
        "dtype": args.dtype,
        "rows": rows,
    }
    return Result(
        document, Path(args.output) if args.output else None, csv=rows,
        curves={"peers-decode": Curves(
            rows, "context", "decode_tokens_per_s", ("engine", "cr", "batch", "threads"),
            "decode tokens/s",
        )},
    )  # fmt: skip


def cases_of(engine: str, args: argparse.Namespace) -> list[Row]:
    """Cases of an engine, small ones first."""
    crs = args.crs if engine == OURS else [1.0]
    cases = [
        {"batch": batch, "context": context, "new_tokens": args.new_tokens, "cr": cr}
        for batch in args.batches for context in args.contexts for cr in crs
    ]  # fmt: skip
    return sorted(cases, key=lambda case: case["batch"] * case["context"])


def add_ratios(rows: Sequence[Row]) -> None:
    """`ratio`: decode tokens per second over vLLM's in the same case, uncompressed."""

    def case(row: Row) -> tuple[Any, ...]:
        return tuple(row.get(key) for key in ("threads", "batch", "context"))

    vllm = {case(r): r["decode_tokens_per_s"] for r in rows
            if r["engine"] == "vllm" and r.get("decode_tokens_per_s")}  # fmt: skip
    for row in rows:
        if row.get("decode_tokens_per_s") and case(row) in vllm:
            row["ratio"] = row["decode_tokens_per_s"] / vllm[case(row)]


def _measure(
    engine: str, cases: list[Row], model: str, threads: int, args: argparse.Namespace
) -> list[Row]:
    """Rows of all cases; those that the engine did not reach have `skipped`."""
    rows: list[Row] = []
    try:
        if engine == "llama.cpp" and args.gguf is None:
            raise DMCError("it reads GGUF: give --gguf FILE with the same weights")
        python = python_of(engine, args.environments or _environments(), args.peer_python)
        asked = {
            "model": model,
            "gguf": args.gguf,
            "dtype": args.dtype,
            "threads": threads,
            "cases": cases,
        }
        for line in _lines(
            [python, "-c", RUN_SCRIPT, str(FOLDER), PEERS[engine].script],
            asked,
            threads,
            args.timeout,
        ):
            rows.append(
                line | {"peak_memory_gib": (line["peak_memory_bytes"] or 0) / 2**30 or None}
            )
    except DMCError as error:
        reason = str(error)
        rows += [case | {"skipped": reason} for case in cases[len(rows) :]]
    return rows


def _environments() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "megatron-dmc" / "peers"


def _lines(command: list[str], asked: Row, threads: int, timeout: float) -> Iterator[Row]:
    """The rows that a script prints, as they come.

    Raises:
        DMCError: it failed or took too long, after the last of them.
    """
    variables = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        env=os.environ | variables,
    ) as process:  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        timer = threading.Timer(timeout, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(asked))
            process.stdin.close()
            for line in process.stdout:
                if MARK in line:
                    yield json.loads(line.split(MARK, 1)[1])
            process.wait()
        except BrokenPipeError:
            process.wait()
        finally:
            is_late = not timer.is_alive()
            timer.cancel()
            process.kill()
        if is_late:
            raise DMCError(f"it took longer than --timeout {timeout:g}")
        if process.returncode:
            log.seek(0)
            last = [text for text in log.read().splitlines() if text.strip()][-1:]
            raise DMCError(last[0] if last else f"it ended with {process.returncode}")
