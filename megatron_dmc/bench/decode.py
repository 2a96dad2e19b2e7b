"""Decode throughput over a long paged cache at several CRs, in one engine (C2; on a GPU a step to E1, E3).

Regime: `LLMEngine` with a random model, every request with `--lengths` tokens in its cache. The cache
is filled with random entries, not computed; merge decisions are imposed (`bench.imposed`), with the part of
its tokens that a head appends spread evenly between half and one and a half times the mean. Each step is the engine's
whole step: schedule, model, append, attention, sampling, page accounting. The CRs take turns step by
step, so that what else happens on the machine hits all alike. Metric: tokens per second from the median
step, beside CR 1 and beside the bandwidth of a copy. Before timing, decode attention over the filled
cache is compared with the specification.

Dimension letters: L layers, G key/value heads.
"""

import argparse
import functools
import statistics
import time
from typing import Any

import torch
from tqdm import tqdm

from megatron_dmc.bench.imposed import ImposedDecisions, ImposingContext
from megatron_dmc.bench.measure import (
    Panel,
    Settings,
    copy_bandwidth,
    document,
    errors_within_twice_the_yardstick,
    finish,
)
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.config import DMCConfig
from megatron_dmc.engine import EngineConfig, LLMEngine, SamplingParams
from megatron_dmc.engine.request import RequestStatus
from megatron_dmc.errors import DMCError
from megatron_dmc.models import build_model
from megatron_dmc.ops import cache_ops, kv_pages, reference

SPREAD = 0.5
WARMUP = 3


def impose(num_layers: int, num_kv_heads: int, cr: float, num_tokens: int) -> ImposedDecisions:
    """Decisions whose heads' rates are spread evenly around their mean."""
    heads = torch.linspace(1 - SPREAD, 1 + SPREAD, num_layers * num_kv_heads, dtype=torch.float64)
    return ImposedDecisions.of(heads.view(num_layers, -1), cr, num_tokens=num_tokens)


def describe(settings: Settings, args: argparse.Namespace, length: int) -> ModelDescription:
    """Llama-2-7B's shape with `--layers` layers; on a CPU narrower, with its head dimension."""
    wide = settings.on_gpu
    return ModelDescription(
        num_layers=args.layers or (32 if wide else 2),
        hidden_size=4096 if wide else 512,
        ffn_hidden_size=11008 if wide else 1376,
        num_attention_heads=32 if wide else 4,
        num_query_groups=32 if wide else 4,
        kv_channels=128,
        vocab_size=32000 if wide else 1024,
        max_position_embeddings=length,
        dtype=settings.dtype,
    )


