"""Decode throughput over a long paged cache at several CRs, in one engine (C2; on a GPU a step to E1, E3).

Regime: `LLMEngine` with a random model, every request with `--lengths` tokens in its cache. The cache
is filled with random entries, not computed; the model's merge decisions are replaced by given ones, with
the heads' rates spread evenly between half and one and a half times the mean. Each step is the engine's
whole step: schedule, model, append, attention, sampling, page accounting. The CRs take turns step by
step, so that what else happens on the machine hits all alike. Metric: tokens per second from the median
step, beside CR 1 and beside the bandwidth of a copy. Before timing, decode attention over the filled
cache is compared with the specification.

Dimension letters: L layers, T tokens, G key/value heads, N query heads, D head dim.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

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


class ImposedDecisions:
    """Which tokens each head appends: token t where `floor((t + 1) rate) > floor(t rate)`."""

    def __init__(self, num_layers: int, num_kv_heads: int, cr: float):
        heads = torch.linspace(-SPREAD, SPREAD, num_layers * num_kv_heads, dtype=torch.float64)
        if cr == 1 or len(heads) == 1:
            heads = torch.zeros_like(heads)
        self.rate_LG = (1 + heads).view(num_layers, num_kv_heads) / cr

    def num_entries(self, num_tokens: int) -> Tensor:
        """Entries of each head after so many tokens, int64 (L, G)."""
        return (num_tokens * self.rate_LG).floor().long().clamp_min(1)

    def is_merge(self, layer: int, positions_T: Tensor) -> Tensor:
        """Decisions about tokens at these positions, bool (T, G)."""
        t = positions_T[:, None].double()
        self.rate_LG = self.rate_LG.to(t.device)  # once: a CUDA graph takes nothing from the host
        rate = self.rate_LG[layer]
        return ((t + 1) * rate).floor() <= (t * rate).floor()


class _ImposingContext:
    """The engine's context, but the keys' borrowed channel says what was imposed."""

    def __init__(self, context: Any, decisions: ImposedDecisions, positions_T: Tensor):
        self._context, self._decisions, self._positions = context, decisions, positions_T

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def attend(self, layer_index: int, q_TND, k_TGD, v_TGD, freqs_SF, *, softmax_scale) -> Tensor:
        is_merge = self._decisions.is_merge(layer_index, self._positions)
        k_TGD = k_TGD.clone()
        k_TGD[..., -1] = torch.where(is_merge, 100.0, -100.0).to(k_TGD.dtype)
        return self._context.attend(
            layer_index, q_TND, k_TGD, v_TGD, freqs_SF, softmax_scale=softmax_scale
        )


class _ImposingModel(torch.nn.Module):
    """A model whose attention layers decide as they are told."""

    def __init__(self, model: torch.nn.Module, decisions: ImposedDecisions):
        super().__init__()
        self.model, self.decisions = model, decisions

    def forward(self, *, position_ids: Tensor, inference_context: Any, **kwargs: Any) -> Tensor:
        context = _ImposingContext(inference_context, self.decisions, position_ids[0])
        return self.model(position_ids=position_ids, inference_context=context, **kwargs)


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
    decisions = ImposedDecisions(description.num_layers, description.num_query_groups, cr)
    per_request = int((-(-decisions.num_entries(context + num_new) // page_size)).sum()) + heads
    one_uncompressed = heads * -(-(context + num_new) // page_size)
    engine = LLMEngine(
        _ImposingModel(model, decisions), description, None,
        EngineConfig(
            max_model_len=context + num_new + 1, page_size=page_size, max_num_seqs=batch,
            kv_cache_dtype=kv_cache_dtype, num_pages=batch * per_request + one_uncompressed, count_flipped_decisions=False,
        ),
        dtype=settings.dtype, device=settings.device,
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
        tables.fill_row(request.row, decisions.num_entries(context - 1))
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
    if crs[0] < 1 or args.batch < 1:
        raise DMCError("--crs must be at least 1 and --batch positive")
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
