"""Retrofit SmolLM2-135M-Instruct to a part of its KV cache, measure it, write a report.

    python examples/smollm2/run.py [--output smollm2] [--settings FILE]

Steps, each recorded when it is done; what does not need each other runs at the same time. After an interruption the
same command resumes where it stopped, training from its newest checkpoint:

 1. the model (GGUF) from the package that holds it, as a Hugging Face folder;
 2. English documentation and code, tokenised; held-out documents apart;
 3. a control and the retrofits, through pretrain_dmc.py, with the original model as the teacher;
 4. measurements on the original, the control and the retrofits;
 5. a report with figures, and smollm2.json.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
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
from smollm2.steps import Plan

SETTINGS = Path(__file__).with_name("settings.toml")


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
        "--dmc-teacher-cache", str(base.parent / "teacher"),  # all arms see the same data
    ]  # fmt: skip


def add_training(plan: Plan, name: str, arm: Arm, settings: Settings, work: Path) -> str:
    """Steps of an arm's stages; returns the last one's name."""
    folder, previous, needed = work / "arms" / name, work / "base", "base"
    for stage, count in arm.stages.items():
        own = stage_flags(arm, stage, settings)

        def train(stage: str = stage, count: int = count, previous: Path = previous,
                  own: list[str] = own) -> None:  # fmt: skip
            digest = plan.digests[f"train {name} {stage}"]
            if not demo.is_done(folder / f"{stage}.begun", digest):
                shutil.rmtree(folder / stage, ignore_errors=True)  # checkpoints of another run
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{stage}.begun").write_text(digest)
            # of a stage's checkpoints, 1.6 GB each, the newest stays
            newest = ["--save-retain-interval", str(demo.save_interval(count) * count)]
            flags = [*common_flags(settings, work / "base", work / "data", work / "model"), *own]
            demo.train(stage, count, recipe_of(arm, settings), folder, previous, [*flags, *newest])

        wanted = [settings.to_dict()["training"], stage, count, own]
        needed = plan.add(f"train {name} {stage}", wanted, train, needs=(needed,))
        previous = folder / stage
    return needed


def plan_of(args: argparse.Namespace, settings: Settings) -> Plan:
    """All steps but the report."""
    from smollm2 import figures, measure

    work = args.output
    given, data, model = settings.to_dict(), work / "data", work / "model"
    plan = Plan(work / "steps")

    def fetch_model() -> None:
        if args.model:
            model.unlink(missing_ok=True)
            model.symlink_to(args.model, target_is_directory=True)
        else:
            fetch.fetch_model(
                settings.model.package, settings.model.sha256, work / "downloads", model
            )

    def problems() -> list[dict[str, Any]]:
        if args.problems:
            return [json.loads(line) for line in args.problems.read_text().splitlines()]
        return fetch.fetch_problems(work / "downloads")

    def texts() -> dict[str, int]:
        english = (
            corpus.read_texts(args.english)
            if args.english
            else corpus.debian_texts(work / "debian")
        )
        code = corpus.code_texts([args.code] if args.code else None)
        corpus.write_corpus({"english": english, "code": code}, work / "corpus", settings.data)
        return corpus.tokenize(work / "corpus", data, model, len(os.sched_getaffinity(0)))

    def base() -> None:
        calibration = str(data / "validation_text_document")
        if cli(["convert", "--to", "megatron", "--force", "--calibration-data", calibration,
                str(model), str(work / "base")]):  # fmt: skip
            raise ValueError(f"{model} cannot be converted")

    plan.add("model", [given["model"], str(args.model)], fetch_model)
    plan.add("problems", str(args.problems), problems)
    plan.add("text", [given["data"], str(args.english), str(args.code)], texts, ("model",))
    plan.add("base", [], base, ("text",))
    trained = {"base": "base"}
    for name, arm in settings.arms.items():
        trained[name] = add_training(plan, name, arm, settings, work)

    def subject(name: str) -> measure.Subject:
        arm = settings.arms.get(name)
        checkpoint = work / "arms" / name / list(arm.stages)[-1] if arm else work / "base"
        return measure.Subject(name, checkpoint, settings, data, plan.result("problems"), work)

    def measured(name: str, what: str, needs: tuple[str, ...] = ()) -> None:
        plan.add(
            f"measure {what} {name}", given["measure"],
            lambda: measure.FUNCTIONS[what](subject(name)), (trained[name], "problems", *needs),
            alone=what == "speed",
        )  # fmt: skip

    for what in measure.FUNCTIONS:
        for name in trained:
            if what in measure.wanted(settings.arms.get(name)):
                measured(name, what)
    perplexities = [f"measure perplexity {name}" for name in figures.retrofits(settings, "merge")]
    plan.add(
        "measure eviction control", given["measure"],
        lambda: measure.evicted(
            subject("control"), [plan.result(name)["cache_cr"] for name in perplexities]
        ),
        (trained["control"], "problems", *perplexities),
    )  # fmt: skip
    return plan


def write_report(plan: Plan, settings: Settings, folder: Path) -> None:
    from smollm2 import measure, report

    results: dict[str, dict[str, Any]] = {}
    for name in ("base", *settings.arms):
        for what in measure.wanted(settings.arms.get(name)):
            results.setdefault(name, {})[what] = plan.result(f"measure {what} {name}")
    report.write(
        folder, settings, results, plan.result("measure eviction control"), plan.result("text"),
        plan.seconds(), plan.runs(),
    )  # fmt: skip


def default_jobs(settings: Settings) -> int:
    """One on a GPU; else one for each core, arm and 7 GB of free memory, whichever is least."""
    import psutil
    import torch

    if torch.cuda.is_available():
        return 1
    free = psutil.virtual_memory().available
    return max(1, min(len(os.sched_getaffinity(0)), len(settings.arms), int(free / 7e9)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=EXAMPLES.parent / "smollm2")
    parser.add_argument("--settings", type=Path, default=SETTINGS, help="default: settings.toml")
    parser.add_argument(
        "--jobs", type=int, help="steps at a time, which share the cores; 0: all in this process; "
        "default: 1 on a GPU, else by cores and memory",
    )  # fmt: skip
    parser.add_argument("--step", help=argparse.SUPPRESS)  # do this one here
    own = parser.add_argument_group("instead of what is fetched")
    own.add_argument("--model", type=Path, help="Hugging Face folder")
    own.add_argument("--english", type=Path, help="folder with text files")
    own.add_argument("--code", type=Path, help="folder with Python files")
    own.add_argument("--problems", type=Path, help="HumanEval's JSON lines, unpacked")
    args = parser.parse_args()
    if args.jobs is not None and args.jobs < 0:
        parser.error(f"--jobs {args.jobs}: at least 0")
    for name in ("output", "settings", "model", "english", "code", "problems"):
        if (path := getattr(args, name)) is not None:
            setattr(args, name, path.resolve())
    silence_optional_packages()
    try:
        settings = read_settings(args.settings)
        plan = plan_of(args, settings)
        if args.step:
            plan.do(args.step)
            return
        jobs = default_jobs(settings) if args.jobs is None else args.jobs
        plan.run([sys.executable, *sys.argv, "--step"], jobs)
        write_report(plan, settings, args.output / "report")
    except (ValueError, DMCError) as e:
        sys.exit(f"smollm2: error: {' '.join(str(e).split())}")
    except KeyboardInterrupt:
        sys.exit("smollm2: stopped; the same command resumes")
    print(f"report: {args.output / 'report' / 'README.md'}")


if __name__ == "__main__":
    main()
