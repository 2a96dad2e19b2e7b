"""`megatron-dmc bench serve`: streamed completions against any OpenAI-compatible server.

Regime: open loop with gamma-distributed gaps (Poisson at burstiness 1), perhaps bounded by
--max-concurrency; every request streams. Metrics, as the client sees them, in milliseconds: TTFT, from
sending to the first chunk of a token, with text or (an end token, part of a character) without; ITL, between
two such chunks; TPOT, (last - first) / (tokens - 1); E2EL, from sending to the end. The last line printed is one
JSON document with vLLM's keys. A request that fails counts as failed and enters no latency.
"""

import argparse
import asyncio
import functools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_dmc import __version__
from megatron_dmc.bench.output import Result, markdown
from megatron_dmc.errors import DMCError

_LIMITS = ("ttft", "tpot", "e2el")
HIGHEST_RANDOM_ID = 500
"""Random prompts draw their token ids from [3, this): every vocabulary has those."""


@dataclass
class Answer:
    """One request as its client saw it; times in seconds."""

    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft: float = 0.0
    e2el: float = 0.0
    last_token: float = 0.0
    """From sending to the last chunk of a token."""
    itl: list[float] = field(default_factory=list)
    measured_cr: float | None = None
    error: str | None = None

    @property
    def tpot(self) -> float | None:
        """None for a single token."""
        if self.output_tokens < 2:
            return None
        return (self.last_token - self.ttft) / (self.output_tokens - 1)


def run(args: argparse.Namespace) -> Result:
    """Run the benchmark.

    Raises:
        DMCError: a flag is wrong, the server does not answer, or every request failed.
    """
    for name in ("request_rate", "burstiness"):
        if not getattr(args, name) > 0:
            flag = f"--{name.replace('_', '-')}"
            raise DMCError(f"{flag} {getattr(args, name):g}: use a number above 0")
    if args.max_concurrency is not None and args.max_concurrency < 1:
        raise DMCError(f"--max-concurrency {args.max_concurrency}: use 1 or more")
    limits = _parse_goodput(args.goodput)
    percentiles = _parse_percentiles(args.metric_percentiles)
    try:
        extra = json.loads(args.extra_body)
        assert isinstance(extra, dict)
    except (ValueError, AssertionError) as e:
        raise DMCError(f"--extra-body {args.extra_body}: not a JSON object") from e
    asked = prompts(args, args.num_prompts, range_ratio=args.random_range_ratio, seed=args.seed)
    results, duration, model = asyncio.run(run_load(args, asked, extra))
    failed = [r for r in results if r.error is not None]
    if len(failed) == len(results):
        raise DMCError(f"every request failed; the first: {failed[0].error}")
    document = {
        "benchmark": "serve",
        "version": __version__,
        "arguments": sys.argv[1:],
        "model": model,
        "request_rate": None if args.request_rate == float("inf") else args.request_rate,
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        **summarize(results, duration, limits, percentiles),
    }
    _print_table(document, percentiles)
    for error in dict.fromkeys(r.error for r in failed):
        print(f"failed: {error}", file=sys.stderr)
    if args.output:
        Path(args.output).write_text(json.dumps(document) + "\n")
    return Result(document)


