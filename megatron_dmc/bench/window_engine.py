"""The stages of `bench window` that run the model: the engine's checks, E1 to E3, E7, K3, a profile.

Llama-2-7B's shape with random weights, made on the GPU. Caches are filled, not prefilled (`bench.decode_step`), CR 1 like
the others; merge decisions are imposed. On a CPU a model of two layers.
"""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from megatron_dmc.bench import decode_step
from megatron_dmc.bench import train_step as training
from megatron_dmc.bench.decode_step import ENGINE_SETTINGS, filled_engine
from megatron_dmc.bench.measure import Ceilings, synchronize
from megatron_dmc.bench.model_under_test import ModelUnderTest, Point, random_model
from megatron_dmc.bench.output import Case, Row
from megatron_dmc.bench.suite import E1_MUST_REACH, E7_MUST_REACH
from megatron_dmc.bench.window_kernels import ceiling, run_tests, settings_of
from megatron_dmc.bench.window_stages import Child
from megatron_dmc.errors import DMCError

E2_MUST_REACH = 0.8
"""Part of the roofline at CR 1."""
WARMUP, STEPS = 12, 48


class WindowModel:
    """The model of a stage, made when its first case asks for it."""

    def __init__(self, stage: Child):
        self.is_small = stage.cpu
        self.settings = settings_of(stage, STEPS)
        self.warmup, self.repeats = (1, 3) if stage.cpu else (WARMUP, STEPS)
        names = ("copy", "matrix product")
        self.ceilings = Ceilings(*(ceiling(stage, name, self.settings) for name in names))

    @functools.cached_property
    def tested(self) -> ModelUnderTest:
        layers, length = (2, 512) if self.is_small else (32, 4096)
        description = training.describe(self.settings, num_layers=layers, length=length)
        return ModelUnderTest(random_model(description, self.settings.device), ENGINE_SETTINGS)

    def measure(self, cr: float, batch: int, context: int, **options: Any) -> Row:
        """An engine's steps from `context` tokens on; its memory is free again afterwards."""
        point = Point(cr, batch, context, self.warmup + self.repeats + 1)
        if self.tested.settings["num_pages"] is None:
            options["num_pages"] = self.tested.pages_of(point)
        (row,) = decode_step.measure(
            self.tested, [point], self.ceilings, repeats=self.repeats, warmup=self.warmup, **options
        )
        return {"engine": "dense" if options.get("is_dense") else "paged", **row}


# --- E1, E2 ---------------------------------------------------------------------------------------


def throughput(stage: Child) -> None:
    """2k + 2k tokens, as many requests as the cache holds at their ends, timed in the middle."""
    model = WindowModel(stage)
    prompt, new, context = (48, 48, 80) if stage.cpu else (2048, 2048, 3072)
    plain: Row = {}

    def measure(cr: float) -> Iterator[Row]:
        tested, whole = model.tested, Point(cr, None, prompt, new)
        if stage.cpu:
            tested.settings["num_pages"] = 1000
        tested.share_pages([whole])
        row = model.measure(cr, tested.largest_batch(whole), context)
        if cr == 1:
            plain.update(row)
            row["must_reach"] = f"{E2_MUST_REACH:.0%} of the roofline"
        elif plain:
            row["ratio"] = row["tokens_per_second"] / plain["tokens_per_second"]
            row["must_reach"] = E1_MUST_REACH[cr]
        yield row

    stage.run([
        Case(f"E{'2' if cr == 1 else '1'} CR {cr:g}", functools.partial(measure, cr))
        for cr in (1.0, 4.0, 8.0)
    ])  # fmt: skip


# --- E3, E7 ---------------------------------------------------------------------------------------


def latency(stage: Child) -> None:
    """Equal batches at 4k tokens of context, and dense attention in the same engine."""
    model = WindowModel(stage)
    context, batches = (60, (1, 2)) if stage.cpu else (4000, (1, 8))
    plain: dict[int, Row] = {}

    def at_equal_batch(batch: int, cr: float) -> Iterator[Row]:
        row = model.measure(cr, batch, context)
        if cr == 1:
            plain[batch] = row
        elif batch in plain:
            row |= {"ratio": plain[batch]["step_ms"] / row["step_ms"], "must_reach": 1.0}
        yield row

    def against_dense(batch: int) -> Iterator[Row]:
        dense, paged = (model.measure(1.0, batch, context, is_dense=x) for x in (True, False))
        yield dense
        ratio = dense["step_ms"] / paged["step_ms"]
        yield {**paged, "ratio": ratio, "must_reach": E7_MUST_REACH}

    stage.run([
        *(
            Case(f"E3 B={batch} CR {cr:g}", functools.partial(at_equal_batch, batch, cr))
            for batch in batches for cr in (1.0, 4.0, 8.0)
        ),
        Case(f"E7 B={batches[-1]}", functools.partial(against_dense, batches[-1])),
    ])  # fmt: skip


# --- checks, K3, profile --------------------------------------------------------------------------


def engine_checks(stage: Child) -> None:
    """Captured steps against eager ones, and steps under sync-debug: the tests that need a GPU. On a CPU a case of
    captured steps that are run again instead of replayed."""
    if stage.cpu:
        run_tests(stage, ["engine/test_decode_graphs.py"], "-k", "eager_steps and plenty and 0")
    else:
        run_tests(stage, ["engine/test_engine_gpu.py"], "-k", "captured or padded or waits")


def train_step(stage: Child) -> None:
    """K3: forward, loss, backward and AdamW of one layer's model."""
    settings = replace(settings_of(stage, 10), lengths=(32 if stage.cpu else 4096,))
    stage.run(training.cases(settings, num_layers=1))


def profile(stage: Child) -> None:
    """Time of a replayed step by kernel; on a CPU by operator."""
    model = WindowModel(stage)
    context, batch, shown = (60, 2, 5) if stage.cpu else (2048, 64, 25)

    def table() -> Iterator[Row]:
        # fewer pages than CR 1 would need
        point, at_cr_2 = (Point(4.0, batch, context // n, 8) for n in (1, 2))
        pages = model.tested.pages_of(at_cr_2)
        engine, _ = filled_engine(model.tested, point, num_pages=pages)
        for _ in range(3):
            engine.step()
        synchronize()
        activity = torch.profiler.ProfilerActivity
        on_gpu = model.settings.on_gpu
        with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as prof:
            engine.step()
            synchronize()
        key = f"self_{'device' if on_gpu else 'cpu'}_time_total"
        events = sorted(prof.key_averages(), key=lambda e: getattr(e, key), reverse=True)
        total = sum(getattr(event, key) for event in events)
        if not total:
            raise DMCError("the profiler saw no kernels")
        for event in events[:shown]:
            us = getattr(event, key)
            yield {
                "name": event.key[:100], "calls": event.count, "us": us, "fraction": us / total,
            }  # fmt: skip
        yield {"name": "all", "calls": sum(e.count for e in events), "us": total, "fraction": 1.0}

    stage.run([Case(f"B={batch} CR 4", table)])
