"""The stages of `bench window` that need torch and Triton alone: ceilings, the kernels' cases, K1, K2, K4 to K6."""

import functools
import importlib
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from megatron_dmc.bench import decode_kernels as kernels
from megatron_dmc.bench import libraries
from megatron_dmc.bench.measure import Settings, copy_bandwidth, matrix_product_rate, release_memory
from megatron_dmc.bench.output import Row
from megatron_dmc.bench.prefill_kernels import prefill_backends, prefill_rows
from megatron_dmc.bench.train_kernels import bench_attention, bench_merge
from megatron_dmc.bench.window import ROOT
from megatron_dmc.bench.window_stages import Case, Child, read_rows
from megatron_dmc.errors import DMCError
from megatron_dmc.ops import cuda
from megatron_dmc.ops.paged.kv_pages import parse_kv_cache_dtype

TESTS = ROOT / "tests" / "support"
TRITON_FILES = ("decode", "pages", "prefill", "merge", "diagonal")
CUDA_FILES = ("decode", "pages", "prefill")


def settings_of(stage: Child, repeats: int) -> Settings:
    """bfloat16 on the GPU; on a CPU float32, and two runs."""
    if stage.cpu:
        return Settings(torch.device("cpu"), torch.float32, (), 2, None)
    if not torch.cuda.is_available():
        raise DMCError("there is no CUDA device; --cpu runs toy sizes")
    return Settings(torch.device("cuda", 0), torch.bfloat16, (), repeats, None)


# --- the machine ----------------------------------------------------------------------------------


def ceilings(stage: Child) -> None:
    """The machine, its CUDA extension, and two ceilings: a plain copy and a large matrix product."""
    settings = settings_of(stage, 20)

    def machine() -> Iterator[Row]:
        value = platform.processor() or platform.machine()
        row: Row = {"value": value, "torch": torch.__version__}
        if settings.on_gpu:
            properties = torch.cuda.get_device_properties(settings.device)
            row |= {
                "value": properties.name, "gpu": properties.name, "cuda": torch.version.cuda,
                "memory_bytes": properties.total_memory,
                "multiprocessors": properties.multi_processor_count,
            }  # fmt: skip
        yield row

    def extension() -> Iterator[Row]:
        if stage.cpu:
            yield {"outcome": "cpu", "reason": "needs a GPU"}
            return
        major, minor = torch.cuda.get_device_capability(settings.device)
        name = f"{major}.{minor}" + ("a" if major >= 9 else "")
        reason = cuda.absence()
        row = {"architecture": name, "value": "imports"}
        yield row | ({"outcome": "absent", "reason": reason} if reason else {})

    def rate(measure: Callable[[Settings], float], unit: str) -> Iterator[Row]:
        achieved = measure(settings)
        yield {"per_second": achieved, "value": achieved / 1e12, "unit": unit}

    stage.run([
        Case("machine", machine),
        Case("extension", extension),
        Case("copy", lambda: rate(copy_bandwidth, "TB/s, read and written")),
        Case("matrix product", lambda: rate(matrix_product_rate, "TFLOP/s")),
    ])  # fmt: skip


def ceiling(stage: Child, case: str, settings: Settings) -> float:
    """Bytes of a copy, or operations of a product, per second: the first stage's, or measured now."""
    for row in read_rows(stage.path):
        if row["stage"] == "ceilings" and row["case"] == case and row["outcome"] == "ok":
            return float(row["per_second"])
    measured = (copy_bandwidth if case == "copy" else matrix_product_rate)(settings)
    release_memory()
    return measured


def imports(name: str) -> bool:
    """Whether a package is there and loads."""
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


# --- the kernels' cases ---------------------------------------------------------------------------


class Reporter:
    """pytest's plugin: a row for every case when it has run."""

    def __init__(self, stage: Child):
        self.stage = stage
        self.announced: set[str] = set()

    def _announce(self, names: list[str]) -> None:
        if new := [name for name in names if name not in self.announced]:
            self.announced.update(new)
            self.stage.announce(new)

    def pytest_collection_finish(self, session: Any) -> None:
        self._announce([item.nodeid for item in session.items])

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            lines = str(report.longrepr).strip().splitlines()
            self.stage.row(report.nodeid or "collection", "failed", reason=lines[-1][:400])

    def pytest_runtest_setup(self, item: Any) -> None:
        import pytest

        if self.stage.is_late:
            pytest.skip("out of budget")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:
            return
        reason = {}
        if report.skipped:
            reason["reason"] = str(report.longrepr[2] if report.longrepr else "")[:400]
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = getattr(crash, "message", None) or str(report.longrepr)
            reason["reason"] = " ".join(text.split())[:400]
        outcome = {"passed": "ok"}.get(report.outcome, report.outcome)
        self.stage.row(report.nodeid, outcome, duration_s=round(report.duration, 3), **reason)


