"""Decode throughput over a long paged cache at several CRs, in one engine (C2; on a GPU a step to E1, E3).

Regime: `LLMEngine` with a random model, every request with `--lengths` tokens in its cache, which is filled
(`bench.filled`); merge decisions are imposed (`bench.imposed`), with the part of its tokens that a head appends
spread evenly between half and one and a half times the mean. CR 1 is the engine without DMC. All engines have as
many pages as CR 1 needs. On a CPU they take turns step by step; on a GPU they follow one another, as
their caches do not fit together. Metric: tokens per second from the median step, compared with CR 1 and with the
bandwidth of a copy. Before timing, decode attention over the filled cache is compared with the specification.

Dimension letters: L layers, G key/value heads.
"""

import argparse
from typing import Any

import torch

from megatron_dmc.bench.cost import Ceilings
from megatron_dmc.bench.filled import PAGE_SIZE, WARMUP, check, figures, filled_engine, time_steps
from megatron_dmc.bench.imposed import ImposedDecisions
from megatron_dmc.bench.measure import Settings, document, release_memory
from megatron_dmc.bench.model_under_test import random_model
from megatron_dmc.bench.output import Panel, Result
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.errors import DMCError

SPREAD = 0.5


def impose(num_layers: int, num_kv_heads: int, cr: float, num_tokens: int) -> ImposedDecisions:
    """Decisions whose heads' rates are spread evenly around their mean."""
    heads = torch.linspace(1 - SPREAD, 1 + SPREAD, num_layers * num_kv_heads, dtype=torch.float64)
    return ImposedDecisions.of(heads.view(num_layers, -1), cr, num_tokens=num_tokens)


def describe(settings: Settings, num_layers: int | None, length: int) -> ModelDescription:
    """Llama-2-7B's shape, with other layers if so asked; on a CPU narrower, with its head dimension."""
    wide = settings.on_gpu
    return ModelDescription(
        num_layers=num_layers or (32 if wide else 2),
        hidden_size=4096 if wide else 512,
        ffn_hidden_size=11008 if wide else 1376,
        num_attention_heads=32 if wide else 4,
        num_query_groups=32 if wide else 4,
        kv_channels=128,
        vocab_size=32000 if wide else 1024,
        max_position_embeddings=length,
        dtype=settings.dtype,
    )


def run(args: argparse.Namespace) -> Result:
    """Run the benchmark."""
    settings = Settings.from_args(args, gpu=(4096,), cpu=(8192,))
    crs = sorted(set(args.crs) | {1.0})
    if crs[0] < 1:
        raise DMCError(f"--crs {crs[0]:g}: use 1 or more")
    if args.batch < 1:
        raise DMCError(f"--batch {args.batch}: use 1 or more")
    ceilings = Ceilings.measure(settings)
    num_new = settings.repeats + WARMUP + 1
    rows: list[dict[str, Any]] = []
    for context in settings.lengths:
        loaded = random_model(
            describe(settings, args.layers, context + num_new + 1), settings.device
        )
        d = loaded.description
        heads = d.num_layers * d.num_query_groups
        together = [[cr] for cr in crs] if settings.on_gpu else [crs]
        for group in together:
            decisions = [
                impose(d.num_layers, d.num_query_groups, cr, context) if cr > 1 else None
                for cr in group
            ]
            engines = [
                filled_engine(
                    loaded, imposed, context=context, batch=args.batch, num_new=num_new,
                    num_pages=args.batch * heads * -(-(context + num_new) // PAGE_SIZE),
                    kv_cache_dtype=args.kv_cache_dtype,
                )
                for imposed in decisions
            ]  # fmt: skip
            errors = [check(engine) for engine in engines]
            times = time_steps(engines, repeats=settings.repeats, label=f"{context} tokens")
            for engine, of_engine, imposed, error in zip(
                engines, times, decisions, errors, strict=True
            ):
                row = figures(loaded, engine, of_engine, ceilings, imposed)
                achieved = row["cache_bytes_per_second"]
                rows.append({
                    "context": context, "batch": args.batch, **row,
                    "fraction_of_copy": achieved / ceilings.bytes_per_second, "error": error,
                })  # fmt: skip
            del engines, engine
            release_memory()
    for row in rows:
        plain = next(r for r in rows if r["context"] == row["context"] and r["cr"] == 1)
        row["speedup"] = row["tokens_per_second"] / plain["tokens_per_second"]
    shape = {
        "layers": d.num_layers, "hidden": d.hidden_size, "query_heads": d.num_attention_heads,
        "kv_heads": d.num_query_groups, "head_dim": d.kv_channels, "page_size": PAGE_SIZE,
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
        "decode", settings, model=shape, copy_bytes_per_second=ceilings.bytes_per_second, rows=rows
    )
    return Result(result, settings.output, panels)
