"""The engines' own OpenAI-compatible servers, one after the other under one load: that of `bench serve`."""

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from typing import IO

from megatron_dmc.bench import load
from megatron_dmc.bench.output import Row
from megatron_dmc.bench.peers.environments import OURS
from megatron_dmc.errors import DMCError

COMMANDS = {
    OURS: (
        "-m", "megatron_dmc.cli.main", "serve", "{model}", "--port", "{port}", "--dtype", "{dtype}",
        "--max-model-len", "{length}", "--kv-cache-memory-bytes", "{cache_bytes}",
    ),
    "vllm": (
        "-m", "vllm.entrypoints.openai.api_server", "--model", "{model}", "--port", "{port}", "--dtype", "{dtype}",
        "--max-model-len", "{length}", "--kv-cache-memory-bytes", "{cache_bytes}", "--no-enable-prefix-caching",
    ),
}  # fmt: skip
"""Arguments of the engine's interpreter."""
NO_SERVER = {
    "transformers": "its server takes texts, not token ids",
    "llama.cpp": "the server of its Python package computes one request at a time",
}
"""Reasons for leaving an engine out."""
VARIABLES = {"vllm": {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}}
"""Of the engine's environment."""
POLL_S, END_S = 0.25, 20
ROUNDS = 4
"""Requests of each stream."""


def measure(
    engine: str, python: str, model: str, threads: int, streams: int, args: argparse.Namespace
) -> Row:
    """The row of an engine's server with `streams` requests at a time: start it, load it, end it.

    Args:
        engine: one of `COMMANDS`.
        python: the interpreter of the engine's environment.
        args: of `bench peers`.

    Raises:
        DMCError: it ended, it took too long to start, or a request failed.
    """
    port = _free_port()
    words = {
        "model": model, "port": port, "dtype": args.dtype, "cache_bytes": args.kv_cache_memory_bytes,
        "length": args.server_input_len + args.server_output_len,
    }  # fmt: skip
    command = [python, *(word.format(**words) for word in COMMANDS[engine])]
    variables = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        env=os.environ | variables | VARIABLES.get(engine, {}),
    ) as process:  # fmt: skip
        try:
            address = f"http://127.0.0.1:{port}"
            _wait_until_ready(process, address, log, args.timeout)
            _load(address, streams, streams, args)  # warm-up
            return _load(address, streams, ROUNDS * streams, args)
        finally:
            _end(process)


def _load(address: str, streams: int, count: int, args: argparse.Namespace) -> Row:
    asked = argparse.Namespace(
        base_url=address, endpoint="/v1/completions", model=None, api_key=None, seed=0, temperature=0.0,
        ignore_eos=True, max_concurrency=streams, request_rate=float("inf"), burstiness=1.0,
        input_len=args.server_input_len, output_len=args.server_output_len, dataset_path=None,
    )  # fmt: skip
    answers, seconds, _ = asyncio.run(load.run_load(asked, load.prompts(asked, count), {}))
    errors = [answer.error for answer in answers if answer.error is not None]
    if errors:
        raise DMCError(f"{len(errors)} of {count} requests failed; the first: {errors[0]}")
    found = load.summarize(answers, seconds, {}, [99])
    names = ("output_throughput", "median_ttft_ms", "median_tpot_ms", "p99_itl_ms")
    return {name: found[name] for name in names} | {"requests": count}


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _wait_until_ready(
    process: "subprocess.Popen[bytes]", address: str, log: IO[str], timeout: float
) -> None:
    until = time.monotonic() + timeout
    while True:
        if process.poll() is not None:
            log.seek(0)
            last = [text for text in log.read().splitlines() if text.strip()][-1:]
            raise DMCError(last[0] if last else f"it ended with {process.returncode}")
        try:
            with urllib.request.urlopen(f"{address}/v1/models", timeout=5) as answer:
                json.load(answer)
                return
        except (urllib.error.URLError, OSError, ValueError):
            if time.monotonic() > until:
                raise DMCError(f"it took longer than --timeout {timeout:g}") from None
            time.sleep(POLL_S)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Stop the server with its children."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(END_S)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return
