"""`megatron-dmc bench startup`: from the start of a process to its first token (P3).

Regime: `megatron-dmc generate` with one prompt, and `megatron-dmc serve` with one request, which is sent as soon as the
server listens; each in a new process, once untimed and then `--repeats` times, so that files are in memory. The time ends
with the first byte of the completion. Metrics, of the fastest run: seconds of the wall clock, and CPU seconds of the
process and its children, which other load makes longer, but less. The last line printed is one JSON document.
"""

import argparse
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence

import psutil

from megatron_dmc import __version__
from megatron_dmc.bench.output import Result, Row
from megatron_dmc.errors import DMCError

_PROMPT = "Once upon a time"
_PROGRAM = [sys.executable, "-m", "megatron_dmc.cli.main"]


def run(args: argparse.Namespace) -> Result:
    """Run the benchmark.

    Raises:
        DMCError: a flag is wrong, or a process ended before its first token.
    """
    if args.repeats < 1:
        raise DMCError(f"--repeats {args.repeats}: use 1 or more")
    rows = []
    for command, begin, wait in (
        ("generate", _generate, _read_byte),
        ("serve", _serve, _complete),
    ):
        runs = [_time(begin(args.model), wait) for _ in range(1 + args.repeats)][1:]
        row: Row = {"command": command} | min(runs, key=lambda row: row["seconds"])
        print(f"{command}: {row['seconds']:.2f} s, {row['cpu_seconds']:.2f} s of CPU time")
        rows.append(row)
    document = {
        "benchmark": "startup", "version": __version__, "arguments": sys.argv[1:], "note": None,
        "repeats": args.repeats, "rows": rows,
    }  # fmt: skip
    return Result(document)


def _generate(model: str) -> list[str]:
    # --max-tokens: the process still runs when its CPU time is read
    return [*_PROGRAM, "generate", model, "--prompt", _PROMPT, "--max-tokens", "16", "--ignore-eos"]


def _serve(model: str) -> list[str]:
    return [*_PROGRAM, "serve", model, "--port", "0"]


def _time(command: Sequence[str], wait: Callable[["subprocess.Popen[bytes]"], None]) -> Row:
    """Run the command until `wait` returns; then end it."""
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            wait(process)
            seconds = time.perf_counter() - began
            return {"seconds": seconds, "cpu_seconds": _cpu_seconds(process.pid)}
        except (EOFError, OSError) as error:
            process.terminate()
            assert process.stderr is not None
            last = process.stderr.read().decode(errors="replace").strip().splitlines()[-1:]
            raise DMCError(f"{command[3]} gave no token: {last[0] if last else error}") from error
        finally:
            process.terminate()


def _cpu_seconds(pid: int) -> float:
    process = psutil.Process(pid)
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def _read_byte(process: "subprocess.Popen[bytes]") -> None:
    """Read the prompt, which `generate` repeats, and a byte of the completion."""
    assert process.stdout is not None
    if len(process.stdout.read(len(_PROMPT) + 1)) <= len(_PROMPT):
        raise EOFError("it ended")


def _complete(process: "subprocess.Popen[bytes]") -> None:
    """Find the server's address in what it prints, and read a completion's first byte."""
    assert process.stderr is not None
    address = ""
    while not address:
        if not (line := process.stderr.readline()):
            raise EOFError("it ended")
        address = line.decode(errors="replace").partition(" at http://")[2].partition(": ")[0]
    body = json.dumps({"prompt": _PROMPT, "max_tokens": 1, "ignore_eos": True, "stream": True})
    request = urllib.request.Request(
        f"http://{address}/v1/completions", body.encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        if not answer.read(1):
            raise EOFError("an empty answer")
