"""Steps of a long run: each done once, in a process of its own, several at a time."""

import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm


@dataclass(frozen=True)
class Step:
    """A part of the run whose result is kept.

    Its result depends on `settings` and on the steps it needs, and is made again when one of them has changed.
    """

    name: str
    settings: Any
    """JSON."""
    work: Callable[[], Any]
    """Returns JSON."""
    needs: tuple[str, ...] = ()
    alone: bool = False
    """Timed: nothing else runs at the same time."""


@dataclass(frozen=True)
class Run:
    """One call of `Plan.run`, in the past."""

    steps: int
    """That it finished."""
    seconds: float
    jobs: int


@dataclass
class Plan:
    """Steps in order, and the folder of their records; a step comes after those that it needs.

    Raises:
        KeyError: a step needs one that is not before it.
    """

    folder: Path
    steps: dict[str, Step] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    def add(self, *args: Any, **kwargs: Any) -> str:
        """Add `Step(*args, **kwargs)`; returns its name."""
        step = Step(*args, **kwargs)
        own = [step.settings, *(self.digests[name] for name in step.needs)]
        digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]
        self.steps[step.name], self.digests[step.name] = step, digest
        return step.name

    def file(self, name: str, suffix: str) -> Path:
        return self.folder / (re.sub(r"\W+", "-", name) + suffix)

    def record(self, name: str) -> dict[str, Any] | None:
        """`digest`, `seconds` and `result` of a step that is done as it is now, else None."""
        file = self.file(name, ".json")
        found = json.loads(file.read_text()) if file.is_file() else None
        return found if found and found["digest"] == self.digests[name] else None

    def result(self, name: str) -> Any:
        """Raises:
        ValueError: the step is not done.
        """
        if (found := self.record(name)) is None:
            raise ValueError(f"the step `{name}` has not been done")
        return found["result"]

    def seconds(self) -> dict[str, float]:
        """Of every step that is done."""
        found = {name: self.record(name) for name in self.steps}
        return {name: record["seconds"] for name, record in found.items() if record}

    def runs(self) -> list[Run]:
        """Those that did steps, in order of time."""
        file = self.folder / "runs.json"
        return [Run(**run) for run in json.loads(file.read_text())] if file.is_file() else []

    def do(self, name: str) -> None:
        """Do one step here, and record it."""
        began = time.monotonic()
        result = self.steps[name].work()
        record = {"digest": self.digests[name], "seconds": round(time.monotonic() - began, 1), "result": result}  # fmt: skip
        part = self.file(name, ".part")
        part.write_text(json.dumps(record, indent=1))
        part.replace(self.file(name, ".json"))

    def run(self, command: list[str], jobs: int) -> None:
        """Do what is not done yet, up to `jobs` steps at a time, which share the cores.

        Args:
            command: does the step whose name follows it.
            jobs: 0: one after the other in this process.

        Raises:
            ValueError: a step failed; the others are stopped.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / "lock") as lock, _terminable():
            waiting = [step for step in self.steps.values() if self.record(step.name) is None]
            running: list[_Running] = []
            began, todo = time.monotonic(), len(waiting)
            bar = tqdm(total=len(self.steps), initial=len(self.steps) - len(waiting), unit="step",
                       disable=not sys.stderr.isatty())  # fmt: skip
            try:
                while waiting and not jobs:
                    tqdm.write(f"{_now()} {waiting[0].name}", file=sys.stderr)
                    self.do(waiting[0].name)
                    waiting.pop(0)
                    bar.update()
                while waiting or running:
                    for step in self._startable(waiting, [r.step for r in running], jobs):
                        waiting.remove(step)
                        running.append(_Running(step, self.file(step.name, ".log")))
                    for one in running:
                        one.start(command, _cores() // len(running), lock)
                        one.show(running.index(one) + 1)
                    for one in [one for one in running if one.has_ended()]:
                        running.remove(one)
                        bar.update()
                    time.sleep(0.5)
            finally:
                for one in running:
                    one.stop()
                bar.close()
                if todo:
                    done = todo - len(waiting) - len(running)
                    this = Run(done, round(time.monotonic() - began, 1), jobs)
                    runs = [asdict(run) for run in [*self.runs(), this]]
                    (self.folder / "runs.json").write_text(json.dumps(runs))

    def _startable(self, waiting: list[Step], running: list[Step], jobs: int) -> list[Step]:
        """Steps to start now."""
        chosen: list[Step] = []
        for step in waiting:
            together = [*running, *chosen]
            if len(together) == jobs or any(other.alone for other in together):
                break
            if (not step.alone or not together) and all(map(self.record, step.needs)):
                chosen.append(step)
        return chosen


class _Running:
    """A step, and its process once it is started."""

    def __init__(self, step: Step, log: Path):
        self.step, self._log = step, log
        self._process: subprocess.Popen[bytes] | None = None
        self._line: tqdm[Any] | None = None

    def start(self, command: list[str], threads: int, lock: int) -> None:
        """No effect on a step that was started."""
        if self._process is not None:
            return
        tqdm.write(f"{_now()} {self.step.name}", file=sys.stderr)
        self._began = time.monotonic()
        with open(self._log, "wb") as out:
            self._process = subprocess.Popen(
                [*command, self.step.name], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True, pass_fds=[lock],
                env=dict(os.environ, OMP_NUM_THREADS=str(max(1, threads)), TQDM_MININTERVAL="2"),
            )  # fmt: skip

    def show(self, position: int) -> None:
        """The newest line of its output, on a terminal."""
        if self._line is None:
            self._line = tqdm(bar_format="{desc}", leave=False, position=position,
                              dynamic_ncols=True, disable=not sys.stderr.isatty())  # fmt: skip
        self._line.set_description_str(f"  {self.step.name}: {_last_line(self._log)}")

    def has_ended(self) -> bool:
        """Raises:
        ValueError: it has, and not well.
        """
        assert self._process is not None
        if (code := self._process.poll()) is None:
            return False
        self._close_line()
        if code:
            print(*_lines(self._log)[-30:], sep="\n", file=sys.stderr)
            raise ValueError(
                f"the step `{self.step.name}` ended with {code}; all of its output: {self._log}"
            )
        seconds = time.monotonic() - self._began
        tqdm.write(f"{_now()} {self.step.name}: done in {seconds:,.0f} s", file=sys.stderr)
        return True

    def stop(self) -> None:
        """End the process and what it started."""
        self._close_line()
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait()

    def _close_line(self) -> None:
        if self._line is not None:
            self._line.close()


def _now() -> str:
    return time.strftime("%H:%M:%S")


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _lines(file: Path) -> Sequence[str]:
    return [line for line in re.split(r"[\r\n]+", file.read_text(errors="replace")) if line.strip()]


def _last_line(file: Path) -> str:
    with open(file, "rb") as f:
        f.seek(max(0, file.stat().st_size - 2000))
        lines = re.split(r"[\r\n]+", f.read().decode(errors="replace").strip())
    return lines[-1]


@contextmanager
def _locked(file: Path) -> Iterator[int]:
    """The descriptor of a locked file; who inherits it keeps it locked.

    Raises:
        ValueError: another process has the lock.
    """
    with open(file, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise ValueError(
                f"another run, or a step that it left, works in {file.parent}; wait for it or end it"
            ) from e
        yield f.fileno()


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