def _run_cases(stage: Child, files: tuple[str, ...], *arguments: str) -> None:
    """pytest in this process, so that rows come one by one; without the tests' own set-up, which wants more
    packages than a bare machine has."""
    if not TESTS.is_dir():
        raise DMCError(f"no folder {TESTS}: the cases are in the source tree; run from a checkout")
    if not imports("pytest"):
        raise DMCError("pytest is not installed: the kernels' cases did not run")
    import pytest

    def collected(self: Reporter, node: Any, ids: list[str]) -> None:
        self._announce(ids)

    # pytest-xdist's, where it is there: the cases are collected in its processes
    hook = pytest.hookimpl(optionalhook=True)(collected)
    Reporter.pytest_xdist_node_collection_finished = hook  # type: ignore[attr-defined]
    reporter = Reporter(stage)
    os.chdir(TESTS)
    sys.path.insert(0, str(TESTS))
    status = pytest.main(
        [
            *(f"kernel_cases_{name}.py" for name in files), *arguments, "-q", "--tb=short",
            "-p", "no:cacheprovider", "--noconftest", "-c", os.devnull, "--rootdir", str(TESTS),
        ],
        plugins=[reporter],
    )  # fmt: skip
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise DMCError(f"pytest ended with {status!r}")


def cuda_cases(stage: Child) -> None:
    """All cases of the extension, one after the other; nothing is compiled. On a CPU some of PyTorch's."""
    if stage.cpu:
        os.environ["DMC_TESTED_BACKEND"] = "torch"
        _run_cases(stage, ("decode", "pages"), "-k", "equals_the_specification and not (96 or 128)")
        return
    if reason := cuda.absence():
        stage.row("all cases", "skipped", reason=reason)
        return
    os.environ |= {
        "DMC_TESTED_BACKEND": "cuda", "DMC_LARGE_CASES": "1", "TRITON_INTERPRET": "0",
    }  # fmt: skip
    _run_cases(stage, CUDA_FILES)


def triton_cases(stage: Child) -> None:
    """The small set, compiled in eight processes where pytest-xdist is there."""
    if stage.cpu:
        _run_cases(stage, ("decode", "pages", "merge"), "-k", "taken_pages or workers or gradient")
        return
    os.environ |= {
        "DMC_TESTED_BACKEND": "triton", "DMC_LARGE_CASES": "0", "TRITON_INTERPRET": "0",
    }  # fmt: skip
    _run_cases(stage, TRITON_FILES, *(("-p", "xdist", "-n", "8") if imports("xdist") else ()))


# --- K4 and K5 ------------------------------------------------------------------------------------

# requests, CR, query heads of a KV head, skewed
DECODE_SHAPES = [
    (1, 1.0, 1, False), (1, 4.0, 1, True), (1, 1.0, 8, False), (1, 4.0, 8, True),
    (64, 1.0, 1, False), (64, 4.0, 1, False), (64, 4.0, 1, True), (64, 8.0, 1, True),
    (64, 4.0, 8, True), (256, 4.0, 1, True), (256, 8.0, 8, True), (256, 1.0, 8, False),
]  # fmt: skip
LARGE_POOL = (256, 1.0, 1, False)
"""256 x 32 heads x 4096 tokens x 128 channels: twice 2^31 elements of keys, and as many of values."""


