"""Engines whose requests begin in the middle: their caches are filled with random entries instead of prefilled.

What a request's heads hold is drawn as the imposed decisions would have left it. CR 1 is the engine without DMC.
A step is timed whole: schedule, model, append, attention, sampling, page accounting.

Dimension letters: L layers, G key/value heads.
"""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from megatron_dmc.bench.cost import Ceilings, ModelCost
from megatron_dmc.bench.dense import DenseContext
from megatron_dmc.bench.engine_run import synchronize
from megatron_dmc.bench.imposed import ImposedDecisions, ImposingContext
from megatron_dmc.bench.output import Row
from megatron_dmc.checkpoint.load import LoadedModel
from megatron_dmc.config import DMCConfig
from megatron_dmc.engine import EngineConfig, LLMEngine, SamplingParams
from megatron_dmc.engine.config import KVCacheDtype
from megatron_dmc.engine.context import PagedContext
from megatron_dmc.engine.request import RequestStatus
from megatron_dmc.errors import DMCError
from megatron_dmc.ops import gates
from megatron_dmc.ops.paged import decode, kv_pages
from megatron_dmc.ops.testing import decode_case

PAGE_SIZE = 16
WARMUP = 3
CHECKED_REQUESTS = 4
_AT_ONCE = 1 << 20


def make_engine(
    loaded: LoadedModel,
    decisions: ImposedDecisions | None,
    *,
    max_model_len: int,
    max_num_seqs: int,
    num_pages: int,
    kv_cache_dtype: KVCacheDtype = "auto",
    make_context: Callable[..., PagedContext] = PagedContext,
    cudagraph_capture_sizes: Sequence[int] | None = None,
) -> LLMEngine:
    """An engine without requests.

    Args:
        loaded: a plain model, on the device of the engine.
        decisions: None: CR 1, without DMC.
        make_context: of an engine without decisions.
        cudagraph_capture_sizes: empty: decode steps are eager; None: `max_num_seqs` alone.
    """
    parameter = next(loaded.model.parameters())
    description = replace(loaded.description, dmc=None)
    sizes = [max_num_seqs] if cudagraph_capture_sizes is None else cudagraph_capture_sizes
    config = EngineConfig(
        max_model_len=max_model_len, num_pages=num_pages, block_size=PAGE_SIZE,
        kv_cache_dtype=kv_cache_dtype, max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(2048, max_num_seqs), count_flipped_decisions=False,
        cudagraph_capture_sizes=sizes or None, enforce_eager=not sizes,
    )  # fmt: skip
    if decisions is not None:
        description.dmc = DMCConfig(stage="finetune", target_cr=decisions.cr)
        make_context = functools.partial(
            ImposingContext, decisions=decisions,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )  # fmt: skip
    return LLMEngine(
        loaded.model, description, None, config, dtype=parameter.dtype,
        make_context=make_context,
    )  # fmt: skip


def filled_engine(
    loaded: LoadedModel,
    decisions: ImposedDecisions | None,
    *,
    context: int,
    batch: int,
    num_new: int,
    **options: Any,
) -> LLMEngine:
    """An engine in which `batch` requests have `context` tokens and decode from there, `num_new` at most.

    Args:
        options: as `make_engine`.
    """
    engine = make_engine(
        loaded, decisions, max_model_len=context + num_new + 1, max_num_seqs=batch, **options
    )
    description = engine.description
    _fill_pages(engine.context)
    generator = torch.Generator().manual_seed(0)
    params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True)
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
    return engine


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
    checked = slice(-CHECKED_REQUESTS, None)
    if isinstance(context, DenseContext):
        return context.check(q, rows, tables.num_entries_LRG[0, rows, 0] - 1, checked)
    return decode_case.check_attention(
        decode.paged_decode_attention, q, tables.layer(0), rows,
        softmax_scale=d.kv_channels**-0.5, checked=checked,
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
    stats, seconds = engine.stats(), statistics.median(times)
    ordered, batch = sorted(times), len(engine.scheduler.running)
    cost = ModelCost.of(loaded.model, engine.description, stats.entry_bytes)
    entries = sum(map(sum, stats.running_entries_LG))
    floor = ceilings.floor(cost, batch, entries)
    assert stats.measured_cr is not None
    cr = 1.0 if decisions is None else decisions.cr
    allowed = 0.0 if decisions is None else decisions.tolerance(batch) + 1 / decisions.num_tokens
    if abs(stats.measured_cr / cr - 1) > allowed:
        raise DMCError(f"CR {stats.measured_cr:.3f} was measured where {cr:g} was imposed")
    row: dict[str, Any] = {
        "cr": cr,
        "measured_cr": stats.measured_cr,
        "batch_size": batch,
        "step_ms": 1e3 * seconds,
        "p10_ms": 1e3 * ordered[len(ordered) // 10],
        "p90_ms": 1e3 * ordered[-1 - len(ordered) // 10],
        "tokens_per_second": batch / seconds,
        "weight_bytes": cost.weight_bytes,
        "live_bytes": entries * stats.entry_bytes,
        "cache_bytes_per_second": entries * stats.entry_bytes / seconds,
        "memory_floor_ms": 1e3 * floor["memory"],
        "arithmetic_floor_ms": 1e3 * floor["arithmetic"],
        "fraction_of_roofline": floor["roofline"] / seconds,
        "fragmentation": stats.fragmentation,
        "num_pages": stats.num_pages,
    }
    return row
