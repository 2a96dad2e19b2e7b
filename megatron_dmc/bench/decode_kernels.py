"""The kernels of the cache: decode attention over ragged pages (K4), append (K5), and prefill (K6), which
`bench.prefill_kernels` describes.

Regime: one decode step of a layer, page 16, D = 128, 32 query heads (on a CPU less), caches that a
request of T tokens has at a given CR; heads equally long, or spread as exp(0.6 x), x normal, with the
same total except for heads cut off at T. On a GPU enough layers to fill the caches of the chip several
times are captured into one CUDA graph with one plan for all, and a layer's share of a replay is reported.
Metric: median milliseconds; bytes that must move over the bandwidth of a plain copy on the same machine; for
append also the time over attention's. The libraries of `bench.libraries` run on the same data. The kernels are
compared with the specification before they are timed.

Dimension letters as in `ops.paged.decode`.
"""

import argparse
import functools
import itertools
import math
import statistics
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_dmc.bench import libraries
from megatron_dmc.bench.measure import (
    Settings,
    against_copy,
    as_row,
    captured,
    copy_bandwidth,
    document,
    matrix_product_rate,
    measure_time,
)
from megatron_dmc.bench.output import Panel, Result
from megatron_dmc.bench.prefill_kernels import (
    PAGE_SIZE,
    prefill_backends,
    prefill_panel,
    prefill_rows,
)
from megatron_dmc.errors import DMCError
from megatron_dmc.ops import rope
from megatron_dmc.ops.backends import DECODE
from megatron_dmc.ops.paged import decode
from megatron_dmc.ops.paged.kv_pages import entry_bytes, parse_kv_cache_dtype
from megatron_dmc.ops.paged.layer_cache import LayerCache
from megatron_dmc.ops.testing import decode_case

SPREAD = 0.6
BYTES_OF_LAYERS = 256 << 20
"""Least total size of the layers of one measurement: several times a chip's cache."""
MAX_LAYERS = 32
CHECKED_REQUESTS = 4


def head_lengths(batch: int, num_kv_heads: int, tokens: int, cr: float, *, skewed: bool) -> Tensor:
    """Entries of every head, about `tokens / cr` on average and at most `tokens`."""
    mean = tokens / cr
    if not skewed:
        return torch.full((batch, num_kv_heads), max(1, round(mean)))
    generator = torch.Generator().manual_seed(0)
    weights = (SPREAD * torch.randn(batch, num_kv_heads, generator=generator)).exp()
    return (mean * weights / weights.mean()).round().long().clamp(1, tokens)


