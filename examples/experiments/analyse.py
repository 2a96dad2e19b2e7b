"""Measure trained arms after the fact, for docs/results.md. What is measured already is not measured again.

    python examples/experiments/analyse.py [--output experiments] [--run NAME ...] [--measure NAME ...]

Reads the runs that run.py has finished in --output, and the base model as the run "base"; writes
ANALYSIS/RUN/MEASURE.json. Measures:

    base       perplexity of the base model in all windows, as run.py measures the arms
    cache      CR by the entries that are there, at the windows' end and over time
    eviction   H2O, TOVA and window on the base model and on the arm "continued", at two kinds of budget
    eviction-512   the same on the base model in windows of 512, at equal memory over time
    kinds      perplexity and CR by kind of text and class of token
    gates      perplexity with hard decisions and with training's relaxed ones
    sample     a text with its decisions
    copying    accuracy in the second occurrence of a string, by distance
    copying-evicted    the same under eviction at a CR of 4, on the base model and on "continued"
    tasks      tools/build_eval_tasks.py through `megatron-dmc eval`
"""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))

from megatron_dmc.quiet import silence_optional_packages

import demo

POLICIES = ("h2o", "tova", "window")
CRS = (2, 4, 8)
TASKS = ("next_line", "rest_of_line", "recall", "sources")
SAMPLE_PATH, SAMPLE_TOKENS = "netrc.py", 200
"""A held-out file, of which the sample is a stretch."""


@dataclass
class Run:
    """A trained arm, or the base model (arm None)."""

    name: str
    checkpoint: Path
    arm: dict[str, Any] | None

    @property
    def is_dmc(self) -> bool:
        return self.arm is not None and self.arm["kind"] == "dmc"

    @property
    def merges(self) -> bool:
        return self.is_dmc and self.arm.get("policy") != "evict"

    @property
    def group(self) -> str:
        return "base" if self.arm is None else self.arm["group"]

    @property
    def length(self) -> int:
        return demo.SEQ_LENGTH if self.arm is None else self.arm.get("seq_length", demo.SEQ_LENGTH)


def finished_runs(output: Path) -> Iterator[Run]:
    """The base model, then what has a metrics.json."""
    yield Run("base", demo.MODEL, None)
    for file in sorted(output.glob("*/metrics.json")):
        arm = json.loads(file.read_text())["arm"]
        yield Run(file.parent.name, file.parent / "finetune", arm)


