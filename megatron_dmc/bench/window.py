"""`megatron-dmc bench window`: K1 to K6, E1 to E3 and E7 in the ten minutes that one sitting on a GPU has.

Made for a bare machine: Python, torch, Triton and pytest; the engine's stages also need megatron-core. This module
is the parent, of the standard library alone. Its stages are child processes (`bench.window_stages`) with time
limits, ordered by what is worth most if the run is cut off. A child appends each row to `rows.jsonl` when it has
it, and names its cases before it begins; what it did not reach becomes a row too. `table.md` is rewritten after each
stage. The last line printed is one JSON document; the exit status is 0 if every case ran and was right.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_dmc import __version__
from megatron_dmc.bench.output import Result, Row, markdown
from megatron_dmc.bench.window_stages import STAGES, Stage, append_row, read_rows
from megatron_dmc.errors import DMCError

ROOT = Path(__file__).resolve().parents[2]
RESERVE = 5.0
"""Seconds of the budget that are kept for the last table."""
LEAST = 8.0
"""Seconds with which no stage is started."""
BUILD_LIMIT = 240.0
CPU_SLACK = 3.0
"""Times a stage's limit, where the CPU that rehearses has other work."""

NEUTRAL = ("ok", "absent", "cpu")
"""Outcomes that are no failures: it ran and was right, a library that is not installed, or a case that only a GPU can
run where `--cpu` rehearses."""


class Interrupted(Exception):
    """SIGTERM or SIGINT."""