def attention_bytes(
    lengths_BG: Tensor, group: int, dim: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> int:
    """Keys and values of all entries, with their scales; queries and outputs."""
    entries = 2 * int(lengths_BG.sum()) * entry_bytes(dim, cache_dtype)
    return entries + 2 * lengths_BG.numel() * group * dim * dtype.itemsize


def append_bytes(
    heads: int, group: int, dim: int, dtype: torch.dtype, cache_dtype: torch.dtype
) -> int:
    """Queries read and written, key and value read and written, the open segment read and written."""
    written = 2 * entry_bytes(dim, cache_dtype)
    return heads * ((2 * group + 2) * dim * dtype.itemsize + written + 2 * (2 * dim + 1) * 4)


def backends(settings: Settings, dim: int) -> list[str]:
    """Those that take these tensors; PyTorch only where nothing else runs."""
    like = torch.empty(0, dim, dtype=settings.dtype, device=settings.device)
    names = ("cuda", "triton") if settings.on_gpu else ("cpu",)
    return [name for name in names if not DECODE.refusal(name, like, PAGE_SIZE)] or ["torch"]


def layers_of(settings: Settings, needed: int) -> int:
    """Number of layers of `needed` bytes that one measurement goes through."""
    return min(MAX_LAYERS, math.ceil(BYTES_OF_LAYERS / needed)) if settings.on_gpu else 1


def check(
    backend: str, q_BND: Tensor, k_BGD: Tensor, v_BGD: Tensor, cache: LayerCache
) -> dict[str, float]:
    """Errors of a backend's attention, for the last four requests, and append, for all of them, on the
    cache that is timed, which becomes one token longer.

    Raises:
        DMCError: a result is wrong: nothing may be timed.
    """
    batch, _, dim = q_BND.shape
    rows, last = torch.arange(batch, device=q_BND.device), slice(-CHECKED_REQUESTS, None)
    error = decode_case.check_attention(
        functools.partial(decode.paged_decode_attention, backend=backend),
        q_BND, cache, rows, softmax_scale=dim**-0.5, checked=last,
    )  # fmt: skip
    angles = torch.rand(batch, dim // 2, device=q_BND.device).repeat(1, 2)
    errors = decode_case.check_append(
        functools.partial(decode.gate_and_append, backend=backend),
        [x[last] for x in (q_BND, k_BGD, v_BGD)], angles, rows[last], cache.of_rows(last),
        rows[:CHECKED_REQUESTS], alpha_offset=0.0,
    )  # fmt: skip
    return {"attention": error, **{f"append, {name}": e for name, e in errors.items()}}


def measure(
    settings: Settings, backend: str, lengths_BG: Tensor, group: int, dim: int, cr: float,
    bandwidth: float, columns: dict[str, Any], cache_dtype: torch.dtype, in_order: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows for attention and append.

    Args:
        in_order: pages lie in the pool as the heads come, not at random.

    Raises:
        DMCError: as `check`.
    """
    batch, num_kv_heads = lengths_BG.shape
    dtypes = (settings.dtype, cache_dtype)
    needed = attention_bytes(lengths_BG, group, dim, *dtypes)
    num_layers = layers_of(settings, needed)
    # heads that append do so in every run, and once in the check
    room = math.ceil((settings.repeats + 11) / PAGE_SIZE) + 1
    make: dict[str, Any] = dict(dtype=settings.dtype, device=settings.device)
    caches = [
        decode_case.random_cache(
            lengths_BG, dim=dim, page_size=PAGE_SIZE, seed=layer, room=room,
            num_free=room * lengths_BG.numel(), cache_dtype=cache_dtype, in_order=in_order, **make,
        )
        for layer in range(num_layers)
    ]  # fmt: skip
    q, k, v = decode_case.random_heads(
        batch, [num_kv_heads * group, num_kv_heads, num_kv_heads], dim, seed=1, **make
    )
    errors = check(backend, q, k, v, caches[0])
    rows = torch.arange(batch, device=settings.device)
    entries_LRG = torch.stack([cache.num_entries_RG for cache in caches])
    # of standard normal logits as many are above this as tokens merge
    offset = statistics.NormalDist().inv_cdf(1 / cr) if cr > 1 else 1e4
    angles = torch.rand(batch, dim // 2, device=settings.device).repeat(1, 2)
    tables = rope.cosine_and_sine(angles, settings.dtype)

    def attend() -> None:
        plans = decode.plan_decode_attention(
            entries_LRG, rows, like=q, page_size=PAGE_SIZE, group=group, ahead=1, backend=backend
        )
        for cache, plan in zip(caches, plans, strict=True):
            decode.paged_decode_attention(
                cache, rows, q, softmax_scale=dim**-0.5, plan_Y=plan, backend=backend
            )

    def append() -> None:
        for cache in caches:
            decode.gate_and_append(
                cache, rows, q, k, v, tables, rows, alpha_offset=offset, backend=backend
            )

    result = []
    # attention first: append makes the caches longer
    for op, function, size in (
        ("attention", attend, needed),
        ("append", append, append_bytes(lengths_BG.numel(), group, dim, *dtypes)),
    ):
        timing = measure_time(
            captured(function, settings), settings.device, repeats=settings.repeats
        ).share(num_layers)
        row = as_row(timing, op=op, variant=backend, **columns, layers=num_layers, errors=errors)
        result.append(row | against_copy(size, timing.median_ms, bandwidth))
    for cache in caches:
        assert cache.free_pages is not None
        cache.free_pages.taken()  # raises if a head was left out: then less than a step was timed
    result[1]["time_over_attention"] = result[1]["median_ms"] / result[0]["median_ms"]
    return result


def panels(rows: list[dict[str, Any]], bandwidth: float) -> list[Panel]:
    """The plot: one bar for each shape."""

    def label(r: dict[str, Any]) -> str:
        heads = "skewed" if r["skewed"] else "equal"
        return (
            f"B={r['batch']} T={r['tokens']} CR {r['cr']:g} {r['group']}:1 {heads} {r['variant']}"
        )

    attention = [
        (label(r), r["bytes_per_second"] / 1e9, r["variant"] in ("cuda", "triton"))
        for r in rows if r["op"] == "attention" and "skipped" not in r
    ]  # fmt: skip
    append = [
        (label(r), r["median_ms"] * 1e3, r["variant"] != "torch")
        for r in rows if r["op"] == "append"
    ]  # fmt: skip
    return [
        Panel(
            "Decode attention: bytes that it must move, per second", "GB/s",
            [*attention, ("a plain copy", bandwidth / 1e9, False)],
        ),
        Panel("Append, one layer", "µs", append or [("nothing measured", 0.0, False)]),
    ]  # fmt: skip


def run(args: argparse.Namespace) -> Result:
    """`megatron-dmc bench kernels`."""
    settings = Settings.from_args(args, gpu=(4096,), cpu=(256,))
    batches = args.batches or ([1, 16, 64, 256] if settings.on_gpu else [2])
    crs = args.crs or ([1.0, 4.0, 8.0] if settings.on_gpu else [1.0, 4.0])
    for name, values in (("batches", batches), ("crs", crs), ("prompts", args.prompts or [1])):
        if min(values) < 1:
            raise DMCError(f"--{name} {min(values):g}: use 1 or more")
    cache_dtype = parse_kv_cache_dtype(args.kv_cache_dtype) or settings.dtype
    heads, dim = (32, 128) if settings.on_gpu else (4, 64)
    bandwidth = copy_bandwidth(settings)
    groups = (1, 8) if settings.on_gpu else (1, 4)
    chosen = backends(settings, dim)
    cases = list(itertools.product(settings.lengths, batches, crs, groups, (False, True), chosen))
    rows: list[dict[str, Any]] = []
    for tokens, batch, cr, group, skewed, backend in tqdm(cases, disable=None, leave=False):
        columns = dict(tokens=tokens, batch=batch, cr=cr, group=group, skewed=skewed, head_dim=dim)
        lengths = head_lengths(batch, heads // group, tokens, cr, skewed=skewed)
        needed = attention_bytes(lengths, group, dim, settings.dtype, cache_dtype)
        if settings.on_gpu and 1.5 * needed > torch.cuda.mem_get_info(settings.device)[0]:
            rows.append({"op": "attention", "skipped": "does not fit into memory", **columns})
            continue
        rows += measure(settings, backend, lengths, group, dim, cr, bandwidth, columns, cache_dtype)
        if backend == chosen[-1] and cache_dtype == settings.dtype:
            rows += libraries.measure(
                settings, lengths, group, dim, num_layers=layers_of(settings, needed),
                bytes_needed=needed, bandwidth=bandwidth, columns=columns,
            )  # fmt: skip
    prompts = args.prompts or ([4096, 32768] if settings.on_gpu else [512])
    prefill_crs = args.crs or [1.0, 2.0, 4.0, 8.0]
    rate = matrix_product_rate(settings)
    prefilled: list[dict[str, Any]] = []
    if cache_dtype == settings.dtype:  # 8-bit pages are prefilled by PyTorch
        prefilled = list(prefill_rows(
            settings, prompts, prefill_crs, heads, dim, groups, prefill_backends(chosen), rate
        ))  # fmt: skip
    result = document(
        "kernels", settings, copy_bytes_per_second=bandwidth, product_per_second=rate,
        lengths=settings.lengths, prompts=prompts, page_size=PAGE_SIZE, spread=SPREAD,
        kv_cache_dtype=args.kv_cache_dtype, rows=rows + prefilled,
    )  # fmt: skip
    drawn = [*panels(rows, bandwidth), *([prefill_panel(prefilled)] if prefilled else [])]
    return Result(result, settings.output, drawn)
