"""The comparisons of docs/results.md: run the arms of arms.toml, then table what they gave.

    python examples/experiments/run.py [--arm NAME ...] [--seed N ...] [--jobs 2] [--output experiments]
    python examples/experiments/run.py --table

Each arm and seed has a folder with config.json, the stages' logs and checkpoints, and metrics.json, which
is written last: an arm that has one is done, any other resumes from its newest checkpoint. An arm takes
about as long as `make demo`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import fields
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))

from megatron_dmc.cli.main import main as cli
from megatron_dmc.quiet import silence_optional_packages

import demo
import result_data
import result_tables

type Arm = dict[str, Any]

RECIPE_KEYS = {field.name for field in fields(demo.Recipe)}
OWN_KEYS = {"name", "group", "kind", "seeds", "lengths", "kv_heads", "seq_length", "plain_steps",
            "from_scratch", "teacher"}  # fmt: skip
"""Keys of an arm that are neither the recipe's nor flags `--dmc-*`."""
RECIPE = {"zero_out": 20, "retrofit": 120, "finetune": 480, "lr": 1e-3, "merge_delay": 0,
          "borrowed_lr_mult": 1.0}  # fmt: skip
"""Of all arms that say nothing else, in place of the demo's, which are chosen for a short retrofit with a delay."""
CURVE_WINDOWS = 64
"""Held-out windows that the checkpoints on the way are measured on."""


def read_arms(file: Path) -> dict[str, Arm]:
    """Arms by name, each with the settings of its group in it."""
    config = tomllib.loads(file.read_text())
    return {
        arm["name"]: config["defaults"] | config["group"][arm["group"]] | arm
        for arm in config["arm"]
    }


def recipe_of(arm: Arm, seed: int, short: bool) -> demo.Recipe:
    """The demo's settings with those of all arms, and what the arm changes."""
    settings = {key: value for key, value in arm.items() if key in RECIPE_KEYS}
    if short:
        settings |= {"zero_out": 2, "retrofit": 2, "finetune": 2}
    return demo.Recipe(**RECIPE | settings | {"seed": 1000 * seed + 234})


def stages_of(arm: Arm, recipe: demo.Recipe, short: bool) -> dict[str, int]:
    """Steps of the stages that the arm has, in order."""
    plain = arm.get("plain_steps", 0)
    stages = {"plain": 2 if short and plain else plain, **recipe.stages}
    return {stage: steps for stage, steps in stages.items() if steps}


def stage_flags(arm: Arm, stage: str, recipe: demo.Recipe) -> list[str]:
    """`--dmc-*` of a stage."""
    if arm["kind"] == "plain" or stage == "plain":
        return ["--dmc-stage", "off"]
    extra = []
    for key, value in arm.items():
        if key in RECIPE_KEYS | OWN_KEYS:
            continue
        flag = "--dmc-" + key.replace("_", "-")
        extra += [flag] if value is True else [flag, str(value)]
    # arms leave stages out, and change the target between them
    return [*demo.dmc_flags(stage, recipe), *extra, "--dmc-no-stage-check"]


