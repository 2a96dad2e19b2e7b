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
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.bench import prefill_kernels
from megatron_dmc.bench.libraries import LIBRARIES, Absent, Library
from megatron_dmc.bench.measure import (
    Settings,
    Timing,
    against_copy,
    as_row,
    captured,
    copy_bandwidth,
    document,
    matrix_product_rate,
    measure_time,
    rows_of,
)
from megatron_dmc.bench.output import Case, Panel, Result, Row
from megatron_dmc.bench.prefill_kernels import PAGE_SIZE, groups_of, heads_of
from megatron_dmc.errors import DMCError
from megatron_dmc.ops import rope
from megatron_dmc.ops.backends import DECODE
from megatron_dmc.ops.paged import decode
from megatron_dmc.ops.paged.kv_pages import entry_bytes, parse_kv_cache_dtype
from megatron_dmc.ops.paged.layer_cache import LayerCache
from megatron_dmc.ops.testing import decode_case

logger = logging.getLogger(__name__)

SPREAD = 0.6
BYTES_OF_LAYERS = 256 << 20
"""Least total size of the layers of one measurement: several times a chip's cache."""
MAX_LAYERS = 32
CHECKED_REQUESTS = 4


@dataclass(frozen=True)
class Shape:
    """One decode step of a layer.

    Attributes:
        tokens: of each request; `tokens / cr` entries of a head on average.
        group: query heads of a KV head.
        skewed: heads differ in length.
    """

    batch: int
    cr: float
    group: int
    skewed: bool
    tokens: int
    num_heads: int
    head_dim: int

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads // self.group

    def lengths(self) -> Tensor:
        """Entries of every head (B, G), at most `tokens`."""
        shape, mean = (self.batch, self.num_kv_heads), self.tokens / self.cr
        if not self.skewed:
            return torch.full(shape, max(1, round(mean)))
        generator = torch.Generator().manual_seed(0)
        weights = (SPREAD * torch.randn(shape, generator=generator)).exp()
        return (mean * weights / weights.mean()).round().long().clamp(1, self.tokens)

    def attention_bytes(self, dtype: torch.dtype, cache_dtype: torch.dtype) -> int:
        """Keys and values of all entries, with their scales; queries and outputs."""
        entries = 2 * int(self.lengths().sum()) * entry_bytes(self.head_dim, cache_dtype)
        return entries + 2 * self.batch * self.num_heads * self.head_dim * dtype.itemsize

    def append_bytes(self, dtype: torch.dtype, cache_dtype: torch.dtype) -> int:
        """Queries read and written, key and value read and written, the open segment read and written."""
        dim, written = self.head_dim, 2 * entry_bytes(self.head_dim, cache_dtype)
        read = (2 * self.group + 2) * dim * dtype.itemsize
        return self.batch * self.num_kv_heads * (read + written + 2 * (2 * dim + 1) * 4)

    def columns(self) -> Row:
        """Columns of its rows."""
        names = ("tokens", "batch", "cr", "group", "skewed", "head_dim")
        return {name: getattr(self, name) for name in names}

    def __str__(self) -> str:
        heads = "skewed" if self.skewed else "equal"
        return f"B={self.batch} T={self.tokens} CR {self.cr:g} {self.group}:1 {heads}"


def backends(settings: Settings) -> list[str]:
    """Those that take these tensors; PyTorch only where nothing else runs."""
    dim = heads_of(settings)[1]
    like = torch.empty(0, dim, dtype=settings.dtype, device=settings.device)
    names = ("cuda", "triton") if settings.on_gpu else ("cpu",)
    return [name for name in names if not DECODE.refusal(name, like, PAGE_SIZE)] or ["torch"]


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


def _layers_of(settings: Settings, needed: int) -> int:
    """Number of layers of `needed` bytes that one measurement goes through."""
    return min(MAX_LAYERS, math.ceil(BYTES_OF_LAYERS / needed)) if settings.on_gpu else 1


def _time_of_layers(function: Callable[[], object], settings: Settings, num_layers: int) -> Timing:
    """A layer's share of one run."""
    timing = measure_time(captured(function, settings), settings.device, repeats=settings.repeats)
    return timing.share(num_layers)


