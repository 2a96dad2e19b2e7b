"""Decode tokens per second through the real server, as a client sees them."""

import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median


@contextmanager
def server(
    model: Path, max_model_len: int, dtype: str, log: Path, *, prefix_caching: bool
) -> Iterator[str]:
    """The address of `megatron-dmc serve`, which ends with the block."""
    command = [
        sys.executable, "-m", "megatron_dmc.cli.main", "serve", str(model), "--port", "0",
        "--served-model-name", "model", "--max-model-len", str(max_model_len), "--dtype", dtype,
        "--max-num-seqs", "4", "--disable-uvicorn-access-log", *(["--enable-prefix-caching"] if prefix_caching else []),
    ]  # fmt: skip
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        while (found := re.search(r"serving .* at (http://[\d.]+:\d+)", log.read_text())) is None:
            if process.poll() is not None:
                raise ValueError(f"the server ended with {process.returncode}; its output: {log}")
            time.sleep(0.2)
        address = found[1]
        while process.poll() is None:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def decode_tokens_per_second(address: str, token_ids: list[int], max_tokens: int) -> float:
    """Of one streamed completion: tokens after the first, by the time between first and last."""
    body = {
        "model": "model", "prompt": token_ids, "max_tokens": max_tokens, "temperature": 0,
        "ignore_eos": True, "stream": True,
    }  # fmt: skip
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    times = []
    with urllib.request.urlopen(request) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                times.append(time.perf_counter())
    return (max_tokens - 1) / (times[-1] - times[0])


def by_context(
    model: Path,
    token_ids: list[int],
    lengths: list[int],
    max_tokens: int,
    dtype: str,
    log: Path,
    *,
    prefix_caching: bool,
) -> dict[str, float]:
    """Context length -> decode tokens per second, the median of three.

    Args:
        prefix_caching: prefill a context only as far as an earlier one did not.
    """
    longest = max(lengths) + max_tokens + 1
    with server(model, longest, dtype, log, prefix_caching=prefix_caching) as address:
        return {
            str(length): median(
                decode_tokens_per_second(address, token_ids[:length], max_tokens) for _ in range(3)
            )
            for length in lengths
        }