def shape_flags(arm: Arm) -> list[str]:
    """The arm's KV heads and sequence length, to stand behind the demo's flags; a step keeps its tokens."""
    flags = []
    if "kv_heads" in arm:
        flags += ["--group-query-attention", "--num-query-groups", str(arm["kv_heads"])]
    if "seq_length" in arm:
        batch = str(demo.BATCH * demo.SEQ_LENGTH // arm["seq_length"])
        flags += ["--seq-length", str(arm["seq_length"]),
                  "--micro-batch-size", batch, "--global-batch-size", batch]  # fmt: skip
    return flags


def converted(folder: Path, *flags: str) -> Path:
    """The demo's model in Megatron's format, in `folder`."""
    command = ["convert", "--to", "megatron", "--force", *flags, str(demo.MODEL), str(folder)]
    if not (folder / "latest_checkpointed_iteration.txt").is_file() and cli(command):
        sys.exit(2)
    return folder


def start_of(arm: Arm, folder: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint that the first stage starts from (None: random weights), and the teacher's flags."""
    pool = ["--kv-heads", str(arm["kv_heads"])] if "kv_heads" in arm else []
    base = None if arm.get("from_scratch") else converted(folder / "base", *pool)
    if not arm.get("teacher"):
        return base, []
    teacher = base if base and not pool else converted(folder / "teacher")
    return base, ["--dmc-teacher", str(teacher)]


def train(arm: Arm, seed: int, folder: Path, short: bool) -> list[Path]:
    """Run the arm's stages; returns their folders."""
    recipe = recipe_of(arm, seed, short)
    data = demo.prepare_data(folder.parent, demo.MODEL / "tokenizer.model")
    source = demo.MODEL
    previous, teacher_flags = start_of(arm, folder)
    # the index of the data's samples is the run's own: two runs would write it at the same time
    flags = demo.megatron_flags(source, data, folder, source / "tokenizer.model")
    flags += shape_flags(arm) + teacher_flags
    folders = []
    for stage, steps in stages_of(arm, recipe, short).items():
        marker = folder / f"{stage}.done"
        warm_up = ["--lr-warmup-iters", str(max(1, steps // 10))] if previous is None else []
        if not marker.is_file():
            demo.train(
                stage, steps, recipe, folder, previous,
                [*flags, *stage_flags(arm, stage, recipe), *warm_up],
            )  # fmt: skip
            marker.touch()
        previous = folder / stage
        folders.append(previous)
    return folders


def checkpoints_on_the_way(folders: list[Path]) -> Iterator[tuple[int, Path]]:
    """(steps so far, iteration folder) of all that the stages saved."""
    before = 0
    for folder in folders:
        iterations = sorted(folder.glob("iter_*"))
        for iteration in iterations:
            yield before + int(iteration.name[5:]), iteration
        before += int(iterations[-1].name[5:])


def measure(arm: Arm, folders: list[Path], data: Path, short: bool) -> dict:
    """Held-out perplexity and measured CR: at each length, and on the way through training."""
    import torch

    from megatron_dmc.checkpoint.load import load_model
    from megatron_dmc.quality.likelihood import evaluate, read_tokens
    from megatron_dmc.quality.report.measure import environment

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = read_tokens(data)

    def result(checkpoint: Path, length: int, limit: int | None) -> dict:
        loaded = load_model(
            checkpoint, device=device, dtype=torch.float32 if device == "cpu" else None
        )
        evaluation = evaluate(
            loaded, tokens, length=length, limit=4 if short else limit, progress=False
        )
        return {
            "perplexity": evaluation.perplexity,
            "measured_cr": evaluation.measured_cr,
            "cache_cr": evaluation.cache_cr,
            "measured_cr_per_layer_head": evaluation.measured_cr_LG,
        }

    at = arm.get("seq_length", demo.SEQ_LENGTH)
    curve = {
        str(steps): result(checkpoint, at, CURVE_WINDOWS)
        for steps, checkpoint in checkpoints_on_the_way(folders)
    }
    lengths = {str(length): result(folders[-1], length, None) for length in arm["lengths"]}
    return {"lengths": lengths, "curve": curve, "environment": environment()}


def run(arm: Arm, seed: int, output: Path, short: bool) -> None:
    """An arm with a seed, as far as it is not done."""
    folder = output / f"{arm['name']}-seed{seed}"
    metrics = folder / "metrics.json"
    if metrics.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(arm | {"seed": seed, "short": short}, indent=1)
    if (folder / "config.json").is_file() and (folder / "config.json").read_text() != config:
        sys.exit(f"{folder} was begun with other settings; remove it or choose another --output")
    (folder / "config.json").write_text(config)
    folders = train(arm, seed, folder, short)
    result = measure(arm, folders, output / "data" / "heldout_text_document", short)
    metrics.write_text(json.dumps({"arm": arm, "seed": seed, **result}, indent=1) + "\n")
    for used in (folder / "base", folder / "teacher", folder / "cache", *folders[:-1]):
        shutil.rmtree(used, ignore_errors=True)
    for iteration in sorted(folders[-1].glob("iter_*"))[:-1]:
        shutil.rmtree(iteration)


def run_side_by_side(
    wanted: list[tuple[Arm, int]], output: Path, short: bool, arms: Path, jobs: int
) -> None:
    """Each arm and seed as a process of its own, `jobs` at a time, which share the cores.

    A run that fails is named at the end, and the others continue.
    """
    from tqdm import tqdm

    demo.prepare_data(output, demo.MODEL / "tokenizer.model")
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)

    def one(arm: Arm, seed: int) -> str:
        name = f"{arm['name']}-seed{seed}"
        command = [sys.executable, __file__, "--arms", str(arms), "--arm", arm["name"],
                   "--seed", str(seed), "--output", str(output)]  # fmt: skip
        with open(output / f"{name}.log", "ab") as log:
            code = subprocess.run(
                [*command, *(["--short"] if short else [])],
                stdout=log, stderr=subprocess.STDOUT, check=False,
                env=dict(os.environ, OMP_NUM_THREADS=str(threads)),
            ).returncode  # fmt: skip
        return f"{name} (its output: {log.name})" if code else ""

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one, arm, seed) for arm, seed in wanted]
        done = tqdm(as_completed(futures), total=len(futures), unit="run")
        failed = [future.result() for future in done if future.result()]
    if failed:
        sys.exit("failed: " + ", ".join(failed))


def table(output: Path) -> str:
    """Markdown: of each group, mean and spread over seeds of the arms that have run."""
    data = result_data.collect(output, output / "analysis")
    if not data["arms"]:
        sys.exit(f"{output}: no arm has been run there")
    groups = dict.fromkeys(entry["arm"]["group"] for entry in data["arms"].values())
    return "\n\n".join(f"### {name}\n\n{result_tables.group_table(data, name)}" for name in groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arms", type=Path, default=Path(__file__).with_name("arms.toml"))
    parser.add_argument("--arm", nargs="+", help="only these; default: all")
    parser.add_argument("--group", nargs="+", help="only these groups of arms; default: all")
    parser.add_argument("--seed", type=int, nargs="+", help="only these; default: those of the arm")
    parser.add_argument("--output", type=Path, default=EXAMPLES.parent / "demo" / "experiments")
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, which share the cores (default: 1)"
    )
    parser.add_argument("--short", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--table", action="store_true", help="only print the results so far")
    args = parser.parse_args()
    output = args.output.resolve()
    if not args.table:
        silence_optional_packages()
        arms = read_arms(args.arms)
        groups = {arm["group"] for arm in arms.values()}
        for flag, given, known in (("--arm", args.arm, set(arms)), ("--group", args.group, groups)):
            if unknown := set(given or []) - known:
                parser.error(f"{flag} {' '.join(sorted(unknown))}: not in {args.arms}")
        wanted = [
            (arm, seed)
            for seed in sorted({seed for arm in arms.values() for seed in arm["seeds"]})
            for name, arm in arms.items()
            if seed in arm["seeds"]
            and name in (args.arm or arms)
            and arm["group"] in (args.group or groups)
            and seed in (args.seed or arm["seeds"])
        ]
        if not wanted:
            parser.error(f"no arm of {args.arms} has the seeds {args.seed} in that choice")
        if args.jobs > 1:
            run_side_by_side(wanted, output, args.short, args.arms, args.jobs)
        else:
            for arm, seed in wanted:
                run(arm, seed, output, args.short)
    print(table(output))


if __name__ == "__main__":
    main()
