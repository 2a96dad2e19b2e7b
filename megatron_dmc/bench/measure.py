"""Settings, timing, ceilings, the document of a benchmark, and the cost that a model states.

Bytes of a decode step: every weight but the token embedding's table once (of that a row per request), and key and value
of every live entry once. Its floor is these bytes over the bandwidth of a plain copy on the same machine, or the
arithmetic over the rate of a large matrix product, whichever is longer. Activations, logits, block tables and open
segments come on top and are not counted.
"""

import argparse
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_dmc import __version__
from megatron_dmc.bench.output import Case, Row
from megatron_dmc.engine.graphs import CudaGraphs
from megatron_dmc.errors import DMCError


@dataclass(frozen=True)
class Settings:
    """A benchmark's common arguments, with their defaults filled in."""

    device: torch.device
    dtype: torch.dtype
    lengths: tuple[int, ...]
    repeats: int
    output: Path | None

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @classmethod
    def from_args(
        cls, args: argparse.Namespace, *, gpu: Sequence[int], cpu: Sequence[int]
    ) -> "Settings":
        """Fill in; `gpu` and `cpu` are the default lengths.

        Raises:
            DMCError: the device is not here, or a number is not positive.
        """
        try:
            device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except RuntimeError as e:
            raise DMCError(f"--device {args.device}: {e}") from e
        if device.type not in ("cpu", "cuda"):
            raise DMCError(f"--device {args.device}: use cpu or cuda")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise DMCError(f"--device {args.device}: there is no CUDA device; use --device cpu")
        on_gpu = device.type == "cuda"
        lengths = tuple(args.lengths or (gpu if on_gpu else cpu))
        repeats = args.repeats or (50 if on_gpu else 5)
        if min(lengths) < 2:
            raise DMCError(f"--lengths {min(lengths)}: use 2 or more")
        if repeats < 1:
            raise DMCError(f"--repeats {repeats}: use 1 or more")
        output = Path(args.output) if args.output else None
        return cls(device, getattr(torch, args.dtype), lengths, repeats, output)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one run: median and spread of many."""

    median_ms: float
    p10_ms: float
    p90_ms: float

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> "Timing":
        """Of these runs."""
        times = sorted(times_ms)
        tenth = len(times) // 10
        return cls(statistics.median(times), times[tenth], times[-1 - tenth])

    def share(self, count: int) -> "Timing":
        """One of `count` equal parts of the run."""
        return Timing(self.median_ms / count, self.p10_ms / count, self.p90_ms / count)


def measure_time(
    function: Callable[[], object], device: torch.device, *, repeats: int, warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:  # fmt: skip
    """Time `function` by CUDA events, or on a CPU by `clock`, in seconds.

    The data of a run must be larger than the cache, or already be in it in real use.
    """
    for _ in range(warmup):
        function()
    if device.type == "cuda":
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(repeats)
        ]
        torch.cuda.synchronize(device)
        for start, end in events:
            start.record()
            function()
            end.record()
        torch.cuda.synchronize(device)
        times = [start.elapsed_time(end) for start, end in events]
    else:
        times = []
        for _ in range(repeats):
            begin = clock()
            function()
            times.append(1e3 * (clock() - begin))
    return Timing.of(times)


def captured(function: Callable[[], object], settings: Settings) -> Callable[[], object]:
    """On a GPU the function's replay from a CUDA graph."""
    if not settings.on_gpu:
        return function
    work = cast(Callable[[], Tensor], function)  # its output is not used
    return CudaGraphs(settings.device)(work).replay


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(function: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `function` adds at its peak; None on a CPU, where they are not counted."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def release_memory() -> None:
    """Give what the allocator keeps back to the GPU: the next cache is sized by what is free."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def copy_bandwidth(settings: Settings, clock: Callable[[], float] = time.perf_counter) -> float:
    """Bytes per second of a large copy on the device, read and written bytes both counted."""
    size = (1 << 30) if settings.on_gpu else (1 << 26)
    source = torch.empty(size, dtype=torch.uint8, device=settings.device).random_()
    target = torch.empty_like(source)
    timing = measure_time(
        lambda: target.copy_(source), settings.device, repeats=max(settings.repeats, 5), clock=clock
    )
    return 2 * size / (timing.median_ms / 1e3)


def matrix_product_rate(settings: Settings) -> float:
    """Floating-point operations per second of a large square matrix product in the settings' dtype."""
    size = 8192 if settings.on_gpu else 512
    a, b = (torch.randn(size, size, device=settings.device, dtype=settings.dtype) for _ in range(2))
    timing = measure_time(lambda: a @ b, settings.device, repeats=max(settings.repeats, 5))
    return 2 * size**3 / (timing.median_ms / 1e3)


def document(name: str, settings: Settings, **content: Any) -> Row:
    """The JSON document: which machine, which versions, which settings, and the content."""
    gpu = torch.cuda.get_device_name(settings.device) if settings.on_gpu else None
    return {
        "benchmark": name,
        "version": __version__,
        "gpu": gpu,
        "cpu_threads": None if gpu else torch.get_num_threads(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "repeats": settings.repeats,
        "arguments": sys.argv[1:],
        "note": None if gpu else "small shapes on a CPU: they say nothing about a GPU",
        **content,
    }


def rows_of(cases: Sequence[Case]) -> list[Row]:
    """Run the cases in order, under a progress bar."""
    rows: list[Row] = []
    with tqdm(cases, disable=None, leave=False) as bar:
        for case in bar:
            bar.set_description(case.name)
            rows += case.run()
    return rows


def against_copy(num_bytes: int, median_ms: float, bandwidth: float) -> Row:
    """Columns of what must move `num_bytes`: the bytes per second, and the part of a copy's."""
    achieved = num_bytes / (median_ms / 1e3)
    return {
        "bytes_needed": num_bytes,
        "bytes_per_second": achieved,
        "fraction_of_copy": achieved / bandwidth,
    }


def as_row(timing: Timing, **columns: Any) -> Row:
    """A row of results."""
    return {**columns, **asdict(timing)}


@dataclass(frozen=True)
class ModelCost:
    """Cost of decoding with a model, or with one rank's share of it."""

    weight_bytes: int
    """Read in every step."""
    entry_bytes: int
    """Key and value of one entry of one KV head."""
    flops_per_token: int
    """Products with weights."""
    flops_per_entry: int
    """Scores and weighted values of one entry, of all the query heads of its group."""
    num_heads: int
    """KV heads over all layers."""

    @classmethod
    def of(cls, model: torch.nn.Module, description: Any, entry_bytes: int) -> "ModelCost":
        """Count a model's parameters.

        Args:
            model: GPTModel.
            description: `num_layers, num_attention_heads, num_query_groups, kv_channels,
                share_embeddings_and_output_weights`.
            entry_bytes: as the cache stores them.
        """
        weight_bytes = flops = 0
        for name, parameter in model.named_parameters():
            if "word_embeddings" in name and not description.share_embeddings_and_output_weights:
                continue
            weight_bytes += parameter.numel() * parameter.element_size()
            flops += 2 * parameter.numel() if parameter.ndim == 2 else 0
        group = description.num_attention_heads // description.num_query_groups
        return cls(
            weight_bytes,
            entry_bytes,
            flops,
            4 * description.kv_channels * group,
            description.num_layers * description.num_query_groups,
        )

    def step_bytes(self, live_entries: float) -> float:
        """Bytes of a decode step over `live_entries`, of all heads and requests together."""
        return self.weight_bytes + live_entries * self.entry_bytes

    def step_flops(self, num_requests: int, live_entries: float) -> float:
        """Floating-point operations of the same."""
        return num_requests * self.flops_per_token + live_entries * self.flops_per_entry


@dataclass(frozen=True)
class Ceilings:
    """The machine's ceilings, measured in this run."""

    bytes_per_second: float
    """A plain copy, bytes read and bytes written both counted."""
    flops_per_second: float
    """A large square matrix product in the model's dtype."""

    @classmethod
    def measure(cls, settings: Settings) -> "Ceilings":
        """Time the copy and the product, and release their memory."""
        ceilings = cls(copy_bandwidth(settings), matrix_product_rate(settings))
        release_memory()
        return ceilings

    def floor(self, cost: ModelCost, num_requests: int, live_entries: float) -> dict[str, float]:
        """Seconds that a decode step takes at least: `memory`, `arithmetic`, and the longer, `roofline`."""
        memory = cost.step_bytes(live_entries) / self.bytes_per_second
        arithmetic = cost.step_flops(num_requests, live_entries) / self.flops_per_second
        return {"memory": memory, "arithmetic": arithmetic, "roofline": max(memory, arithmetic)}