def measure(
    settings: Settings, shape: Shape, bandwidth: float, backend: str,
    cache_dtype: torch.dtype | None = None, in_order: bool = False,
) -> list[Row]:  # fmt: skip
    """Rows for attention and append.

    Args:
        cache_dtype: what pages hold; None: the settings' dtype.
        in_order: pages lie in the pool as the heads come, not at random.

    Raises:
        DMCError: as `check`.
    """
    dtypes = (settings.dtype, cache_dtype or settings.dtype)
    needed = shape.attention_bytes(*dtypes)
    if settings.on_gpu and 1.5 * needed > torch.cuda.mem_get_info(settings.device)[0]:
        return [{"op": "attention", "variant": backend, "skipped": "does not fit into memory",
                 **shape.columns()}]  # fmt: skip
    lengths_BG, dim = shape.lengths(), shape.head_dim
    batch, num_kv_heads = lengths_BG.shape
    num_layers = _layers_of(settings, needed)
    # heads that append do so in every run, and once in the check
    room = math.ceil((settings.repeats + 11) / PAGE_SIZE) + 1
    make: dict[str, Any] = dict(dtype=settings.dtype, device=settings.device)
    caches = [
        decode_case.random_cache(
            lengths_BG, dim=dim, page_size=PAGE_SIZE, seed=layer, room=room,
            num_free=room * lengths_BG.numel(), cache_dtype=dtypes[1], in_order=in_order, **make,
        )
        for layer in range(num_layers)
    ]  # fmt: skip
    q, k, v = decode_case.random_heads(
        batch, [shape.num_heads, num_kv_heads, num_kv_heads], dim, seed=1, **make
    )
    errors = check(backend, q, k, v, caches[0])
    rows = torch.arange(batch, device=settings.device)
    entries_LRG = torch.stack([cache.num_entries_RG for cache in caches])
    # of standard normal logits as many are above this as tokens merge
    offset = statistics.NormalDist().inv_cdf(1 / shape.cr) if shape.cr > 1 else 1e4
    angles = torch.rand(batch, dim // 2, device=settings.device).repeat(1, 2)
    tables = rope.cosine_and_sine(angles, settings.dtype)

    def attend() -> None:
        plans = decode.plan_decode_attention(
            entries_LRG, rows, like=q, page_size=PAGE_SIZE, group=shape.group, ahead=1,
            backend=backend,
        )  # fmt: skip
        for cache, plan in zip(caches, plans, strict=True):
            decode.paged_decode_attention(
                cache, rows, q, softmax_scale=dim**-0.5, plan_Y=plan, backend=backend
            )

    def append() -> None:
        for cache in caches:
            decode.gate_and_append(
                cache, rows, q, k, v, tables, rows, alpha_offset=offset, backend=backend
            )

    result: list[Row] = []
    # attention first: append makes the caches longer
    for op, function, size in (
        ("attention", attend, needed),
        ("append", append, shape.append_bytes(*dtypes)),
    ):
        timing = _time_of_layers(function, settings, num_layers)
        columns = {"op": op, "variant": backend, **shape.columns(), "layers": num_layers}
        moved = against_copy(size, timing.median_ms, bandwidth)
        result.append(as_row(timing, **columns, errors=errors, **moved))
    for cache in caches:
        assert cache.free_pages is not None
        cache.free_pages.taken()  # raises if a head was left out: then less than a step was timed
    result[1]["time_over_attention"] = result[1]["median_ms"] / result[0]["median_ms"]
    return result


def measure_library(
    settings: Settings, shape: Shape, bandwidth: float, library: Library
) -> list[Row]:
    """Its attention's row; `skipped` says why it did not run."""
    row = {"op": "attention", "variant": library.name, **shape.columns()}
    try:
        row |= _library_figures(settings, shape, bandwidth, library)
    except Absent as e:
        row["skipped"] = str(e)
    except (DMCError, RuntimeError, TypeError, ValueError, AssertionError) as e:
        # another package's fault is a row, not the end of the run
        logger.info("%s failed", library.name, exc_info=True)
        row["skipped"] = "failed: " + f"{type(e).__name__}: {e}".splitlines()[0]
    return [row]


def _library_figures(settings: Settings, shape: Shape, bandwidth: float, library: Library) -> Row:
    make: dict[str, Any] = dict(dtype=settings.dtype, device=settings.device)
    lengths, dim = shape.lengths(), shape.head_dim
    size = shape.attention_bytes(settings.dtype, settings.dtype)
    num_layers = _layers_of(settings, size)

    def cache_of(lengths: Tensor, seed: int) -> LayerCache:
        return decode_case.random_cache(
            lengths, dim=dim, page_size=library.page_size, seed=seed, **make
        )

    (q,) = decode_case.random_heads(shape.batch, [shape.num_heads], dim, seed=1, **make)
    few = slice(CHECKED_REQUESTS)
    cache = cache_of(lengths[few], 0)
    error = decode_case.check_attention(
        lambda cache, rows, q, **_: library.make(q, cache)(), q[few], cache,
        torch.arange(len(q[few]), device=settings.device), softmax_scale=dim**-0.5,
    )  # fmt: skip
    layers = [library.make(q, cache_of(lengths, seed)) for seed in range(num_layers)]

    def attend() -> None:
        for layer in layers:
            layer()

    timing = _time_of_layers(attend, settings, num_layers)
    plan = getattr(layers[-1], "plan_ms", None)
    return as_row(
        timing, layers=num_layers, errors={"attention": error},
        **({} if plan is None else {"plan_ms": plan}),
        **against_copy(size, timing.median_ms, bandwidth),
    )  # fmt: skip


def cases(
    settings: Settings, shapes: Sequence[Shape], bandwidth: float, variants: Sequence[str],
    cache_dtype: torch.dtype | None = None, *, in_order: bool = False,
    others: Sequence[Library] = (),
) -> list[Case]:  # fmt: skip
    """K4 and K5 of every shape: of our back ends `variants`, then of the libraries `others`."""
    more = "" if cache_dtype in (None, settings.dtype) else ", 8-bit pages"
    more += ", pages in order" if in_order else ""
    found = []
    for shape in shapes:
        given = (settings, shape, bandwidth)
        for name in variants:
            run = functools.partial(measure, *given, name, cache_dtype, in_order)
            found.append(Case(f"{shape} {name}{more}", run))
        for library in others:
            run = functools.partial(measure_library, *given, library)
            found.append(Case(f"{shape} {library.name}", run))
    return found


def run(args: argparse.Namespace) -> Result:
    """`megatron-dmc bench kernels`."""
    settings = Settings.from_args(args, gpu=(4096,), cpu=(256,))
    batches = args.batches or ([1, 16, 64, 256] if settings.on_gpu else [2])
    crs = args.crs or ([1.0, 4.0, 8.0] if settings.on_gpu else [1.0, 4.0])
    prompts = args.prompts or ([4096, 32768] if settings.on_gpu else [512])
    for name, values in (("batches", batches), ("crs", crs), ("prompts", prompts)):
        if min(values) < 1:
            raise DMCError(f"--{name} {min(values):g}: use 1 or more")
    cache_dtype = parse_kv_cache_dtype(args.kv_cache_dtype) or settings.dtype
    is_plain = cache_dtype == settings.dtype
    shapes = [
        Shape(batch, cr, group, skewed, tokens, *heads_of(settings))
        for tokens, batch, cr, group, skewed
        in itertools.product(settings.lengths, batches, crs, groups_of(settings), (False, True))
    ]  # fmt: skip
    bandwidth, variants = copy_bandwidth(settings), backends(settings)
    others = LIBRARIES if is_plain else ()
    rows = rows_of(cases(settings, shapes, bandwidth, variants, cache_dtype, others=others))
    rate = matrix_product_rate(settings)
    if is_plain:  # 8-bit pages are prefilled by PyTorch
        given = (args.crs or [1.0, 2.0, 4.0, 8.0], variants, rate)
        rows += rows_of(prefill_kernels.cases(settings, prompts, *given))
    result = document(
        "kernels", settings, copy_bytes_per_second=bandwidth, product_per_second=rate,
        lengths=settings.lengths, prompts=prompts, page_size=PAGE_SIZE, spread=SPREAD,
        kv_cache_dtype=args.kv_cache_dtype, rows=rows,
    )  # fmt: skip
    shape = ("batch", "tokens", "cr", "group", "skewed", "variant")
    panels = [
        Panel(title, unit, [row for row in rows if row["op"] == op], column, shape)
        for op, title, unit, column in (
            ("attention", "Decode attention: bandwidth", "of a copy", "fraction_of_copy"),
            ("append", "Append, one layer", "ms", "median_ms"),
            ("prefill attention", "Attention of one prompt, one layer", "ms", "median_ms"),
            ("prefill", "Prefill of one prompt, one layer", "ms", "median_ms"),
        )
    ]
    return Result(result, settings.output, panels)
