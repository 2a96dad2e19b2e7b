"""`megatron-dmc bench suite`: the tables of docs/performance.md, measured by one command.

Every experiment is some `bench` commands, which the tables name and which can be run alone. Results go into a
folder: a subfolder for each command (JSON, CSV, plots), one table for each experiment (CSV, Markdown in
results.md). A command that fails is a line in its table; the others run on. The last line printed is one JSON
document; the exit status is 1 if a command failed.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from megatron_dmc.bench.measure import Settings, document, release_memory
from megatron_dmc.bench.output import Curves, Result, Row, markdown, write_csv
from megatron_dmc.bench.suite_experiments import EXPERIMENTS, Experiment
from megatron_dmc.errors import DMCError

_ENGINE = {
    "command": "command", "model": "model", "engine": "engine", "cr": "CR", "measured_cr": "measured CR",
    "batch_size": "batch", "input_len": "prompt", "output_len": "generated",
    "decode_tokens_per_second": "decode tokens/s", "roofline_tokens_per_second": "roofline",
    "fraction_of_roofline": "of it", "speedup": "ratio", "must_reach": "must reach",
    "output_tokens_per_second": "tokens/s, prefill included", "decode_spread": "spread",
    "fragmentation": "pages / live bytes", "num_preemptions": "preemptions", "skipped": "not measured",
}  # fmt: skip
_KERNELS = {
    "op": "op", "variant": "kernel", "batch": "batch", "tokens": "tokens", "cr": "CR",
    "group": "group", "skewed": "skewed", "median_ms": "ms", "fraction_of_copy": "of a copy",
    "time_over_attention": "over attention", "skipped": "not measured",
}  # fmt: skip


SMOKE_MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128,
    "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 8, "head_dim": 16, "vocab_size": 4096, "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    "torch_dtype": "float32",
}  # fmt: skip
_SMOKE_FLAGS = {
    "--input-len": "96", "--output-len": "32", "--max-num-batched-tokens": "2048", "--num-iters": "1",
}  # fmt: skip


def command_line(command: str, args: argparse.Namespace, folder: Path) -> list[str]:
    """A command's arguments as they are run: model, smoke shapes, folder."""
    words = command.split()
    flags = dict.fromkeys(["--output"], str(folder))
    if args.cpu_smoke:
        flags |= {"--device": "cpu"}
        if words[0] == "kernels":
            flags |= {"--dtype": "float32", "--lengths": "64", "--repeats": "2"}
        else:
            flags |= {k: v for k, v in _SMOKE_FLAGS.items() if k in words}
            flags |= {"--num-pages": "1200"}
    if args.model and words[0] != "kernels":
        flags["--model"] = args.model
    for flag, value in flags.items():
        if flag in words:
            words[words.index(flag) + 1] = value
        else:
            words += [flag, value]
    if words[0] != "kernels":
        words += ["--load-format", "dummy"]
    return words


def _run_command(words: list[str]) -> list[Row]:
    """A command's rows; its files are written."""
    from megatron_dmc.bench import command

    parser = argparse.ArgumentParser(prog="megatron-dmc bench")
    command.add_arguments(parser)
    result = command.measure(parser.parse_args(words))
    result.write()
    return result.document["rows"]


def run(args: argparse.Namespace) -> Result:
    """Run the experiments; prints their tables.

    Raises:
        DMCError: one of them does not exist, or there is no GPU.
    """
    known = {e.name: e for e in EXPERIMENTS}
    if unknown := [name for name in args.experiments if name not in known]:
        raise DMCError(f"bench suite {unknown[0]}: no such experiment; use {', '.join(known)}")
    if not torch.cuda.is_available() and not args.cpu_smoke:
        raise DMCError("bench suite: there is no GPU; --cpu-smoke runs tiny shapes on the CPU")
    chosen = [known[name] for name in dict.fromkeys(args.experiments)] or EXPERIMENTS
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    if args.cpu_smoke and args.model is None:
        model = folder / "smoke-model.json"
        model.write_text(json.dumps(SMOKE_MODEL))
        args.model = str(model)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() and not args.cpu_smoke else None
    parts = [f"# Results on {gpu or 'a CPU: tiny shapes that say nothing about a GPU'}\n"]
    tables: dict[str, list[Row]] = {}
    failures: list[str] = []
    curves: dict[str, Curves] = {}
    for experiment in chosen:
        rows, lines = [], []
        for number, command in enumerate(experiment.commands):
            place = folder / f"{experiment.name}-{number + 1}"
            words = command_line(command, args, place)
            line = "megatron-dmc bench " + " ".join(words)
            lines.append(line)
            print(f"== {experiment.title}\n   {line}", flush=True)
            rows += _rows_of(words, number, failures)
            release_memory()
        compare(experiment, rows)
        tables[experiment.name] = rows
        write_csv(rows, folder / f"{experiment.name}.csv")
        parts.append(section(experiment, lines, rows))
        # after each: a run that is cut off leaves what it has
        (folder / "results.md").write_text("\n".join(parts))
        if experiment.name != "kernels":
            series = ["model", "engine", *(["batch_size"] if experiment.name == "e3" else [])]
            metric, title = experiment.metric, experiment.title
            curves[experiment.name] = Curves(rows, "cr", metric, series, title)
    settings = Settings(torch.device("cuda" if gpu else "cpu"), torch.bfloat16, (), 1, folder)
    result = document("suite", settings, tables=tables, failures=failures)
    print("\n".join(parts))
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return Result(result, folder, curves=curves, exit_code=1 if failures else 0)


def _rows_of(words: list[str], number: int, failures: list[str]) -> list[Row]:
    try:
        rows = _run_command(words)
    except (DMCError, RuntimeError, ValueError, OSError) as e:
        # out of memory is a RuntimeError too
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        failures.append(f"{' '.join(words)}: {reason}")
        return [{"command": number + 1, "skipped": reason}]
    model = Path(words[words.index("--model") + 1]).stem if "--model" in words else None
    return [{"command": number + 1, "model": model, **row} for row in rows]


def compare(experiment: Experiment, rows: list[Row]) -> None:
    """Add `speedup` and `must_reach` to the rows that have something to be compared with."""
    measured = [row for row in rows if row.get(experiment.metric)]
    for row in measured:
        if row.get("engine", "megatron-dmc") != "megatron-dmc":
            continue
        base = next((r for r in measured if r is not row and experiment.base(row, r)), None)
        if base is not None:
            row["speedup"] = row[experiment.metric] / base[experiment.metric]
            row["must_reach"] = experiment.must_reach.get(row["cr"])


def section(experiment: Experiment, lines: list[str], rows: list[Row]) -> str:
    """Title, commands and table."""
    columns = _KERNELS if experiment.name == "kernels" else _ENGINE
    used = {k: title for k, title in columns.items() if any(row.get(k) is not None for row in rows)}
    commands = "\n".join(f"{i}. `{line}`" for i, line in enumerate(lines, start=1))
    return f"## {experiment.title}\n\n{commands}\n\n{markdown(rows, used)}\n"
