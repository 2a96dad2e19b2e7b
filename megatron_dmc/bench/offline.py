"""`megatron-dmc bench throughput` and `bench latency`: the engine without a server.

Regime: throughput gives all requests at once and lets the engine batch them; latency runs one batch, all of
it together, again and again. Completions are full-length (the end-of-text token is ignored) and greedy. Lists
of CRs, batches and lengths make a sweep, with one model for all of it.
Metric: wall-clock seconds; tokens per second over the whole run, prefill included, and of the steps that only
decode, compared with the bytes that such a step must move over the bandwidth of a copy. A step counts as decoding
where it and the step before gave a token to as many requests as the batch has; its seconds are the whole step's:
schedule, model, sampling, page accounting. The median of the repeats, with their spread. The last line printed is one
JSON document; vLLM's keys where it has them.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_dmc.bench.baselines import Asked, token_rates, transformers_row
from megatron_dmc.bench.load import prompts
from megatron_dmc.bench.measure import (
    Ceilings,
    ModelCost,
    Settings,
    document,
    release_memory,
    synchronize,
)
from megatron_dmc.bench.model_under_test import ModelUnderTest, Point
from megatron_dmc.bench.output import Curves, Panel, Result, Row
from megatron_dmc.checkpoint.hub import local_path
from megatron_dmc.engine import LLM, RequestOutput, SamplingParams
from megatron_dmc.engine.flags import model_path
from megatron_dmc.errors import DMCError

SHOWN = (
    "cr", "measured_cr", "num_requests", "batch_size", "input_len", "output_len", "elapsed_time",
    "tokens_per_second", "output_tokens_per_second", "decode_tokens_per_second",
    "roofline_tokens_per_second", "fraction_of_roofline", "decode_step_ms", "spread",
)  # fmt: skip
"""Columns of the line that is printed for each point."""


@dataclass
class DecodeStep:
    """A step in which every request of the batch got a token and none was prefilled."""

    seconds: float
    num_requests: int
    seq_tokens: int
    """Tokens of all requests, which their caches stand for."""


@dataclass
class Run:
    """Outputs and times of one run."""

    seconds: float = 0.0
    time_to_first_token: float = 0.0
    """Until the last first token of the first batch."""
    outputs: list[RequestOutput] = field(default_factory=list)
    decoding: list[DecodeStep] = field(default_factory=list)
    fragmentation: float | None = None
    """Bytes of the pages held / bytes of live entries, just before the first request ended."""

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(output.prompt_token_ids) for output in self.outputs)

    @property
    def num_generated(self) -> int:
        return sum(len(output.outputs[0].token_ids) for output in self.outputs)

    @property
    def measured_cr(self) -> float:
        """Total tokens / total entries."""
        metrics = [output.metrics for output in self.outputs]
        return sum(m.num_cached_tokens for m in metrics) / sum(m.num_entries for m in metrics)


def run_requests(llm: LLM, asked: Asked, *, name: str, batch: int, bar: bool = False) -> Run:
    """Give all requests at once and step until the last has ended; greedy, full-length completions.

    Args:
        name: prefix of this run's request ids.
        batch: how many run at a time.

    Raises:
        InvalidRequest: one of them can never run.
    """
    engine, run = llm.engine, Run()
    for number, (prompt, num_new) in enumerate(asked):
        params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True)
        engine.add_request(f"{name}-{number}", prompt, params)
    wanted = {f"{name}-{number}": num_new for number, (_, num_new) in enumerate(asked)}
    started: set[str] = set()
    was_full = False
    synchronize()
    began = before = time.perf_counter()
    with tqdm(total=len(asked), desc=name, unit="request", disable=None if bar else True) as shown:
        while engine.has_unfinished_requests:
            outputs = engine.step()
            now = time.perf_counter()
            if len(started) < batch and outputs:
                started.update(output.request_id for output in outputs)
                run.time_to_first_token = now - began
            is_full = len(outputs) == batch
            ends = False
            if is_full:
                tokens = 0
                for output in outputs:
                    num_new = len(output.outputs[0].token_ids)
                    tokens += len(output.prompt_token_ids) + num_new - 1
                    ends |= num_new == wanted[output.request_id] - 1
                if was_full:
                    run.decoding.append(DecodeStep(now - before, batch, tokens))
            was_full = is_full
            for output in outputs:
                if output.finished:
                    run.outputs.append(output)
                    shown.update()
            if ends and run.fragmentation is None:
                run.fragmentation = llm.stats().fragmentation
            before = time.perf_counter()
        synchronize()
    run.seconds = time.perf_counter() - began
    return run


def decode_figures(run: Run, cost: ModelCost, ceilings: Ceilings) -> dict[str, Any]:
    """Achieved and attainable figures of the steps that only decode; empty where there are none."""
    steps = run.decoding
    if not steps:
        return {}
    seconds = sum(step.seconds for step in steps)
    requests = steps[0].num_requests
    live = [step.seq_tokens * cost.num_heads / run.measured_cr for step in steps]
    floors = [ceilings.floor(cost, requests, entries) for entries in live]
    floor = {name: statistics.fmean(f[name] for f in floors) for name in floors[0]}
    mean_seconds = seconds / len(steps)
    return {
        "decode_tokens_per_second": requests * len(steps) / seconds,
        "decode_step_ms": 1e3 * mean_seconds,
        "median_decode_step_ms": 1e3 * statistics.median(step.seconds for step in steps),
        "mean_context": statistics.fmean(step.seq_tokens for step in steps) / requests,
        "step_bytes": cost.step_bytes(statistics.fmean(live)),
        "memory_floor_ms": 1e3 * floor["memory"],
        "arithmetic_floor_ms": 1e3 * floor["arithmetic"],
        "roofline_tokens_per_second": requests / floor["roofline"],
        "fraction_of_roofline": floor["roofline"] / mean_seconds,
    }


def spread(values: Sequence[float]) -> float | None:
    """(largest - smallest) / median of repeated measurements; None of a single one."""
    if len(values) < 2:
        return None
    return (max(values) - min(values)) / statistics.median(values)


def run(args: argparse.Namespace) -> Result:
    """Measure all points of the sweep that `args.benchmark` (throughput or latency) asks for.

    Returns:
        the document has one row for each point; where there is only one, its columns are the document's too.

    Raises:
        DMCError: a flag is wrong, or a request can never run.
    """
    points = _points(args)
    tested = ModelUnderTest.from_args(
        args, max(point.input_len + point.output_len for point in points)
    )
    settings = Settings(
        tested.device, tested.description.dtype, (), args.num_iters,
        Path(args.output) if args.output else None,
    )  # fmt: skip
    ceilings = Ceilings.measure(settings)
    tested.share_pages(points)
    rows = []
    for point in points:
        rows.append(_measure_point(args, tested, point, ceilings))
        release_memory()
    if args.compare:
        rows += _compare(args, tested, points, settings)
    name = args.benchmark
    result = document(
        name, settings, model=model_path(args), load_format=args.load_format,
        tensor_parallel_slice=args.tensor_parallel_slice,
        copy_bytes_per_second=ceilings.bytes_per_second,
        flops_per_second=ceilings.flops_per_second, **(rows[0] if len(rows) == 1 else {}),
        rows=rows,
    )  # fmt: skip
    curves = {
        f"{name}-{x}": Curves(rows, x, "decode_tokens_per_second", series, name)
        for x, series in (
            ("cr", ["engine", "input_len"]),
            ("batch_size", ["engine", "cr", "input_len"]),
            ("input_len", ["engine", "cr"]),
        )
    }
    labels = ("engine", "cr", "batch_size", "input_len", "output_len")
    panel = Panel("generated tokens", "tokens/s", rows, "output_tokens_per_second", labels)
    return Result(result, settings.output, [panel], curves, csv=rows)


def _points(args: argparse.Namespace) -> list[Point]:
    for name in ("num_prompts", "num_iters"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise DMCError(f"--{name.replace('_', '-')} {value}: use 1 or more")
    batches = args.batch_size if args.benchmark == "latency" else args.max_num_seqs
    if len(args.output_len) not in (1, len(args.input_len)):
        raise DMCError(
            f"{len(args.output_len)} of --output-len for {len(args.input_len)} of --input-len: give one, "
            "or one for each"
        )
    outputs = args.output_len * (len(args.input_len) // len(args.output_len))
    return [
        Point(cr, batch, input_len, output_len)
        for (input_len, output_len), batch, cr in itertools.product(
            zip(args.input_len, outputs, strict=True), batches, args.simulate_cr or [None]
        )
    ]


def _measure_point(
    args: argparse.Namespace, tested: ModelUnderTest, point: Point, ceilings: Ceilings
) -> Row:
    llm, decisions = tested.engine(point, is_dense=args.dense_baseline)
    batch = llm.engine.config.max_num_seqs
    assert batch is not None
    count = args.num_prompts or batch
    asked = _prompts(args, point, count)
    running = min(batch, count)
    for name, some in (
        ("warm-up of a prompt", [(asked[0][0], min(2, asked[0][1]))]),
        ("warm-up of a batch", [(prompt[:8], 4) for prompt, _ in asked[:running]]),
    ):
        run_requests(llm, some, name=name, batch=len(some))
    for i in range(getattr(args, "num_iters_warmup", 0)):
        run_requests(llm, asked, name=f"warm-up {i}", batch=running)
    runs = [
        run_requests(llm, asked, name=f"run {i}", batch=running, bar=True)
        for i in range(args.num_iters)
    ]
    stats = llm.stats()
    cost = ModelCost.of(tested.loaded.model, tested.description, stats.entry_bytes)
    row: Row = {
        "engine": "megatron-dmc, dense" if args.dense_baseline else "megatron-dmc",
        "cr": point.cr, "batch_size": running, "input_len": point.input_len, "output_len": point.output_len,
        **_summary(args, runs, [decode_figures(run, cost, ceilings) for run in runs]),
        "measured_cr": runs[-1].measured_cr, "fragmentation": runs[-1].fragmentation,
        "peak_pages": stats.peak_pages_in_use, "num_pages": stats.num_pages,
        "page_bytes": stats.page_bytes, "num_preemptions": stats.num_preemptions,
        "weight_bytes": cost.weight_bytes, "entry_bytes": cost.entry_bytes,
    }  # fmt: skip
    if decisions is not None and not args.dataset_path:
        for run in runs:
            decisions.check(run.measured_cr, len(run.outputs))
    print(
        ", ".join(f"{key} {row[key]:.5g}" for key in SHOWN if row.get(key) is not None), flush=True
    )
    return row


def _summary(args: argparse.Namespace, runs: list[Run], figures: list[Row]) -> Row:
    """Medians over the repeats, and their spread."""
    seconds = [run.seconds for run in runs]
    elapsed = statistics.median(seconds)
    num_in, num_out = runs[0].num_prompt_tokens, runs[0].num_generated
    row = token_rates(elapsed, len(runs[0].outputs), num_in, num_out) | {
        "time_to_first_token": statistics.median(run.time_to_first_token for run in runs),
        "repeats": len(runs),
        "spread": spread(seconds),
    }
    if all(figures):
        row |= {key: statistics.median(f[key] for f in figures) for key in figures[0]}
        row["decode_spread"] = spread([f["decode_tokens_per_second"] for f in figures])
    if args.benchmark == "latency":
        row |= {
            "avg_latency": statistics.fmean(seconds),
            "latencies": seconds,
            "percentiles": {
                f"{p}": float(np.percentile(seconds, p)) for p in (10, 25, 50, 75, 90, 99)
            },
        }
    return row


def _compare(
    args: argparse.Namespace, tested: ModelUnderTest, points: list[Point], settings: Settings
) -> list[Row]:
    """Another engine, on the points at CR 1 (its cache does not compress)."""
    asked = []
    for input_len, output_len in dict.fromkeys((c.input_len, c.output_len) for c in points):
        ours = Point(1.0, points[0].max_num_seqs, input_len, output_len)
        count = args.num_prompts or ours.max_num_seqs or tested.largest_batch(ours)
        asked.append((ours, _prompts(args, ours, count)))
    description = tested.description
    path = None if tested.is_random else local_path(model_path(args), revision=args.revision)
    tested.release()
    release_memory()
    rows = []
    for ours, given in asked:
        cache_tokens = None if settings.on_gpu else len(given) * (ours.num_cached + 32)
        row = transformers_row(description, given, settings, path=path, cache_tokens=cache_tokens)
        rows.append({
            "engine": "transformers", "cr": 1.0, "batch_size": len(given),
            "input_len": ours.input_len, "output_len": ours.output_len, **row,
        })  # fmt: skip
        said = row.get("skipped") or f"{row['output_tokens_per_second']:.1f} generated tokens/s"
        print(f"transformers, {len(given)} requests: {said}", flush=True)
        release_memory()
    return rows


def _prompts(args: argparse.Namespace, point: Point, count: int) -> list[tuple[Any, int]]:
    given = argparse.Namespace(
        input_len=point.input_len, output_len=point.output_len, dataset_path=args.dataset_path
    )
    return prompts(given, count, seed=args.seed)
