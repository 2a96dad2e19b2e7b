"""A stage of `bench window` in a process of its own: names its cases, then runs them and appends their rows.

A case that raises is a row, and the next one follows. What the deadline leaves no time for is a row too.
"""

import argparse
import importlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dmc.bench import window_outline
from megatron_dmc.bench.output import Row
from megatron_dmc.bench.window import append_row

logger = logging.getLogger(__name__)

MODULES = {stage.name: stage.module for stage in window_outline.STAGES}


@dataclass(frozen=True)
class Case:
    """Something that is run for its rows.

    Attributes:
        run: gives rows as they are measured; one with `outcome` says how it went, any other one is "ok".
    """

    name: str
    run: Callable[[], Iterable[Row]]


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
        """Run the cases in order."""
        from megatron_dmc.bench.measure import release_memory

        self.announce(case.name for case in cases)
        for case in cases:
            if self.is_late:
                self.row(case.name, "skipped", reason="out of budget")
                continue
            try:
                for row in case.run():
                    self.row(case.name, **row)
            except Exception as error:
                logger.exception("case %s", case.name)
                self.row(case.name, "failed", reason=one_line(error))
            release_memory()


def one_line(error: BaseException) -> str:
    """An error in one line, for a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]


def main(argv: list[str] | None = None) -> int:
    """Run one stage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=list(MODULES))
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--limit", type=float, required=True)
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args(argv)
    stage = Child(args.stage, args.rows, time.monotonic() + args.limit, args.cpu)
    module = MODULES[args.stage]
    if module == window_outline.ENGINE:
        try:
            importlib.import_module("megatron.core")
        except ImportError as error:
            reason = f"megatron-core not importable ({one_line(error)})"
            stage.row("all cases", "skipped", reason=reason)
            return 0
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    if args.cpu:
        # before anything imports Triton or asks for a GPU
        os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        getattr(
            importlib.import_module(f"megatron_dmc.bench.{module}"), args.stage.replace("-", "_")
        )(stage)
    except Exception as error:
        logger.exception("stage %s", args.stage)
        stage.row("all cases", "failed", reason=one_line(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