def filled_engine(
    model: torch.nn.Module,
    description: ModelDescription,
    settings: Settings,
    *,
    cr: float,
    context: int,
    batch: int,
    num_new: int,
    kv_cache_dtype: str = "auto",
) -> LLMEngine:
    """An engine in which `batch` requests have `context` tokens in the cache and decode from there."""
    heads, page_size = description.num_layers * description.num_query_groups, 16
    decisions = impose(description.num_layers, description.num_query_groups, cr, context)
    # what the hash draws above its mean is within a page for each head
    most = decisions.expected_entries(context + num_new).ceil().long()
    per_request = int((-(-most // page_size)).sum()) + heads
    one_uncompressed = heads * -(-(context + num_new) // page_size)
    engine = LLMEngine(
        model, description, None,
        config := EngineConfig(
            max_model_len=context + num_new + 1, page_size=page_size, max_num_seqs=batch,
            kv_cache_dtype=kv_cache_dtype, num_pages=batch * per_request + one_uncompressed, count_flipped_decisions=False,
        ),
        dtype=settings.dtype, device=settings.device,
        make_context=functools.partial(
            ImposingContext, decisions=decisions,
            max_num_batched_tokens=config.max_num_batched_tokens,
        ),
    )  # fmt: skip
    tables, scheduler = engine.context.tables, engine.scheduler
    params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(batch):
        tokens = torch.randint(0, description.vocab_size, (context,), generator=generator)
        engine.add_request(str(i), tokens.tolist(), params)
    for request in list(scheduler.waiting):
        engine.context.start(request, use_prefix=False)
        assert request.row is not None
        entries_LG = decisions.expected_entries(context - 1).round().long()
        tables.fill_row(request.row, entries_LG)
        request.num_computed_tokens = context - 1
        request.status = RequestStatus.RUNNING
        scheduler.waiting.remove(request)
        scheduler.running.append(request)
    pool = engine.context.pool
    for pages in (pool.k_pages_PSD, pool.v_pages_PSD):
        slots = torch.arange(pool.num_pages * pool.page_size, device=settings.device)
        for some in slots.split(1 << 20):
            x = torch.randn(len(some), description.kv_channels, device=settings.device)
            if pages is pool.k_pages_PSD:
                x[:, -1] = 0.0
            kv_pages.store(pages, some, x)
    assert engine.context.segments is not None
    engine.context.segments.state_LRGUA.uniform_(0.1, 1.0)
    return engine


def check(engine: LLMEngine, settings: Settings) -> float:
    """Decode attention over the first layer's cache against the specification: its relative error."""
    tables, pool = engine.context.tables, engine.context.pool
    rows = [r.row for r in engine.scheduler.running]
    table, entries = tables.page_ids_LRGM[0, rows], tables.num_entries_LRG[0, rows]
    d = engine.description
    q = torch.randn(
        len(rows),
        d.num_attention_heads,
        d.kv_channels,
        dtype=settings.dtype,
        device=settings.device,
    )
    q[..., -1] = 0.0
    scale = d.kv_channels**-0.5
    cache = (pool.k_pages_PSD, pool.v_pages_PSD)
    ours = cache_ops.paged_decode_attention(q, *cache, table, entries, softmax_scale=scale)
    pages = torch.arange(pool.num_pages, device=settings.device)
    exact, honest = (
        reference.paged_decode_attention(
            q.to(dtype), kv_pages.load(cache[0], pages, dtype), kv_pages.load(cache[1], pages, dtype),
            table, entries, softmax_scale=scale,
        )
        for dtype in (torch.float64, q.dtype)
    )  # fmt: skip
    return errors_within_twice_the_yardstick(["attention"], [ours], [exact], [honest])["attention"]


def run(args: argparse.Namespace) -> int:
    """Run the benchmark."""
    settings = Settings.from_args(args, gpu=(4096,), cpu=(8192,))
    crs = sorted(set(args.crs) | {1.0})
    if crs[0] < 1:
        raise DMCError(f"--crs {crs[0]:g}: use 1 or more")
    if args.batch < 1:
        raise DMCError(f"--batch {args.batch}: use 1 or more")
    bandwidth = copy_bandwidth(settings)
    num_steps = settings.repeats + WARMUP
    rows: list[dict[str, Any]] = []
    for context in settings.lengths:
        description = describe(settings, args, context + num_steps + 2)
        dmc = DMCConfig(stage="finetune", target_cr=max(max(crs), 2.0))
        description.dmc = dmc
        model = build_model(description, dmc=dmc, device=settings.device)
        generator = torch.Generator(device=settings.device).manual_seed(1)
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
        engines: dict[float, tuple[LLMEngine, float, list[float]]] = {}
        for cr in crs:
            engine = filled_engine(
                model, description, settings, cr=cr, context=context, batch=args.batch,
                num_new=num_steps + 1, kv_cache_dtype=args.kv_cache_dtype,
            )  # fmt: skip
            engines[cr] = (engine, check(engine, settings), [])
        for step in tqdm(range(num_steps), desc=f"{context} tokens", unit="step", disable=None):
            for engine, _, times in engines.values():
                if settings.on_gpu:
                    torch.cuda.synchronize(settings.device)
                began = time.perf_counter()
                outputs = engine.step()
                if settings.on_gpu:
                    torch.cuda.synchronize(settings.device)
                if len(outputs) != args.batch:
                    raise DMCError("a request was not decoded: the cache is too small")
                if step >= WARMUP:
                    times.append(time.perf_counter() - began)
        for cr, (engine, error, times) in engines.items():
            stats = engine.stats()
            assert stats.measured_cr is not None
            if abs(stats.measured_cr / cr - 1) > 0.02:
                raise DMCError(f"CR {stats.measured_cr:.3f} was measured where {cr} was imposed")
            seconds = statistics.median(times)
            live = sum(map(sum, stats.running_entries_LG)) * stats.entry_bytes
            rows.append({
                "context": context, "cr": cr, "measured_cr": stats.measured_cr,
                "batch": args.batch, "step_ms": 1e3 * seconds,
                "tokens_per_second": args.batch / seconds, "live_bytes": live,
                "cache_bytes_per_second": live / seconds,
                "fraction_of_copy": live / seconds / bandwidth,
                "fragmentation": stats.fragmentation, "error": error,
            })  # fmt: skip
    for row in rows:
        plain = next(r for r in rows if r["context"] == row["context"] and r["cr"] == 1)
        row["speedup"] = row["tokens_per_second"] / plain["tokens_per_second"]
    shape = {
        "layers": description.num_layers, "hidden": description.hidden_size,
        "query_heads": description.num_attention_heads, "kv_heads": description.num_query_groups,
        "head_dim": description.kv_channels, "page_size": 16,
        "kv_cache_dtype": args.kv_cache_dtype, "spread_of_rates": SPREAD,
    }  # fmt: skip
    panels = [
        Panel(
            f"Decode, {context} tokens of context, batch {args.batch}", "tokens/s",
            [(f"CR {r['cr']:g}", r["tokens_per_second"], r["cr"] > 1)
             for r in rows if r["context"] == context],
        )
        for context in settings.lengths
    ]  # fmt: skip
    result = document(
        "decode", settings, model=shape, copy_bytes_per_second=bandwidth, rows=rows
    )  # fmt: skip
    return finish(result, panels, settings)
