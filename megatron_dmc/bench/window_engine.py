"""The stages of `bench window` that run the model: the engine's checks, E1 to E3, E7, K3, a profile.

Llama-2-7B's shape with random weights, made on the GPU. Caches are filled, not prefilled (`bench.decode_step`), CR 1 like
the others; merge decisions are imposed. On a CPU a model of two layers.
"""

import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.bench import decode_step
from megatron_dmc.bench import train_step as training
from megatron_dmc.bench.baselines import DenseContext
from megatron_dmc.bench.decode_step import PAGE_SIZE, filled_engine, make_engine
from megatron_dmc.bench.imposed import ImposedDecisions, spread_weights
from megatron_dmc.bench.measure import Ceilings, release_memory, synchronize
from megatron_dmc.bench.model_under_test import random_model, requests_that_fit
from megatron_dmc.bench.output import Case, Row
from megatron_dmc.bench.suite import E1_MUST_REACH, E7_MUST_REACH
from megatron_dmc.bench.window_kernels import ceiling, settings_of
from megatron_dmc.bench.window_stages import Child
from megatron_dmc.checkpoint.load import LoadedModel
from megatron_dmc.engine import LLMEngine, SamplingParams
from megatron_dmc.engine.context import PagedContext
from megatron_dmc.engine.graphs import Captured
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


# --- checks ---------------------------------------------------------------------------------------


def _run_again(work: Callable[[], Tensor]) -> Captured:
    """In place of a graph, where there is no GPU."""
    output = work()
    return Captured(lambda: output.copy_(work()), output)


def engine_checks(stage: Child) -> None:
    """A model of two layers: captured steps against eager ones, from prefill on; a step under sync-debug."""
    model = WindowModel(stage, num_layers=2)
    num_prompt, num_new = (12, 6) if stage.cpu else (100, 24)

    def engine(cr: float, batch: int, size: int | None) -> LLMEngine:
        """With decode steps captured for `size` requests, or none."""
        decisions = model.decisions(cr, num_prompt + num_new)
        made = make_engine(
            model.loaded, decisions, max_model_len=num_prompt + num_new,
            max_num_seqs=max(batch, size or 0),
            cudagraph_capture_sizes=[size] if size else [],
        )  # fmt: skip
        if stage.cpu and size is not None:
            made.runner.capture([size], _run_again, progress=False)
        if size is not None and made.runner._graphs is None:
            raise DMCError("no decode steps were captured: the cache ops run in PyTorch")
        return made

    def generate(made: LLMEngine, batch: int, **params: Any) -> tuple[list[list[int]], Tensor]:
        """Tokens of each request, and the logits of the first step in which all decode."""
        logits: list[Tensor] = []
        run = made.runner.run

        def recorded(*args: Any, **kwargs: Any) -> Tensor:
            out = run(*args, **kwargs)
            logits.append(out.clone())
            return out

        made.runner.run = recorded  # type: ignore[method-assign]
        _add_requests(made, batch, num_prompt, num_new, **params)
        tokens: dict[str, list[int]] = {}
        while made.has_unfinished_requests:
            for output in made.step():
                tokens[output.request_id] = output.outputs[0].token_ids
        made.check_integrity()
        return [tokens[str(i)] for i in range(batch)], logits[1]

    def captured_equals_eager(cr: float, batch: int, size: int) -> Iterator[Row]:
        (wanted, exact), (ours, found) = (
            generate(engine(cr, batch, captured), batch) for captured in (None, size)
        )
        error = ((found - exact).float().norm() / exact.float().norm()).item()
        row = {"tokens": sum(map(len, wanted)), "error": error}
        # padded to another size the products may be summed in another order
        if ours != wanted if size == batch else not error < 0.02:
            pairs = zip(ours, wanted, strict=True)
            same = sum(a == b for x, y in pairs for a, b in zip(x, y, strict=False))
            raise DMCError(
                f"captured and eager steps differ: {same} of {row['tokens']} tokens are the same, the first "
                f"step's logits are {error:.1e} apart"
            )
        yield row

    def without_waiting(**params: Any) -> Iterator[Row]:
        if stage.cpu:
            yield {"outcome": "cpu", "reason": "needs a GPU"}
            return
        made = engine(4.0, 8, 8)
        _add_requests(made, 8, num_prompt, num_new, **params)
        for _ in range(4):
            made.step()
        synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            outputs = made.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield {"tokens": len(outputs)}

    stage.run([
        *(
            Case(
                f"captured, CR {cr:g} B={batch}" + (f" padded to {size}" if size != batch else ""),
                functools.partial(captured_equals_eager, cr, batch, size),
            )
            for cr in (1.0, 4.0) for batch, size in ((1, 1), (2, 2), (8, 8), (3, 4))
        ),
        Case("sync-debug, greedy", functools.partial(without_waiting, temperature=0)),
        Case(
            "sync-debug, sampled",
            functools.partial(without_waiting, temperature=0.7, top_p=0.9, top_k=50, seed=1),
        ),
    ])  # fmt: skip


def _add_requests(
    engine: LLMEngine, batch: int, num_prompt: int, num_new: int, **params: Any
) -> None:
    rng = random.Random(0)
    options = SamplingParams(
        **{"temperature": 0, "max_tokens": num_new, "ignore_eos": True, **params}
    )
    for i in range(batch):
        tokens = [rng.randrange(engine.description.vocab_size) for _ in range(num_prompt)]
        engine.add_request(str(i), tokens, options)


# --- K3, profile ----------------------------------------------------------------------------------


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