@dataclass
class Window:
    """One run. The files in `folder` are its state: rows are read from there again."""

    folder: Path
    budget: float
    cpu: bool
    began: float = field(default_factory=time.monotonic)
    build: subprocess.Popen | None = None
    build_began: float = 0.0
    child: subprocess.Popen | None = None
    running: str = ""
    """The child's stage."""

    @property
    def left(self) -> float:
        """Seconds for stages."""
        return self.budget - RESERVE - (time.monotonic() - self.began)

    def rows(self) -> list[Row]:
        """All rows so far."""
        return read_rows(self.folder / "rows.jsonl")

    def add(self, stage: str, case: str, outcome: str, **columns: Any) -> None:
        """Append a row of the parent's own."""
        append_row(self.folder / "rows.jsonl", stage, case, outcome, **columns)

    def run(self) -> Row:
        """Run all stages, then print the table, also on SIGTERM and SIGINT.

        Returns:
            the document.
        """
        signals = (signal.SIGTERM, signal.SIGINT)
        pending, reason = list(STAGES), "not run: the parent failed"

        def interrupt(number: int, frame: object) -> None:
            for each in signals:
                signal.signal(each, signal.SIG_IGN)  # only the table is left to do
            raise Interrupted(signal.Signals(number).name)

        before = {each: signal.signal(each, interrupt) for each in signals}
        try:
            self._run_stage(pending.pop(0))
            self._begin_build()
            while pending:
                self._poll_build()
                stage = next((s for s in pending if self.build is None or not s.waits), None)
                if stage is None:
                    time.sleep(0.2)
                    continue
                pending.remove(stage)
                self._run_stage(stage)
            while self.build is not None:
                self._poll_build()
                time.sleep(0.2)
        except Interrupted as name:
            reason = f"interrupted by {name}"
        finally:
            for each in signals:
                signal.signal(each, signal.SIG_IGN)
            for process, of_stage in ((self.child, self.running), (self.build, "extension")):
                if process is not None:
                    kill_group(process)
                    self._explain(of_stage, reason)
            for stage in pending:
                self.add(stage.name, "all cases", "skipped", reason=reason)
            self.write_table()
            document = self.document()
            print((self.folder / "table.md").read_text(), flush=True)
            for each, handler in before.items():
                signal.signal(each, handler)
        return document

    def _run_stage(self, stage: Stage) -> None:
        limit = min(stage.limit * (CPU_SLACK if self.cpu else 1), self.left)
        if limit < LEAST:
            self.add(stage.name, "all cases", "skipped", reason="out of budget")
            self.write_table()
            return
        path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
        rehearsing = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if self.cpu else {}
        print(f"== {stage.title} (at most {limit:.0f} s)", flush=True)
        with (self.folder / "log.txt").open("ab") as log:
            log.write(f"\n== {stage.name}\n".encode())
            log.flush()
            self.running = stage.name
            self.child = subprocess.Popen(
                self._command(stage, limit), stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path, **rehearsing},
                process_group=0,
            )  # fmt: skip
            try:
                status = self.child.wait(limit)
                reason = "" if status == 0 else f"the stage's process ended with status {status}"
            except subprocess.TimeoutExpired:
                reason = f"killed after {limit:.0f} s"
        kill_group(self.child)
        self.child = None
        self._explain(stage.name, reason)
        self.write_table()

    def _command(self, stage: Stage, limit: float) -> list[str]:
        return [
            sys.executable, "-u", "-m", "megatron_dmc.bench.window_stages", stage.name, "--rows",
            str(self.folder / "rows.jsonl"), "--limit", f"{limit - 2:.1f}",
            *(["--cpu"] if self.cpu else []),
        ]  # fmt: skip

    def _explain(self, stage: str, reason: str) -> None:
        """Rows for the cases that a stage has named and not reached, or for a stage that broke off."""
        rows = [row for row in self.rows() if row["stage"] == stage]
        seen = {row["case"] for row in rows if row["outcome"] != "announced"}
        announced = dict.fromkeys(
            x for r in rows if r["outcome"] == "announced" for x in r["cases"]
        )
        missing = [case for case in announced if case not in seen]
        for case in missing:
            self.add(stage, case, "failed", reason=reason or "the stage left it out")
        if not missing and (reason or not rows):
            self.add(stage, "all cases", "failed", reason=reason or "the stage wrote nothing")

    # The CUDA extension.

    def _begin_build(self) -> None:
        """Start to build what the first stage could not import, for this machine's architecture."""
        row = next((r for r in self.rows() if r["case"] == "extension"), None)
        if self.cpu or row is None or row["outcome"] == "ok" or "architecture" not in row:
            return
        if not (ROOT / "setup.py").exists():
            self.add("extension", "build", "failed", reason=f"no sources in {ROOT}")
            return
        environment = {
            **os.environ, "TORCH_CUDA_ARCH_LIST": row["architecture"],
            "MAX_JOBS": str(os.cpu_count() or 1),
        }  # fmt: skip
        with (self.folder / "build.log").open("wb") as log:
            self.build = subprocess.Popen(
                [sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, stdout=log,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
                process_group=0,
            )  # fmt: skip
        self.build_began = time.monotonic()
        print("== building the CUDA extension during the next stages", flush=True)

    def _poll_build(self) -> None:
        if self.build is None:
            return
        seconds = time.monotonic() - self.build_began
        status = self.build.poll()
        if status is None and seconds < min(BUILD_LIMIT, self.left + seconds):
            return
        kill_group(self.build)
        self.build = None
        built = list((ROOT / "megatron_dmc").glob("_C*.so"))
        if status == 0 and built:
            self.add("extension", "build", "ok", seconds=seconds)
            return
        lines = (self.folder / "build.log").read_text(errors="replace").strip().splitlines()
        why = "killed by its time limit" if status is None else f"status {status}"
        self.add(
            "extension", "build", "failed", seconds=seconds,
            reason=f"{why}: {lines[-1][:300] if lines else 'no output'} (build.log)",
        )  # fmt: skip

    # What is left at the end.

    def write_table(self) -> None:
        """Rewrite table.md."""
        (self.folder / "table.md").write_text("\n".join(self._table()) + "\n")

    def _table(self) -> Iterator[str]:
        rows = [row for row in self.rows() if row["outcome"] != "announced"]
        where = "a CPU at toy size: nothing here says anything about a GPU" if self.cpu else "a GPU"
        machine = next((row for row in rows if row["case"] == "machine"), {})
        yield f"# The window on {machine.get('value') or where}\n"
        if self.cpu:
            yield f"On {where}.\n"
        for stage in (*STAGES, Stage("extension", "The CUDA extension's build", 0, {})):
            of_stage = [row for row in rows if row["stage"] == stage.name]
            if not of_stage:
                continue
            yield f"## {stage.title}\n"
            good = [row for row in of_stage if row["outcome"] == "ok"]
            used = {
                k: t for k, t in stage.columns.items() if any(r.get(k) is not None for r in good)
            }
            yield f"{markdown(good, used)}\n" if used and good else f"{len(good)} passed\n"
            for row in of_stage:
                if row["outcome"] != "ok":
                    yield f"- {row['case']}: {row['outcome']}: {row.get('reason', '')}"
            yield ""

    def document(self) -> Row:
        """The last line."""
        rows = [row for row in self.rows() if row["outcome"] != "announced"]
        failed = [row for row in rows if row["outcome"] not in NEUTRAL]
        machine: Row = next((row for row in rows if row["case"] == "machine"), {})
        outcomes = sorted({row["outcome"] for row in rows})
        return {
            "benchmark": "window",
            "version": __version__,
            "gpu": machine.get("gpu"),
            "machine": machine.get("value"),
            "torch": machine.get("torch"),
            "commit": commit(),
            "arguments": sys.argv[1:],
            "note": "toy size on a CPU: it says nothing about a GPU" if self.cpu else None,
            "seconds": round(time.monotonic() - self.began, 1),
            "counts": {o: sum(row["outcome"] == o for row in rows) for o in outcomes},
            "failed": len(failed),
            "failures": [f"{r['stage']}: {r['case']}: {r.get('reason', '')}" for r in failed[:50]],
            "rows": str(self.folder / "rows.jsonl"),
        }


def kill_group(process: subprocess.Popen) -> None:
    """End a child and all that it started; it leads a process group of its own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def commit() -> str | None:
    """The checkout's commit, where git knows it."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument(
        "--budget", type=float, default=500.0, metavar="SECONDS",
        help="for all of it; what no longer fits is a row that says so (default: 500)",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FOLDER", required=True, help="where results go")
    parser.add_argument(
        "--extension", metavar="FILE",
        help="the CUDA extension built elsewhere, _C.*.so; without it and where none imports, it is built",
    )  # fmt: skip
    parser.add_argument(
        "--cpu", action="store_true",
        help="the same stages at toy size on the CPU: shows that everything runs, measures nothing",
    )  # fmt: skip


def run(args: argparse.Namespace) -> Result:
    """Run the window.

    Raises:
        DMCError: a flag is wrong.
    """
    if not args.budget > RESERVE + LEAST:
        raise DMCError(f"--budget {args.budget:g}: use more than {RESERVE + LEAST:g} seconds")
    if args.extension is not None:
        if not Path(args.extension).is_file():
            raise DMCError(f"--extension {args.extension}: no such file")
        if Path(args.extension).resolve().parent != ROOT / "megatron_dmc":
            shutil.copy(args.extension, ROOT / "megatron_dmc")
    folder = Path(args.output).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("rows.jsonl", "table.md", "log.txt", "build.log"):
        (folder / name).unlink(missing_ok=True)
    document = Window(folder, args.budget, args.cpu).run()
    return Result(document, exit_code=1 if document["failed"] else 0)