class Bench:
    """Lazily created objects that the measurements of a run share."""

    def __init__(self, output: Path, args: argparse.Namespace):
        self.output, self.args = output, args
        self._kept: dict[str, Any] = {}

    def _keep(self, key: str, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    @property
    def processor(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        file = str(demo.MODEL / "tokenizer.model")
        return self._keep("processor", lambda: SentencePieceProcessor(model_file=file))

    @property
    def heldout(self) -> Any:
        from megatron_dmc.quality.likelihood import read_tokens

        prefix = self.output / "data" / "heldout_text_document"
        return self._keep("heldout", lambda: read_tokens(prefix))

    def windows(self, length: int) -> Any:
        """Of the held-out text, as the arms are evaluated on; --windows of them, evenly spaced."""
        from texts import spaced_windows

        return spaced_windows(self.heldout, length, self.args.windows)

    def texts(self, length: int) -> Any:
        from texts import kinds_of_text

        def make() -> Any:
            return kinds_of_text(
                self.output / "corpus", self.processor,
                length=length, count=self.args.kind_windows,
            )  # fmt: skip

        return self._keep(f"texts {length}", make)

    def model(self, run: Run) -> Any:
        """One at a time is kept."""
        import torch

        from megatron_dmc.checkpoint.load import load_model

        if self._kept.get("run") != run.name:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._kept["model"] = load_model(run.checkpoint, device=device, dtype=torch.float32)
            self._kept["run"] = run.name
        return self._kept["model"]


# --- the measures: (settings, parts). A part is measured and stored by itself. ----------------------


def base(run: Run, bench: Bench) -> dict[str, Any]:
    from megatron_dmc.quality.likelihood import evaluate

    result = {}
    for length in (128, 256, 512):
        found = evaluate(bench.model(run), bench.heldout, length=length, progress=False)
        result[str(length)] = {"perplexity": found.perplexity, "measured_cr": found.measured_cr}
    return result


def cache(run: Run, bench: Bench) -> dict[str, Any]:
    import measurements

    return measurements.cache(bench.model(run), bench.windows(run.length))


def _eviction(
    run: Run, bench: Bench, done: dict[str, Any], length: int, equations: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """One policy and budget at a time; `done` holds what an earlier call measured."""
    import measurements
    from eviction import final_budget, mean_budget

    budgets = {"mean": mean_budget, "final": final_budget}
    if "none" not in done:
        yield "none", measurements.cache(bench.model(run), bench.windows(length))
    for equation in equations:
        for cr in CRS:
            for policy in POLICIES:
                key = f"{policy} {equation} {cr}"
                if key not in done:
                    yield key, {"policy": policy, "equal": equation, "cr": cr} | measurements.eviction(
                        bench.model(run), bench.windows(length), policy, budgets[equation](length, cr)
                    )  # fmt: skip


def eviction(run: Run, bench: Bench, done: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    return _eviction(run, bench, done, run.length, ("mean", "final"))


def eviction_512(
    run: Run, bench: Bench, done: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    return _eviction(run, bench, done, 512, ("mean",))


def kinds(run: Run, bench: Bench) -> dict[str, Any]:
    import measurements

    return measurements.kinds(bench.model(run), bench.texts(run.length))


def sample(run: Run, bench: Bench) -> dict[str, Any]:
    import measurements
    from texts import heldout_documents

    text = dict(heldout_documents(bench.output / "corpus"))[SAMPLE_PATH]
    text = text[text.index("    def ") :]
    return measurements.sample(bench.model(run), bench.processor.encode(text)[:SAMPLE_TOKENS])


def gates(run: Run, bench: Bench) -> dict[str, Any]:
    import measurements

    return measurements.gates(
        bench.model(run), bench.heldout, length=run.length, limit=bench.args.windows
    )


def _copying(run: Run, bench: Bench, forward: Any) -> dict[str, Any]:
    import measurements

    filler = bench.texts(run.length)["library code"].ids_XT[:, :-1].reshape(-1)
    return measurements.copying(
        forward, filler, bench.processor, length=run.length, count=bench.args.copies
    )


def copying(run: Run, bench: Bench) -> dict[str, Any]:
    import measurements

    return _copying(run, bench, measurements.forward_of(bench.model(run)))


def copying_evicted(
    run: Run, bench: Bench, done: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Under each policy, at a CR of 4 over time."""
    import measurements
    from eviction import mean_budget

    for policy in POLICIES:
        if policy not in done:
            forward = measurements.evicting(bench.model(run), policy, mean_budget(run.length, 4))
            yield policy, _copying(run, bench, forward)


def tasks(run: Run, bench: Bench) -> dict[str, Any]:
    """Accuracies with lm-eval's standard errors, bits per byte, measured CR."""
    folder, limit = bench.args.analysis / "tasks", bench.args.limit
    if not (folder / "sources.yaml").is_file():
        demo.run(
            [sys.executable, "tools/build_eval_tasks.py", str(folder), "--count", "400",
             "--context", "400"],
            folder.with_suffix(".log"),
        )  # fmt: skip
    results = folder / f"{run.name}.json"
    command = [
        sys.executable, "-m", "megatron_dmc.cli.main", "eval", str(run.checkpoint), "--include-path", str(folder),
        "--tasks", ",".join(f"stdlib_{task}" for task in TASKS), "--limit", str(limit),
        "--dtype", "float32", "--output", str(results),
    ]  # fmt: skip
    demo.run(command, folder / f"{run.name}.log")
    found = json.loads(results.read_text())
    table = {}
    for task in TASKS:
        row = found["results"][f"stdlib_{task}"]
        table[task] = {
            key.removesuffix(",none"): value
            for key, value in row.items()
            if isinstance(value, int | float) and (key.endswith(",none") or key == "measured_cr")
        }
    return {"documents": limit, "tasks": table}


def _compared(run: Run) -> bool:
    return run.group in ("base", "quality")


def _copies(run: Run) -> bool:
    return _compared(run) or run.group == "delay"


def _plain(run: Run) -> bool:
    return run.arm is None or run.arm["name"] == "continued"


MEASURES: dict[str, tuple[Callable, Callable[[Run], bool], tuple[str, ...]]] = {
    "base": (base, lambda run: run.arm is None, ()),
    "cache": (cache, lambda run: run.is_dmc or _compared(run), ("windows",)),
    "sample": (sample, lambda run: run.merges and _compared(run), ()),
    "gates": (gates, lambda run: run.merges, ("windows",)),
    "kinds": (kinds, _compared, ("kind_windows",)),
    "copying": (copying, _copies, ("copies", "kind_windows")),
    "eviction": (eviction, _plain, ("windows",)),
    "eviction-512": (eviction_512, lambda run: run.arm is None, ("windows",)),
    "copying-evicted": (copying_evicted, _plain, ("copies", "kind_windows")),
    "tasks": (tasks, _compared, ("limit",)),
}
"""Name: what it calls, the runs it is for, the settings that its figures depend on."""
IN_PARTS = ("eviction", "eviction-512", "copying-evicted")


def measure(name: str, run: Run, bench: Bench) -> None:
    """Unless the file has it, with these settings."""
    from megatron_dmc.quality.report.data import write_atomically
    from megatron_dmc.quality.report.measure import environment

    call, _, settings = MEASURES[name]
    file = bench.args.analysis / run.name / f"{name}.json"
    wanted = {setting: getattr(bench.args, setting) for setting in settings}
    wanted["weights"] = _identity(run)
    known = json.loads(file.read_text()) if file.is_file() else {}
    if known.get("settings") != wanted:
        known = {}
    if known.get("done"):
        return
    print(f"{run.name}: {name}", flush=True)

    def write(result: dict[str, Any], done: bool) -> None:
        content = {"settings": wanted, "done": done, "result": result, "environment": environment()}
        write_atomically(file, (json.dumps(content, indent=1) + "\n").encode())

    if name not in IN_PARTS:
        write(call(run, bench), True)
        return
    result = known.get("result", {})
    for key, part in call(run, bench, result):
        result[key] = part
        write(result, False)
    write(result, True)


def _identity(run: Run) -> str:
    """Changes with the weights: of an arm, with what run.py measured of them."""
    if run.arm is None:
        return demo.digest(run.checkpoint)
    content = (run.checkpoint.parent / "metrics.json").read_bytes()
    return hashlib.sha256(content).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=EXAMPLES.parent / "demo" / "experiments",
                        help="where the runs are")  # fmt: skip
    parser.add_argument(
        "--analysis", type=Path, help="where this writes (default: OUTPUT/analysis)"
    )
    parser.add_argument("--run", nargs="+", help="base, or ARM-seedN; default: all")
    parser.add_argument("--measure", nargs="+", choices=MEASURES, help="default: all")
    parser.add_argument("--windows", type=int, help="most windows of held-out text (default: all)")
    parser.add_argument("--kind-windows", type=int, default=64, help="windows of each kind of text")
    parser.add_argument("--copies", type=int, default=64, help="windows for each distance")
    parser.add_argument("--limit", type=int, default=100, help="documents of each lm-eval task")
    args = parser.parse_args()
    output = args.output.resolve()
    args.analysis = (args.analysis or output / "analysis").resolve()
    if not (output / "corpus" / "heldout.jsonl").is_file():
        parser.error(f"--output {output}: no corpus there; run examples/experiments/run.py first")
    runs = {run.name: run for run in finished_runs(output)}
    if unknown := set(args.run or []) - set(runs):
        parser.error(f"--run {' '.join(sorted(unknown))}: not finished in {output}")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    silence_optional_packages()
    bench = Bench(output, args)
    for name in args.measure or MEASURES:
        for run in (runs[name] for name in args.run or runs):
            if MEASURES[name][1](run):
                measure(name, run, bench)
            elif args.run and args.measure:
                print(f"{run.name}: {name} is not measured of the group {run.group!r}", flush=True)


if __name__ == "__main__":
    main()