async def run_load(
    args: argparse.Namespace, asked: list[tuple[Any, int]], extra: dict[str, Any]
) -> tuple[list[Answer], float, str]:
    """Send the requests as `args` says, those of the command.

    Args:
        asked: see `prompts`.
        extra: parameters of every request.

    Returns:
        answers in the order of `asked`, seconds of the whole run, and the model's name.

    Raises:
        DMCError: aiohttp is not installed, or the server does not answer.
    """
    try:
        import aiohttp
    except ModuleNotFoundError as e:
        raise DMCError("aiohttp is not installed: pip install 'megatron-dmc[serve]'") from e
    key = args.api_key or os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    base = args.base_url.rstrip("/")
    async with aiohttp.ClientSession(
        headers=headers,
        read_bufsize=2**20,  # a line of a stream must fit
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=60),
    ) as session:
        model = args.model or await _first_model(session, base)
        places = asyncio.Semaphore(args.max_concurrency or len(asked))

        async def one(prompt: Any, max_tokens: int) -> Answer:
            body = {
                "model": model,
                "prompt": prompt,
                "max_tokens": max_tokens,
                "temperature": args.temperature,
                "stream": True,
                "stream_options": {"include_usage": True},
                **({"ignore_eos": True} if args.ignore_eos else {}),
                **extra,
            }
            async with places:
                return await request(session, base + args.endpoint, body)

        generator = random.Random(args.seed)
        tasks = []
        due = began = time.perf_counter()
        for prompt, max_tokens in asked:
            # an open loop: a late request does not put off those that follow
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.ensure_future(one(prompt, max_tokens)))
            if args.request_rate != float("inf"):
                scale = 1 / (args.request_rate * args.burstiness)
                due += generator.gammavariate(args.burstiness, scale)
        with tqdm(total=len(tasks), unit="req", disable=not sys.stderr.isatty()) as bar:
            for task in tasks:
                task.add_done_callback(lambda _: bar.update())
            results = await asyncio.gather(*tasks)
        return results, time.perf_counter() - began, model


async def _first_model(session: Any, base: str) -> str:
    import aiohttp

    try:
        async with session.get(f"{base}/v1/models") as answer:
            answer.raise_for_status()
            return (await answer.json())["data"][0]["id"]
    except (aiohttp.ClientError, OSError, ValueError, LookupError) as e:
        raise DMCError(f"--base-url {base}: /v1/models does not answer ({e})") from e


async def request(session: Any, url: str, body: dict[str, Any]) -> Answer:
    """Stream one completion. Never raises for what the server does: see `Answer.error`."""
    import aiohttp

    result = Answer()
    sent = time.perf_counter()
    before = None
    try:
        async with session.post(url, json=body) as answer:
            if answer.status != 200:
                result.error = f"status {answer.status}: {(await answer.text())[:300]}"
                return result
            done = False
            async for line in answer.content:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    done = True
                    break
                chunk = json.loads(data)
                now = time.perf_counter()
                if chunk.get("error"):
                    result.error = str(chunk["error"].get("message", chunk["error"]))
                    return result
                if any(map(_is_of_token, chunk.get("choices", ()))):
                    if before is None:
                        result.ttft = now - sent
                    else:
                        result.itl.append(now - before)
                    before = now
                    result.last_token = now - sent
                usage = chunk.get("usage")
                if usage:
                    result.prompt_tokens = usage["prompt_tokens"]
                    result.output_tokens = usage["completion_tokens"]
                    result.measured_cr = usage.get("measured_cr")
            if not done:
                result.error = "the stream broke off before [DONE]"
    except (aiohttp.ClientError, OSError, ValueError, KeyError) as e:
        result.error = f"{type(e).__name__}: {e}"
    result.e2el = time.perf_counter() - sent
    if result.error is None and before is None:
        # a server that sends nothing for tokens without text: the end is all that was seen
        result.ttft = result.last_token = result.e2el
    return result


def _is_of_token(choice: dict[str, Any]) -> bool:
    """Whether a choice was sent for a token, as vLLM's benchmark counts: any one, text or not; of a chat not
    the one that only gives the role, which some servers send before they compute anything."""
    if "delta" not in choice:
        return True
    delta = choice["delta"] or {}
    return bool(delta.get("content") or delta.get("reasoning_content")) or "role" not in delta


def summarize(
    results: list[Answer], duration: float, limits: dict[str, float], percentiles: list[float]
) -> dict[str, Any]:
    """Throughput, goodput and latencies.

    Args:
        duration: seconds of the whole run.
        limits: goodput's, seconds.
        percentiles: of each latency.
    """
    good = [r for r in results if r.error is None]
    kept = [r for r in good if all((getattr(r, n) or 0.0) <= s for n, s in limits.items())]
    crs = [r.measured_cr for r in good if r.measured_cr is not None]
    num_in, num_out = sum(r.prompt_tokens for r in good), sum(r.output_tokens for r in good)
    summary: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(results) - len(good),
        "total_input_tokens": num_in,
        "total_output_tokens": num_out,
        "request_throughput": len(good) / duration,
        "request_goodput": len(kept) / duration if limits else None,
        "output_throughput": num_out / duration,
        "total_token_throughput": (num_in + num_out) / duration,
        "mean_measured_cr": statistics.fmean(crs) if crs else None,
    }
    for name, values in (
        ("ttft", [r.ttft for r in good]),
        ("tpot", [r.tpot for r in good if r.tpot is not None]),
        ("itl", [gap for r in good for gap in r.itl]),
        ("e2el", [r.e2el for r in good]),
    ):
        in_ms = 1e3 * np.array(values)
        for statistic, of in _statistics(percentiles).items():
            summary[f"{statistic}_{name}_ms"] = float(of(in_ms)) if values else None
    return summary


