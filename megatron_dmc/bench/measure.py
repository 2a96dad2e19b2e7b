"""Settings, timing, ceilings, and the document of a benchmark."""

import argparse
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_dmc import __version__
from megatron_dmc.bench.output import Row
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

    def share(self, count: int) -> "Timing":
        """One of `count` equal parts of the run."""
        return Timing(self.median_ms / count, self.p10_ms / count, self.p90_ms / count)


def measure_time(
    function: Callable[[], object], device: torch.device, *, repeats: int, warmup: int = 3
) -> Timing:
    """Time `function` by CUDA events, or the wall clock on a CPU.

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
            begin = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - begin))
    times.sort()
    return Timing(statistics.median(times), times[len(times) // 10], times[-1 - len(times) // 10])


def captured(function: Callable[[], object], settings: Settings) -> Callable[[], object]:
    """On a GPU the function's replay from a CUDA graph."""
    if not settings.on_gpu:
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


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


def copy_bandwidth(settings: Settings) -> float:
    """Bytes per second of a large copy on the device, read and written bytes both counted."""
    size = (1 << 30) if settings.on_gpu else (1 << 26)
    source = torch.empty(size, dtype=torch.uint8, device=settings.device).random_()
    target = torch.empty_like(source)
    timing = measure_time(
        lambda: target.copy_(source), settings.device, repeats=max(settings.repeats, 5)
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
