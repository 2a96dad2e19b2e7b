"""Whole decode steps of engines whose requests begin in the middle, their caches filled with random entries instead of
prefilled: `megatron-dmc bench decode` (C2; on a GPU a step to E1, E3), and E1 to E3 and E7 of `bench window`.

Regime: `LLMEngine` with a random model, every request with the same number of tokens in its cache; merge decisions are
imposed (`engine.imposed`), and a request's heads hold what they would have left. CR 1 is the engine without DMC. `bench
decode` spreads the part of its tokens that a head appends evenly between half and one and a half times the mean, and
gives all engines the pages that CR 1 needs. On a CPU they take turns step by step; on a GPU they follow one another, as
their caches do not fit together. Metric: a step is timed whole (schedule, model, append, attention, sampling, page
accounting); tokens per second from the median step, compared with CR 1 and with the bandwidth of a copy. Before timing,
decode attention over the filled cache is compared with the specification.

Dimension letters: L layers, G key/value heads.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from megatron_dmc.bench.baselines import DenseContext
from megatron_dmc.bench.measure import (
    Ceilings,
    ModelCost,
    Settings,
    Timing,
    document,
    release_memory,
    synchronize,
)
from megatron_dmc.bench.model_under_test import ModelUnderTest, Point, llama2_7b, random_model
from megatron_dmc.bench.output import Panel, Result, Row
from megatron_dmc.checkpoint.load import LoadedModel
from megatron_dmc.engine import LLMEngine, SamplingParams
from megatron_dmc.engine.context import PagedContext
from megatron_dmc.engine.imposed import EVEN_SPREAD, ImposedDecisions, even_weights
from megatron_dmc.engine.request import RequestStatus
from megatron_dmc.errors import DMCError
from megatron_dmc.ops import gates
from megatron_dmc.ops.paged import decode, kv_pages
from megatron_dmc.ops.testing import decode_case

PAGE_SIZE = 16
ENGINE_SETTINGS: dict[str, Any] = {
    "block_size": PAGE_SIZE, "max_num_batched_tokens": 2048, "count_flipped_decisions": False,
}  # fmt: skip
WARMUP = 3
CHECKED_REQUESTS = 4
_AT_ONCE = 1 << 20


def filled_engine(
    tested: ModelUnderTest, point: Point, **options: Any
) -> tuple[LLMEngine, ImposedDecisions | None]:
    """An engine whose requests have the point's `input_len` tokens and decode from there, `output_len` at most.

    Args:
        options: of `ModelUnderTest.engine`.
    """
    batch, context = point.max_num_seqs, point.input_len
    assert batch is not None
    llm, decisions = tested.engine(point, cudagraph_capture_sizes=[batch], **options)
    engine, description = llm.engine, tested.description
    _fill_pages(engine.context)
    generator = torch.Generator().manual_seed(0)
    params = SamplingParams(temperature=0, max_tokens=point.output_len, ignore_eos=True)
    for i in range(batch):
        tokens = torch.randint(0, description.vocab_size, (context,), generator=generator)
        engine.add_request(str(i), tokens.tolist(), params)
    shape = (description.num_layers, description.num_query_groups)
    scheduler = engine.scheduler
    for request in list(scheduler.waiting):
        # the last token is the one that the first step computes
        appended_LG = torch.full(shape, context - 2.0, dtype=torch.float64)
        if decisions is not None:
            appended_LG = torch.binomial(appended_LG, decisions.rate_LG, generator=generator)
        engine.context.start(request, use_prefix=False)
        assert request.row is not None
        engine.context.tables.fill_row(request.row, 1 + appended_LG.long())
        request.num_computed_tokens = context - 1
        request.status = RequestStatus.RUNNING
        scheduler.waiting.remove(request)
        scheduler.running.append(request)
    if engine.context.store.segments is not None:
        engine.context.store.segments.state_LRGUA.uniform_(0.1, 1.0)
    return engine, decisions


def _fill_pages(context: PagedContext) -> None:
    if isinstance(context, DenseContext):
        for x in (context.k_LPSD, context.v_LPSD):
            x.normal_()
        return
    pool = context.pool
    device = kv_pages.tensors_of(pool.k_pages_PSD)[0].device
    slots, dim = pool.num_pages * pool.page_size, pool.k_pages_PSD.shape[-1]
    for pages in (pool.k_pages_PSD, pool.v_pages_PSD):
        for first in range(0, slots, _AT_ONCE):
            some = torch.arange(first, min(first + _AT_ONCE, slots), device=device)
            x = torch.randn(len(some), dim, device=device)
            if pages is pool.k_pages_PSD and context.rule is not None:
                gates.borrowed(x).zero_()
            kv_pages.store(pages, some, x)


def check(engine: LLMEngine) -> float:
    """Relative error of decode attention over the first layer's cache, for the last four requests, whose
    pages alone are widened.

    Raises:
        DMCError: it is wrong: nothing may be timed.
    """
    context, d = engine.context, engine.description
    tables = context.tables
    device = tables.num_entries_LRG.device
    rows = torch.tensor([request.row for request in engine.scheduler.running], device=device)
    dtype = next(engine.runner.model.parameters()).dtype
    (q,) = decode_case.random_heads(
        len(rows), [d.num_attention_heads], d.kv_channels, dtype=dtype, device=device, seed=1
    )
    if context.rule is not None:
        gates.borrowed(q).zero_()
    attend: Callable[..., torch.Tensor] = decode.paged_decode_attention
    cache = tables.layer(0)
    if isinstance(context, DenseContext):
        attend, cache = context.attend_in_first_layer, context.layer(0)
    return decode_case.check_attention(
        attend, q, cache, rows, softmax_scale=d.kv_channels**-0.5,
        checked=slice(-CHECKED_REQUESTS, None),
    )  # fmt: skip


def time_steps(
    engines: Sequence[LLMEngine], *, repeats: int, warmup: int = WARMUP, label: str = ""
) -> list[list[float]]:
    """Seconds of each engine's steps after the warm-up; the engines take turns, so that what else happens
    on the machine hits all alike.

    Raises:
        DMCError: a step left a request out.
    """
    times: list[list[float]] = [[] for _ in engines]
    for step in tqdm(range(warmup + repeats), desc=label, unit="step", disable=None, leave=False):
        for engine, of_engine in zip(engines, times, strict=True):
            batch = len(engine.scheduler.running)
            synchronize()
            began = time.perf_counter()
            outputs = engine.step()
            synchronize()
            seconds = time.perf_counter() - began
            # with asynchronous scheduling the first call only launches
            if step and len(outputs) != batch or engine.scheduler.num_preemptions:
                raise DMCError(
                    f"a step decoded {len(outputs)} of {batch} requests: the cache is too small"
                )
            if step >= warmup:
                of_engine.append(seconds)
    return times


def figures(
    loaded: LoadedModel,
    engine: LLMEngine,
    times: Sequence[float],
    ceilings: Ceilings,
    decisions: ImposedDecisions | None,
) -> Row:
    """Achieved and attainable figures from the median step; live bytes are those after the last one.

    Raises:
        DMCError: the measured CR is not the imposed one.
    """
    stats, timing = engine.stats(), Timing.of([1e3 * seconds for seconds in times])
    seconds, batch = timing.median_ms / 1e3, len(engine.scheduler.running)
    cost = ModelCost.of(loaded.model, engine.description, stats.entry_bytes)
    entries = sum(map(sum, stats.running_entries_LG))
    floor = ceilings.floor(cost, batch, entries)
    assert stats.measured_cr is not None
    if decisions is not None:
        decisions.check(stats.measured_cr, batch, more=1 / decisions.num_tokens)
    return {
        "cr": 1.0 if decisions is None else decisions.cr, "measured_cr": stats.measured_cr, "batch_size": batch, "step_ms": timing.median_ms,
        "p10_ms": timing.p10_ms, "p90_ms": timing.p90_ms, "tokens_per_second": batch / seconds,
        "weight_bytes": cost.weight_bytes, "live_bytes": entries * stats.entry_bytes,
        "cache_bytes_per_second": entries * stats.entry_bytes / seconds,
        "memory_floor_ms": 1e3 * floor["memory"],
        "arithmetic_floor_ms": 1e3 * floor["arithmetic"],
        "fraction_of_roofline": floor["roofline"] / seconds,
        "fragmentation": stats.fragmentation, "num_pages": stats.num_pages,
    }  # fmt: skip


def measure(
    tested: ModelUnderTest,
    points: Sequence[Point],
    ceilings: Ceilings,
    *,
    repeats: int,
    warmup: int = WARMUP,
    **options: Any,
) -> list[Row]:
    """A row for each point. Their engines are in memory together, are checked first, and take turns.

    Args:
        options: of `ModelUnderTest.engine`.

    Raises:
        DMCError: attention is wrong, the cache is too small, or the measured CR is not the imposed one.
    """
    filled = [filled_engine(tested, point, **options) for point in points]
    engines = [engine for engine, _ in filled]
    errors = [check(engine) for engine in engines]
    label = f"{points[0].input_len} tokens"
    times = time_steps(engines, repeats=repeats, warmup=warmup, label=label)
    rows = [
        {
            "context": point.input_len,
            **figures(tested.loaded, engine, of_engine, ceilings, decisions),
            "error": error,
        }
        for point, (engine, decisions), of_engine, error in zip(
            points, filled, times, errors, strict=True
        )
    ]
    del filled, engines
    release_memory()
    return rows


def random_llama(settings: Settings, num_layers: int | None, length: int) -> LoadedModel:
    """Llama-2-7B's shape, with other layers if so asked; on a CPU narrower, with its head dimension."""
    description = llama2_7b(
        settings, num_layers=num_layers or (32 if settings.on_gpu else 2), length=length,
        hidden_size=512, ffn_hidden_size=1376, num_attention_heads=4, num_query_groups=4,
        vocab_size=1024,
    )  # fmt: skip
    return random_model(description, settings.device)


