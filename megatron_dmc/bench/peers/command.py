"""`megatron-dmc bench peers`: this engine next to transformers, vLLM for CPUs and llama.cpp.

Regime: one machine, one model, the same random prompts; each engine alone in a process, in an environment that
the command makes, all of a case's requests given at once, greedy, full-length completions.
Metric: seconds until the last request's first token; tokens per second of all requests after that, while all of
them run; resident memory of the process at most. With `--servers` also each engine's own server under one load of
streamed completions: tokens per second, time to the first token and between tokens. The last line printed is one JSON
document; `--json` writes its rows after each engine, one for each case, and a row that could not be measured has
`skipped`, the reason.
"""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from megatron_dmc.bench.output import Result, Row
from megatron_dmc.bench.peers import report, servers
from megatron_dmc.bench.peers.cases import CLOCKS, MARK
from megatron_dmc.bench.peers.environments import OURS, PEERS, python_of
from megatron_dmc.checkpoint.hub import local_path
from megatron_dmc.errors import DMCError

FOLDER = Path(__file__).parents[1]
RUN_SCRIPT = """
import runpy, sys
sys.path.append(sys.argv[1])
runpy.run_module(sys.argv[2], run_name="__main__")
"""
"""The folder comes last, so that its other modules hide nothing of the peer's environment."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the benchmark."""
    add = parser.add_argument
    add("--model", required=True, help="Hugging Face folder or Hub id, which every engine reads")
    add("--gguf", metavar="FILE", help="the same weights for llama.cpp (default: written from "
        "--model, if that is a Llama in bfloat16)")  # fmt: skip
    add("--engines", nargs="+", choices=PEERS, default=list(PEERS), help="default: all")
    add("--shapes", type=shape, nargs="*", default=SHAPES, metavar="BxT",
        help="requests and tokens of each one's prompt "
        f"(default: {' '.join(f'{b}x{t}' for b, t in SHAPES)}); autox4096: as many as the cache holds, "
        f"for {' and '.join(WITH_LIMITED_CACHE)}")  # fmt: skip
    add("--new-tokens", type=int, default=32, metavar="N", help="per request (default: 32)")
    add("--crs", type=float, nargs="*", default=[4.0, 8.0], metavar="CR",
        help="imposed on this engine at the longest prompts, in addition to CR 1 (default: 4 8)")  # fmt: skip
    add("--filled-caches", action="store_true", help="decode alone: this engine's caches are filled with "
        "random entries, and vLLM's requests share one prompt in its prefix cache")  # fmt: skip
    add("--servers", type=int, nargs="+", default=[], metavar="N",
        help="also through each engine's server, with N requests at a time")  # fmt: skip
    add("--server-input-len", type=int, default=256, metavar="N", help="(default: 256)")
    add("--server-output-len", type=int, default=64, metavar="N", help="(default: 64)")
    add("--kv-cache-memory-bytes", type=int, default=2**32, metavar="N",
        help="of this engine's cache and vLLM's (default: 4 GiB)")  # fmt: skip
    add("--threads", type=int, nargs="+", default=None, metavar="N", help="default: all cores")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    add("--clock", choices=CLOCKS, default="wall", help="cpu: seconds of the process's CPU time, for "
        "--threads 1 on a machine with other work (default: wall)")  # fmt: skip
    add("--timeout", type=float, default=3600, metavar="S", help="of an engine (default: 3600)")
    add("--environments", type=Path, metavar="FOLDER", help="of the peers' virtual environments "
        "(default: peers/ in the user's cache)")  # fmt: skip
    add(
        "--peer-python",
        metavar="FILE",
        help="the interpreter to make them with (default: this one)",
    )
    add("--json", type=Path, metavar="FILE", help="also write the rows here")
    add("--output", metavar="FOLDER", help="also write the document, a CSV and a figure here")


SHAPES = [(b, t) for b in (1, 8, 64) for t in (32, 1024, 4096) if b * t <= 2**16]


WITH_LIMITED_CACHE = (OURS, "vllm")
"""Engines that allocate a cache of a given size."""


def shape(text: str) -> tuple[int | None, int]:
    """Of `BxT`; None for `auto`.

    Raises:
        argparse.ArgumentTypeError: it is not that.
    """
    batch, _, context = text.partition("x")
    is_auto = batch == "auto"
    if not ((is_auto or batch.isdigit() and int(batch)) and context.isdigit() and int(context)):
        raise argparse.ArgumentTypeError(
            f"{text}: two positive numbers, for instance 8x1024, or autox1024"
        )
    return None if is_auto else int(batch), int(context)