def _statistics(percentiles: list[float]) -> dict[str, Callable[[np.ndarray], Any]]:
    return {
        "mean": np.mean, "median": np.median, "std": np.std,
        **{f"p{p:g}": functools.partial(np.percentile, q=p) for p in percentiles},
    }  # fmt: skip


def _parse_goodput(items: list[str]) -> dict[str, float]:
    limits = {}
    for item in items:
        name, _, value = item.partition(":")
        try:
            limits[name] = float(value) / 1e3
        except ValueError:
            limits[name] = -1.0
        if name not in _LIMITS or limits[name] <= 0:
            raise DMCError(f"--goodput {item}: use METRIC:MILLISECONDS with {', '.join(_LIMITS)}")
    return limits


def _parse_percentiles(text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 100 for value in values):
        raise DMCError(f"--metric-percentiles {text}: use numbers from 0 to 100, as 50,90,99")
    return values


def _print_table(document: dict[str, Any], percentiles: list[float]) -> None:
    print(
        f"{document['completed']} completed, {document['failed']} failed in "
        f"{document['duration']:.1f} s: {document['request_throughput']:.2f} requests/s, "
        f"{document['output_throughput']:.1f} generated tokens/s, "
        f"{document['total_token_throughput']:.1f} tokens/s in all"
    )
    if document["request_goodput"] is not None:
        print(f"goodput: {document['request_goodput']:.2f} requests/s within the limits")
    columns = _statistics(percentiles)
    rows = [
        {"ms": name.upper(), **{c: document[f"{c}_{name}_ms"] for c in columns}}
        for name in ("ttft", "tpot", "itl", "e2el")
    ]
    print(markdown(rows, {c: c for c in ("ms", *columns)}))


def prompts(
    args: argparse.Namespace, count: int, *, range_ratio: float = 0.0, seed: int = 0
) -> list[tuple[Any, int]]:
    """(prompt, tokens to generate) of `count` requests; a short dataset is gone through again.

    Raises:
        DMCError: a length is not positive, or the dataset is missing or malformed.
    """
    if min(args.input_len, args.output_len, count) < 1:
        raise DMCError(
            f"{count} prompts of {args.input_len} tokens, {args.output_len} to generate: all three must "
            "be 1 or more"
        )
    if not 0 <= range_ratio < 1:
        raise DMCError(f"--random-range-ratio {range_ratio:g}: use 0 or more, less than 1")
    if args.dataset_path is not None:
        rows = list(_read(args.dataset_path))
        return [
            (row["prompt"], int(row.get("output_tokens", args.output_len)))
            for row in (rows[i % len(rows)] for i in range(count))
        ]
    generator = random.Random(seed)

    def length(mean: int) -> int:
        return max(1, round(mean * generator.uniform(1 - range_ratio, 1 + range_ratio)))

    return [
        (
            [generator.randrange(3, HIGHEST_RANDOM_ID) for _ in range(length(args.input_len))],
            length(args.output_len),
        )
        for _ in range(count)
    ]


def _read(path: str) -> Iterator[dict[str, Any]]:
    found = False
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("prompt"), str | list):
                    raise DMCError(f'--dataset-path {path}: line {number} has no "prompt"')
                found = True
                yield row
    except (OSError, ValueError) as e:
        raise DMCError(f"--dataset-path {path}: {e}") from e
    if not found:
        raise DMCError(f"--dataset-path {path}: it is empty")