def run(args: argparse.Namespace) -> Result:
    """`megatron-dmc bench decode`."""
    settings = Settings.from_args(args, gpu=(4096,), cpu=(8192,))
    crs = sorted(set(args.crs) | {1.0})
    for flag, least in (("crs", crs[0]), ("batch", args.batch)):
        if least < 1:
            raise DMCError(f"--{flag} {least:g}: use 1 or more")
    ceilings = Ceilings.measure(settings)
    rows: list[Row] = []
    num_new = settings.repeats + WARMUP + 1
    for context in settings.lengths:
        loaded = random_llama(settings, args.layers, context + num_new)
        d = loaded.description
        points = [Point(cr, args.batch, context, num_new) for cr in crs]
        tested = ModelUnderTest(
            loaded, ENGINE_SETTINGS | {"kv_cache_dtype": args.kv_cache_dtype},
            even_weights(d.num_layers, d.num_query_groups),
        )  # fmt: skip
        tested.settings["num_pages"] = tested.pages_of(points[0])
        of_context: list[Row] = []
        for together in [[point] for point in points] if settings.on_gpu else [points]:
            of_context += measure(tested, together, ceilings, repeats=settings.repeats)
        for row in of_context:
            row |= {
                "batch": args.batch,
                "fraction_of_copy": row["cache_bytes_per_second"] / ceilings.bytes_per_second,
                "speedup": row["tokens_per_second"] / of_context[0]["tokens_per_second"],
            }
        rows += of_context
    shape = {
        "layers": d.num_layers, "hidden": d.hidden_size, "query_heads": d.num_attention_heads,
        "kv_heads": d.num_query_groups, "head_dim": d.kv_channels, "page_size": PAGE_SIZE,
        "kv_cache_dtype": args.kv_cache_dtype, "spread_of_rates": EVEN_SPREAD,
    }  # fmt: skip
    result = document(
        "decode", settings, model=shape, copy_bytes_per_second=ceilings.bytes_per_second, rows=rows
    )
    panel = Panel("Decode", "tokens/s", rows, "tokens_per_second", ("context", "batch", "cr"))
    return Result(result, settings.output, [panel])