def run(args: argparse.Namespace) -> Result:
    """Measure every engine in turn.

    Raises:
        DMCError: the model cannot be found, or a flag is out of range.
    """
    for flag, least in (
        ("new_tokens", 3), ("crs", 1), ("threads", 1), ("servers", 1), ("server_input_len", 1), ("server_output_len", 2),
    ):  # fmt: skip
        given = getattr(args, flag)
        if any(x < least for x in (given if isinstance(given, list) else [given]) if x is not None):
            raise DMCError(f"--{flag.replace('_', '-')} {given}: at least {least}")
    model = local_path(args.model)
    rows: list[Row] = []
    for threads in args.threads or [os.cpu_count() or 1]:
        if args.clock == "cpu" and threads > 1:
            raise DMCError(f"--clock cpu adds up the threads' time: use --threads 1, not {threads}")
        for engine in args.engines:
            found = _measure(engine, cases_of(engine, args), str(model), threads, args)
            found += [
                _measure_server(engine, str(model), threads, streams, args)
                for streams in args.servers
            ]
            same = {"engine": engine, "threads": threads, "dtype": args.dtype}
            rows += [same | row for row in found]
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(report.tables(rows), file=sys.stderr)
    document = {
        "benchmark": "peers", "note": "", "model": args.model, "dtype": args.dtype,
        "clock": args.clock, "rows": rows,
    }  # fmt: skip
    return Result(
        document,
        Path(args.output) if args.output else None,
        csv=rows,
        figures={"peers": lambda: report.figure(rows)} if report.plotted_batches(rows) else {},
    )


def cases_of(engine: str, args: argparse.Namespace) -> list[Row]:
    """Cases of an engine, small ones first; those of the largest batch only where a cache has a limit."""
    longest = max((context for _, context in args.shapes), default=0)
    cases = [
        {"batch": batch, "context": context, "new_tokens": args.new_tokens, "cr": cr}
        for batch, context in args.shapes
        if batch or engine in WITH_LIMITED_CACHE
        for cr in (1.0, *(args.crs if engine == OURS and context == longest else ()))
    ]
    return sorted(cases, key=lambda case: (case["batch"] or math.inf) * case["context"])


def _measure(
    engine: str, cases: list[Row], model: str, threads: int, args: argparse.Namespace
) -> list[Row]:
    """Rows of all cases; those that the engine did not reach have `skipped`."""
    rows: list[Row] = []
    if not cases:
        return rows
    try:
        python = python_of(engine, args.environments or _environments(), args.peer_python)
        asked = {
            "model": model, "gguf": args.gguf, "dtype": args.dtype, "threads": threads,
            "clock": args.clock, "filled_caches": args.filled_caches,
            "cache_bytes": args.kv_cache_memory_bytes, "cases": cases,
        }  # fmt: skip
        command = [python, "-c", RUN_SCRIPT, str(FOLDER), PEERS[engine].script]
        for row in _lines(command, asked, threads, args.timeout):
            print(json.dumps({"engine": engine} | row), file=sys.stderr, flush=True)
            rows.append(row)
    except DMCError as error:
        reason = str(error)
        rows += [case | {"skipped": reason} for case in cases[len(rows) :]]
    return rows


def _measure_server(
    engine: str, model: str, threads: int, streams: int, args: argparse.Namespace
) -> Row:
    row: Row = {
        "streams": streams, "input_len": args.server_input_len, "output_len": args.server_output_len,
    }  # fmt: skip
    try:
        if engine in servers.NO_SERVER:
            raise DMCError(servers.NO_SERVER[engine])
        python = python_of(engine, args.environments or _environments(), args.peer_python)
        row |= servers.measure(engine, python, model, threads, streams, args)
    except DMCError as error:
        row |= {"skipped": str(error)}
    print(json.dumps({"engine": engine} | row), file=sys.stderr, flush=True)
    return row


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
        if process.returncode == -signal.SIGKILL:
            raise DMCError("it was killed, as happens where memory runs out")
        if process.returncode:
            log.seek(0)
            last = [text for text in log.read().splitlines() if text.strip()][-1:]
            raise DMCError(last[0] if last else f"it ended with {process.returncode}")
