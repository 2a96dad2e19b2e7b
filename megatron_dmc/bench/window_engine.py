"""The stages of `bench window` that run the model: the engine's checks, E1 to E3, E7, K3, a profile.

Llama-2-7B's shape with random weights, made on the GPU. Caches are filled, not prefilled (`bench.decode_step`), CR 1 like
the others; merge decisions are imposed. On a CPU a model of two layers.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from megatron_dmc.bench import decode_step
from megatron_dmc.bench import train_step as training
from megatron_dmc.bench.baselines import DenseContext
from megatron_dmc.bench.decode_step import PAGE_SIZE, filled_engine
from megatron_dmc.bench.imposed import ImposedDecisions, spread_weights
from megatron_dmc.bench.measure import Ceilings, release_memory, synchronize
from megatron_dmc.bench.model_under_test import random_model, requests_that_fit
from megatron_dmc.bench.output import Case, Row
from megatron_dmc.bench.suite import E1_MUST_REACH, E7_MUST_REACH
from megatron_dmc.bench.window_kernels import ceiling, run_tests, settings_of
from megatron_dmc.bench.window_stages import Child
from megatron_dmc.checkpoint.load import LoadedModel
from megatron_dmc.engine.context import PagedContext
from megatron_dmc.engine.sizes import pages_in_memory
from megatron_dmc.errors import DMCError
from megatron_dmc.ops.paged.kv_pages import entry_bytes

E2_MUST_REACH = 0.8
"""Part of the roofline at CR 1."""
WARMUP, STEPS = 12, 48


class WindowModel:
    """The model of a stage, made when its first case asks for it."""

    def __init__(self, stage: Child, num_layers: int | None = None):
        self.stage = stage
        self.settings = settings_of(stage, STEPS)
        self._num_layers = num_layers

    @functools.cached_property
    def loaded(self) -> LoadedModel:
        num_layers = self._num_layers or (2 if self.stage.cpu else 32)
        length = 512 if self.stage.cpu else 4096
        description = training.describe(self.settings, num_layers=num_layers, length=length)
        return random_model(description, self.settings.device)

    @functools.cached_property
    def ceilings(self) -> Ceilings:
        return Ceilings(
            *(ceiling(self.stage, name, self.settings) for name in ("copy", "matrix product"))
        )

    @property
    def heads(self) -> int:
        """KV heads over all layers."""
        d = self.loaded.description
        return d.num_layers * d.num_query_groups

    @functools.cached_property
    def most_pages(self) -> int:
        """Pages of a cache that takes the GPU's memory, the same for all cases."""
        d, _ = self.loaded.description, self.ceilings
        release_memory()
        return pages_in_memory(
            2 * PAGE_SIZE * entry_bytes(d.kv_channels, d.dtype),
            worst_case=1000 if self.stage.cpu else 1 << 40,
            kv_cache_memory_bytes=None,
            gpu_memory_utilization=0.9,
            device=self.settings.device,
        )

    def decisions(self, cr: float, num_tokens: int) -> ImposedDecisions | None:
        """Decisions to impose; none at CR 1."""
        d = self.loaded.description
        weights = spread_weights(d.num_layers, d.num_query_groups)
        return None if cr == 1 else ImposedDecisions.of(weights, cr, num_tokens=num_tokens)

    def measure(
        self, cr: float, *, batch: int, context: int, num_pages: int | None = None,
        make_context: Callable[..., PagedContext] = PagedContext,
    ) -> Row:  # fmt: skip
        """An engine's steps from `context` tokens on; its memory is free again afterwards."""
        warmup, repeats = (1, 3) if self.stage.cpu else (WARMUP, STEPS)
        (row,) = decode_step.measure(
            self.loaded, [self.decisions(cr, context + warmup + repeats + 1)], self.ceilings,
            context=context, batch=batch, repeats=repeats, warmup=warmup, num_pages=num_pages,
            make_context=make_context,
        )  # fmt: skip
        return {"engine": "dense" if make_context is DenseContext else "paged", **row}


# --- E1, E2 ---------------------------------------------------------------------------------------


def throughput(stage: Child) -> None:
    """2k + 2k tokens, as many requests as the cache holds at their ends, timed in the middle."""
    model = WindowModel(stage)
    longest, context = (96, 80) if stage.cpu else (4096, 3072)
    plain: Row = {}

    def measure(cr: float) -> Iterator[Row]:
        pages, decisions = model.most_pages, model.decisions(cr, longest - 1)
        batch = requests_that_fit(pages, model.heads, PAGE_SIZE, longest - 1, decisions)
        row = model.measure(cr, batch=batch, context=context, num_pages=pages)
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
        row = model.measure(cr, batch=batch, context=context)
        if cr == 1:
            plain[batch] = row
        elif batch in plain:
            row |= {"ratio": plain[batch]["step_ms"] / row["step_ms"], "must_reach": 1.0}
        yield row

    def against_dense(batch: int) -> Iterator[Row]:
        dense, paged = (
            model.measure(1.0, batch=batch, context=context, make_context=make)
            for make in (DenseContext, PagedContext)
        )
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
        num_new = 8
        decisions = model.decisions(4.0, context + num_new)
        engine = filled_engine(
            model.loaded, decisions, context=context, batch=batch, num_new=num_new,
            num_pages=batch * model.heads * (-(-context // 2 // PAGE_SIZE) + 1),
        )  # fmt: skip
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
