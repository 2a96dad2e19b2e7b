"""The stages of `bench window`, in order, with their limits and the columns of their tables; and a stage in a process of
its own: it names its cases, then runs them and appends their rows. No torch before a stage begins.

A case that raises is a row, and the next one follows. What the deadline leaves no time for is a row too.
"""

import argparse
import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dmc.bench.output import Case, Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """A part of the window.

    Attributes:
        limit: seconds after which it is killed.
        columns: of its table: keys of the rows, and their titles.
        waits: for the CUDA extension's build.
        runs_model: it needs megatron-core.
    """

    name: str
    title: str
    limit: float
    columns: dict[str, str]
    waits: bool = True
    runs_model: bool = False


_KERNEL = {
    "case": "case", "op": "op", "variant": "kernel", "median_ms": "ms",
    "fraction_of_copy": "of a copy", "time_over_attention": "over attention",
}  # fmt: skip
_ENGINE = {
    "case": "case", "engine": "engine", "measured_cr": "measured CR", "batch_size": "batch",
    "step_ms": "ms a step", "p10_ms": "p10", "p90_ms": "p90", "tokens_per_second": "tokens/s",
    "fraction_of_roofline": "of the roofline", "ratio": "ratio", "must_reach": "must reach",
}  # fmt: skip
STAGES = (
    Stage(
        "ceilings", "The machine and its ceilings", 60,
        {"case": "case", "value": "value", "unit": "unit"}, waits=False,
    ),
    Stage("cuda-cases", "Cases of the CUDA kernels", 90, {}),
    Stage("triton-cases", "Cases of the Triton kernels", 90, {}, waits=False),
    Stage("decode-kernels", "K4 and K5: attention and append of a decode step", 90, _KERNEL),
    Stage(
        "train-kernels", "K1 and K2: merge and training attention", 45,
        {"case": "case", "variant": "kernel", "direction": "direction", "merge_window": "window",
         "median_ms": "ms", "fraction_of_copy": "of a copy", "time_over_stock": "over stock"},
        waits=False,
    ),
    Stage(
        "prefill-kernels", "K6: prefill of one prompt", 60,
        {"case": "case", "op": "op", "variant": "kernel", "tokens": "tokens", "cr": "CR",
         "median_ms": "ms", "time_over_plain": "over no DMC", "time_over_flash": "over flash",
         "fraction_of_product": "of a product"},
    ),
    Stage(
        "engine-checks", "Captured decode steps equal eager ones; no hidden waits", 70, {},
        runs_model=True,
    ),
    Stage("throughput", "E1 and E2: decode throughput, Llama-2-7B's shape, largest batch", 110, _ENGINE,
          runs_model=True),
    Stage("latency", "E3 and E7: a step at equal batch; paging against dense attention", 90, _ENGINE,
          runs_model=True),
    Stage(
        "train-step", "K3: one layer, one training step", 45,
        {"case": "case", "part": "part", "dmc": "DMC", "median_ms": "ms",
         "time_over_plain": "over no DMC", "memory_over_plain": "memory over no DMC"},
        waits=False, runs_model=True,
    ),
    Stage("overlap-cases", "Cases of the CUDA kernels, launched to overlap", 40, {}),
    Stage(
        "profile", "Kernels of one replayed decode step", 60,
        {"name": "kernel", "calls": "calls", "us": "µs", "fraction": "of the step's kernels"}, runs_model=True,
    ),
)  # fmt: skip


ABSENT = ("not installed", "not in this PyTorch", "needs a GPU")
"""Reasons of a row's `skipped` that are no failures."""


@dataclass
class Child:
    """The process of a stage, as its function sees it.

    Attributes:
        path: of the rows.
        deadline: of `time.monotonic()`; no case begins after it.
        cpu: toy size, on the CPU.
    """

    name: str
    path: Path
    deadline: float
    cpu: bool
    began: float = field(default_factory=time.monotonic)

    def row(self, case: str, outcome: str = "ok", **columns: Any) -> None:
        """Append a row."""
        columns["at_s"] = round(time.monotonic() - self.began, 2)
        append_row(self.path, self.name, case, outcome, **columns)

    def announce(self, cases: Iterable[str]) -> None:
        """Name the cases: those without a row at the end have failed."""
        append_row(self.path, self.name, "cases", "announced", cases=list(cases))

    @property
    def is_late(self) -> bool:
        return time.monotonic() > self.deadline

    def run(self, cases: list[Case]) -> None:
        """Run the cases in order. A row is "ok" unless it says otherwise: by `outcome`, or by `skipped` and the reason."""
        from megatron_dmc.bench.measure import release_memory

        self.announce(case.name for case in cases)
        for case in cases:
            if self.is_late:
                self.row(case.name, "skipped", reason="out of budget")
                continue
            try:
                for row in case.run():
                    if reason := row.pop("skipped", None):
                        outcome = "absent" if reason in ABSENT else "failed"
                        row |= {"outcome": outcome, "reason": reason}
                    self.row(case.name, **row)
            except Exception as error:
                logger.exception("case %s", case.name)
                self.row(case.name, "failed", reason=one_line(error))
            release_memory()


def read_rows(path: Path) -> list[Row]:
    """Rows of a file that may still grow; lines that are none are left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"stage", "case", "outcome"} <= row.keys():
            rows.append(row)
    return rows


def append_row(path: Path, stage: str, case: str, outcome: str, **columns: Any) -> None:
    """Append one line and see it on the disk."""
    line = json.dumps({"stage": stage, "case": case, "outcome": outcome, **columns}, default=str)
    with path.open("a+b") as file:
        # a process that was killed in the middle of a line must not take this one along
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        broken = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * broken + line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def one_line(error: BaseException) -> str:
    """An error in one line, for a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]


def main(argv: list[str] | None = None) -> int:
    """Run one stage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=[stage.name for stage in STAGES])
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args(argv)
    child = Child(args.stage, args.rows, time.monotonic() + args.limit, args.cpu)
    runs_model = next(stage.runs_model for stage in STAGES if stage.name == args.stage)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    try:
        if runs_model:
            importlib.import_module("megatron.core")
    except ImportError as error:
        child.row(
            "all cases", "skipped", reason=f"megatron-core not importable ({one_line(error)})"
        )
        return 0
    module = "window_engine" if runs_model else "window_kernels"
    try:
        stage = importlib.import_module(f"megatron_dmc.bench.{module}")
        getattr(stage, args.stage.replace("-", "_"))(child)
    except Exception as error:
        logger.exception("stage %s", args.stage)
        child.row("all cases", "failed", reason=one_line(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
