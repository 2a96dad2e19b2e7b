"""The stages of `bench window` that need torch and Triton alone: ceilings, the kernels' cases, K1, K2, K4 to K6."""

import functools
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_dmc.bench import decode_kernels as decode
from megatron_dmc.bench import libraries
from megatron_dmc.bench import prefill_kernels as prefill
from megatron_dmc.bench import train_kernels as training
from megatron_dmc.bench.measure import Settings, copy_bandwidth, matrix_product_rate, release_memory
from megatron_dmc.bench.output import Case, Row
from megatron_dmc.bench.prefill_kernels import heads_of
from megatron_dmc.bench.window import ROOT
from megatron_dmc.bench.window_stages import Child, read_rows
from megatron_dmc.errors import DMCError
from megatron_dmc.ops import cuda

TESTS = ROOT / "tests"


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


# --- the kernels' cases ---------------------------------------------------------------------------


class Reporter:
    """pytest's plugin: a row for every case when it has run."""

    def __init__(self, stage: Child):
        self.stage = stage

    def pytest_collection_finish(self, session: Any) -> None:
        self.stage.announce(item.nodeid for item in session.items)

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


def run_tests(stage: Child, files: Sequence[str], *arguments: str) -> None:
    """pytest in this process, so that rows come one by one; without the tests' own set-up, which wants more
    packages than a bare machine has.

    Args:
        files: in `tests`.
    """
    if not TESTS.is_dir():
        raise DMCError(f"no folder {TESTS}: the cases are in the source tree; run from a checkout")
    try:
        import pytest
    except ImportError as error:
        raise DMCError("pytest is not installed: the cases did not run") from error

    os.chdir(TESTS)
    sys.path.insert(0, str(TESTS / "support"))
    status = pytest.main(
        [
            *files, *arguments, "-q", "--tb=short", "-p", "no:cacheprovider", "--noconftest", "-c",
            os.devnull, "--rootdir", str(TESTS),
        ],
        plugins=[Reporter(stage)],
    )  # fmt: skip
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise DMCError(f"pytest ended with {status!r}")


def _kernel_cases(stage: Child, backend: str, names: Sequence[str], *arguments: str) -> None:
    os.environ["DMC_TESTED_BACKEND"] = backend
    if not stage.cpu:
        os.environ |= {"DMC_LARGE_CASES": str(int(backend == "cuda")), "TRITON_INTERPRET": "0"}
    run_tests(stage, [f"support/kernel_cases_{name}.py" for name in names], *arguments)


def cuda_cases(stage: Child) -> None:
    """All cases of the extension, one after the other; nothing is compiled. On a CPU some of PyTorch's."""
    if stage.cpu:
        some = "equals_the_specification and not (96 or 128)"
        _kernel_cases(stage, "torch", ("decode", "pages"), "-k", some)
    elif reason := cuda.absence():
        stage.row("all cases", "skipped", reason=reason)
    else:
        _kernel_cases(stage, "cuda", ("decode", "pages", "prefill"))


def overlap_cases(stage: Child) -> None:
    """Decoding's cases under programmatic dependent launch, which is off otherwise."""
    if stage.cpu:
        stage.row("all cases", "cpu", reason="needs a GPU")
    elif reason := cuda.absence():
        stage.row("all cases", "skipped", reason=reason)
    else:
        os.environ["DMC_PROGRAMMATIC_LAUNCH"] = "1"
        _kernel_cases(stage, "cuda", ("decode",))


def triton_cases(stage: Child) -> None:
    """The small set, compiled as it runs."""
    if stage.cpu:
        some = "taken_pages or workers or gradient"
        _kernel_cases(stage, "triton", ("decode", "pages", "merge"), "-k", some)
    else:
        _kernel_cases(
            stage, "triton", ("decode", "pages", "prefill", "merge", "near", "truncate", "step")
        )


# --- K1, K2, K4 to K6 -----------------------------------------------------------------------------

DECODE_SHAPES = [
    (1, 1.0, 1, False), (1, 4.0, 1, True), (1, 1.0, 8, False), (1, 4.0, 8, True),
    (64, 1.0, 1, False), (64, 4.0, 1, False), (64, 4.0, 1, True), (64, 8.0, 1, True),
    (64, 4.0, 8, True), (256, 4.0, 1, True), (256, 8.0, 8, True), (256, 1.0, 8, False),
]  # fmt: skip
"""Requests, CR, query heads of a KV head, and whether the heads differ in length."""
LARGE_POOL = (256, 1.0, 1, False)
"""256 x 32 heads x 4096 tokens x 128 channels: twice 2^31 elements of keys, and as many of values."""


def decode_kernels(stage: Child) -> None:
    """A dozen shapes, other libraries, 8-bit pages, other back ends, and a large pool in two orders of its pages."""
    settings = settings_of(stage, 20)
    size = (64 if stage.cpu else 4096, *heads_of(settings))
    given = [(2, 4.0, 4, True)] if stage.cpu else DECODE_SHAPES
    shapes = [decode.Shape(*shape, *size) for shape in given]
    some = shapes[-1] if stage.cpu else decode.Shape(64, 4.0, 1, True, *size)
    large = [decode.Shape(*((1, 1.0, 1, False) if stage.cpu else LARGE_POOL), *size)]
    # padded attention computes with every slot: no contender where there is another
    others = [x for x in libraries.LIBRARIES if stage.cpu or x.name != "torch SDPA"]
    # the first one is what the engine would take
    first, *rest = decode.backends(settings)
    cases = functools.partial(decode.cases, settings, bandwidth=ceiling(stage, "copy", settings))
    stage.run([
        *cases(shapes, variants=[first], others=others),
        *cases([some], variants=[first], cache_dtype=torch.float8_e4m3fn),
        *cases([some], variants=rest),
        *cases(large, variants=[first], in_order=True),
        *cases(large, variants=[first]),
    ])  # fmt: skip


def train_kernels(stage: Child) -> None:
    """K1 and K2: merge, and training attention against the stock kernel."""
    lengths = (32,) if stage.cpu else (4096, 8192)
    settings = replace(settings_of(stage, 20), lengths=lengths)
    stage.run(training.cases(settings, ceiling(stage, "copy", settings), alternatives=False))


def prefill_kernels(stage: Child) -> None:
    """K6: attention and the whole op, without DMC and at CR 4, in every back end."""
    settings = settings_of(stage, 10)
    lengths = (40,) if stage.cpu else (4096, 32768)
    rate = ceiling(stage, "matrix product", settings)
    stage.run(prefill.cases(settings, lengths, [4.0], decode.backends(settings), rate))
