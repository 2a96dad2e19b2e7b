"""The comparisons of docs/results.md: run the arms of arms.toml, then table and plot what they gave.

    python examples/experiments/run.py [--arm NAME ...] [--seed N ...] [--output experiments]
    python examples/experiments/run.py --table

Each arm and seed has a folder with config.json, the stages' logs and checkpoints, and metrics.json, which
is written last: an arm that has one is done, any other goes on from its newest checkpoint. An arm takes
about as long as `make demo`.
"""

import argparse
import json
import shutil
import statistics
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))

from megatron_dmc.cli import main as cli
from megatron_dmc.cli import silence_optional_packages

import demo

PLAN_KEYS = {field.name for field in fields(demo.Plan)}


def read_arms(file: Path) -> tuple[dict[str, dict], list[int], list[int]]:
    """Arms by name, seeds, evaluation lengths."""
    config = tomllib.loads(file.read_text())
    return {arm["name"]: arm for arm in config["arm"]}, config["seeds"], config["lengths"]


def plan_of(arm: dict, seed: int, short: bool) -> demo.Plan:
    """The demo's settings with what the arm changes."""
    settings = {key: value for key, value in arm.items() if key in PLAN_KEYS}
    if short:
        settings |= {"zero_out": 2, "retrofit": 2, "finetune": 2}
    return demo.Plan(**settings | {"seed": 1000 * seed + 234})


def stage_flags(arm: dict, stage: str, plan: demo.Plan) -> list[str]:
    if arm["kind"] == "plain":
        return ["--dmc-stage", "off"]
    extra = []
    for key, value in arm.items():
        if key in PLAN_KEYS or key in ("name", "kind"):
            continue
        flag = "--dmc-" + key.replace("_", "-")
        extra += [flag] if value is True else [flag, str(value)]
    return [*demo.dmc_flags(stage, plan), *extra]


def train(arm: dict, seed: int, folder: Path, short: bool) -> Path:
    """Run the arm's stages; returns the last checkpoint."""
    plan = plan_of(arm, seed, short)
    data = demo.prepare_data(folder.parent, demo.MODEL / "tokenizer.model")
    source = demo.MODEL
    base = folder / "base"
    if not (base / "latest_checkpointed_iteration.txt").is_file():
        command = ["convert", "--to", "megatron", "--force"]
        if "kv_heads" in arm:
            command += ["--kv-heads", str(arm["kv_heads"])]
        if cli([*command, str(source), str(base)]):
            sys.exit(2)
    flags = demo.megatron_flags(source, data, folder.parent, source / "tokenizer.model")
    if "kv_heads" in arm:
        at = flags.index("--num-query-groups")
        flags[at + 1] = str(arm["kv_heads"])
    previous = base
    for stage, steps in plan.stages.items():
        if steps:
            marker = folder / f"{stage}.done"
            if not marker.is_file():
                demo.train(
                    stage, steps, plan, folder, previous, [*flags, *stage_flags(arm, stage, plan)]
                )
                marker.touch()
            previous = folder / stage
    return previous


def measure(arm: dict, checkpoint: Path, data: Path, lengths: list[int], limit: int | None) -> dict:
    """Held-out perplexity and measured CR at each length."""
    import torch

    from megatron_dmc.evaluation import evaluate, read_tokens
    from megatron_dmc.models import load_model
    from megatron_dmc.report.measure import environment

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(checkpoint, device=device, dtype=torch.float32 if device == "cpu" else None)
    tokens = read_tokens(data)
    results = {}
    for length in lengths:
        evaluation = evaluate(
            loaded, tokens, length=length, limit=limit, label=f"{arm['name']} {length}"
        )
        results[str(length)] = {
            "perplexity": evaluation.perplexity,
            "measured_cr": evaluation.measured_cr,
            "measured_cr_per_layer_head": evaluation.measured_cr_LG,
        }
    return {"lengths": results, "environment": environment()}


def run(arm: dict, seed: int, lengths: list[int], output: Path, short: bool) -> None:
    folder = output / f"{arm['name']}-seed{seed}"
    metrics = folder / "metrics.json"
    if metrics.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(arm | {"seed": seed, "short": short}, indent=1)
    if (folder / "config.json").is_file() and (folder / "config.json").read_text() != config:
        sys.exit(f"{folder} was begun with other settings; remove it or choose another --output")
    (folder / "config.json").write_text(config)
    checkpoint = train(arm, seed, folder, short)
    heldout = output / "data" / "heldout_text_document"
    result = measure(arm, checkpoint, heldout, lengths, 8 if short else None)
    metrics.write_text(json.dumps({"arm": arm, "seed": seed, **result}, indent=1) + "\n")
    for stage in ("base", "zero-out", "retrofit"):  # the last checkpoint stays
        if folder / stage != checkpoint:
            shutil.rmtree(folder / stage, ignore_errors=True)


def table(output: Path) -> str:
    """Markdown: mean and spread over seeds of every arm that has run."""
    runs: dict[str, list[dict]] = {}
    for file in sorted(output.glob("*/metrics.json")):
        result = json.loads(file.read_text())
        runs.setdefault(result["arm"]["name"], []).append(result)
    if not runs:
        sys.exit(f"{output}: no arm has been run there")
    lengths = sorted({int(n) for rows in runs.values() for n in rows[0]["lengths"]})
    lines = ["| arm | seeds | " + " | ".join(f"CR at {n} | perplexity at {n}" for n in lengths) + " |",
             "| --- | --- |" + " --- | --- |" * len(lengths)]  # fmt: skip

    def spread(values: list[float]) -> str:
        deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.3f}{deviation}"

    for name, rows in runs.items():
        cells = [
            spread([row["lengths"][str(n)][key] for row in rows])
            for n in lengths
            for key in ("measured_cr", "perplexity")
        ]
        lines.append(f"| {name} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arms", type=Path, default=Path(__file__).with_name("arms.toml"))
    parser.add_argument("--arm", nargs="+", help="only these; default: all")
    parser.add_argument("--seed", type=int, nargs="+", help="default: those of the file")
    parser.add_argument("--output", type=Path, default=EXAMPLES.parent / "demo" / "experiments")
    parser.add_argument("--short", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--table", action="store_true", help="only print the results so far")
    args = parser.parse_args()
    if not args.table:
        silence_optional_packages()
        arms, seeds, lengths = read_arms(args.arms)
        unknown = set(args.arm or []) - set(arms)
        if unknown:
            parser.error(f"--arm {' '.join(sorted(unknown))}: not in {args.arms}")
        for seed in args.seed or seeds:
            for name in args.arm or arms:
                run(arms[name], seed, lengths, args.output.resolve(), args.short)
    print(table(args.output.resolve()))


if __name__ == "__main__":
    main()