def decode_kernels(stage: Child) -> None:
    """A dozen shapes, other libraries, 8-bit pages, and a large pool in two orders of its pages."""
    settings = settings_of(stage, 20)
    heads, dim, tokens = (4, 64, 64) if stage.cpu else (32, 128, 4096)
    shapes = [(2, 4.0, 4, True)] if stage.cpu else DECODE_SHAPES
    chosen = kernels.backends(settings, dim)
    bandwidth = ceiling(stage, "copy", settings)
    # padded attention computes with every slot: no contender where there is another
    names = [x.name for x in libraries.LIBRARIES if stage.cpu or x.name != "torch SDPA"]

    def measure(
        backend: str, batch: int, cr: float, group: int, skewed: bool,
        cache_dtype: str = "auto", in_order: bool = False,
    ) -> Iterator[Row]:  # fmt: skip
        lengths = kernels.head_lengths(batch, heads // group, tokens, cr, skewed=skewed)
        stored = parse_kv_cache_dtype(cache_dtype) or settings.dtype
        columns = dict(tokens=tokens, batch=batch, cr=cr, group=group, skewed=skewed)
        yield from kernels.measure(
            settings, backend, lengths, group, dim, cr, bandwidth, columns, stored, in_order
        )

    def beside(batch: int, cr: float, group: int, skewed: bool) -> Iterator[Row]:
        lengths = kernels.head_lengths(batch, heads // group, tokens, cr, skewed=skewed)
        needed = kernels.attention_bytes(lengths, group, dim, settings.dtype, settings.dtype)
        for row in libraries.measure(
            settings, lengths, group, dim, num_layers=kernels.layers_of(settings, needed),
            bytes_needed=needed, bandwidth=bandwidth, columns={}, names=names,
        ):  # fmt: skip
            reason = row.pop("skipped", None)
            if reason is not None:
                row |= {"reason": reason}
                row["outcome"] = "failed" if reason.startswith("failed") else "absent"
            yield row

    def label(batch: int, cr: float, group: int, skewed: bool, more: str = "") -> str:
        return f"B={batch} CR {cr:g} {group}:1 {'skewed' if skewed else 'equal'}{more}"

    cases = []
    for shape in shapes:
        # the first one is what the engine would take
        cases.append(Case(label(*shape), functools.partial(measure, chosen[0], *shape)))
        cases.append(Case(label(*shape, ", libraries"), functools.partial(beside, *shape)))
    some = shapes[-1] if stage.cpu else (64, 4.0, 1, True)
    cases += [
        Case(
            label(*some, ", 8-bit pages"),
            functools.partial(measure, chosen[0], *some, cache_dtype="fp8"),
        ),
        *(
            Case(label(*some, f", {name}"), functools.partial(measure, name, *some))
            for name in chosen[1:]
        ),
    ]
    large = some if stage.cpu else LARGE_POOL
    for order in ("in order", "at random"):
        run = functools.partial(measure, chosen[0], *large, in_order=order == "in order")
        cases.append(Case(label(*large, f", large pool, pages {order}"), run))
    stage.run(cases)


# --- K1, K2, K6 -----------------------------------------------------------------------------------


def train_kernels(stage: Child) -> None:
    """K1 and K2: merge, and training attention against the stock kernel."""
    settings = settings_of(stage, 20)
    bandwidth = ceiling(stage, "copy", settings)
    quiet = tqdm(disable=True)

    def merge(length: int) -> Iterator[Row]:
        of_length = replace(settings, lengths=(length,))
        return bench_merge(of_length, bandwidth, quiet, alternatives=False)

    def attention(length: int) -> Iterator[Row]:
        return bench_attention(replace(settings, lengths=(length,)), quiet, alternatives=False)

    lengths = (32,) if stage.cpu else (4096, 8192)
    stage.run([
        Case(f"K1 merge, T={lengths[0]}", functools.partial(merge, lengths[0])),
        *(Case(f"K2 attention, T={n}", functools.partial(attention, n)) for n in lengths),
    ])  # fmt: skip


def prefill_kernels(stage: Child) -> None:
    """K6: attention and the whole op, without DMC and at CR 4, in every back end."""
    settings = settings_of(stage, 10)
    heads, dim = (4, 64) if stage.cpu else (32, 128)
    rate = ceiling(stage, "matrix product", settings)

    def prompt(length: int, group: int, backend: str) -> Iterator[Row]:
        return prefill_rows(settings, [length], [4.0], heads, dim, (group,), [backend], rate)

    lengths, groups = ((40,), (4,)) if stage.cpu else ((4096, 32768), (1, 8))
    stage.run([
        Case(f"T={n} {group}:1 {backend}", functools.partial(prompt, n, group, backend))
        for backend in prefill_backends(kernels.backends(settings, dim)) for n in lengths
        for group in groups
    ])  # fmt: skip
