"""`megatron-dmc bench suite`: the tables of docs/performance.md, measured by one command.

Every experiment is some `bench` commands, which the tables name and which can be run alone. Results go into a
folder: a subfolder for each command (JSON, CSV, plots), one table for each experiment (CSV, Markdown in
results.md). A command that fails is a line in its table; the others run on. The last line printed is one JSON
document; the exit status is 1 if a command failed. Experiments and flags need no torch.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_dmc.bench.output import Curves, Result, Row, markdown, write_csv
from megatron_dmc.errors import DMCError


@dataclass(frozen=True)
class Experiment:
    """A table.

    Attributes:
        commands: arguments of `megatron-dmc bench`.
        must_reach: of each CR, the ratio of `metric` to that of the base.
        same: columns in which a row agrees with its base: the row of CR 1, for CR 1 that of another engine.
    """

    name: str
    title: str
    commands: tuple[str, ...]
    must_reach: dict[float, float]
    same: tuple[str, ...] = ("command", "input_len", "output_len")
    metric: str = "decode_tokens_per_second"


_LONG = "--input-len 2048 --output-len 2048 --max-num-seqs auto --max-num-batched-tokens 8192"

_AT_BATCH = ("input_len", "output_len", "batch_size")

E1_MUST_REACH = {2.0: 1.9, 4.0: 3.7, 8.0: 7.0}
E7_MUST_REACH = 0.95
"""Ratio to dense attention."""

EXPERIMENTS = [
    Experiment(
        "kernels", "K4 and K5: attention and append of a decode step", ("kernels",), {},
    ),
    Experiment(
        "e1", "E1: decode throughput, largest batch that fits",
        (f"throughput --model llama2-7b --simulate-cr 1,2,4,8 {_LONG} --num-iters 3",
         f"throughput --model llama2-13b --simulate-cr 1,2,4,8 {_LONG} --num-iters 3"),
        E1_MUST_REACH,
    ),
    Experiment(
        "e2", "E2: without DMC, against the roofline (must reach 80 % of it) and another engine",
        (f"throughput --model llama2-7b --simulate-cr 1 {_LONG} --num-iters 3 --compare transformers",),
        {1.0: 1.0}, _AT_BATCH,
    ),
    Experiment(
        "e3", "E3: latency per token at equal batch and 4k context",
        ("latency --model llama2-7b --simulate-cr 1,2,4,8 --batch-size 1,4,16 --input-len 3968 "
         "--output-len 128 --num-iters 3",),
        {2.0: 1.0, 4.0: 1.0, 8.0: 1.0}, _AT_BATCH,
    ),
    Experiment(
        "e4", "E4: one rank's slice of a 70B in tensor parallel 8, communication excluded",
        (f"throughput --model llama2-70b --tensor-parallel-slice 8 --simulate-cr 1,2,4,8 {_LONG} "
         "--num-iters 3",),
        E1_MUST_REACH,
    ),
    Experiment(
        "e5", "E5: pages held / bytes of live entries at CR 4, 4k tokens (at most 1.10)",
        ("throughput --model llama2-7b --simulate-cr 4 --input-len 3968 --output-len 128 "
         "--max-num-seqs 16",),
        {},
    ),
    Experiment(
        "e7", "E7: per-head paging at CR 1 against dense attention in the same engine",
        ("latency --model llama2-7b --simulate-cr 1 --batch-size 1,8 --input-len 3968 "
         "--output-len 128 --num-iters 3",
         "latency --model llama2-7b --simulate-cr 1 --batch-size 1,8 --input-len 3968 "
         "--output-len 128 --num-iters 3 --dense-baseline"),
        {1.0: E7_MUST_REACH}, _AT_BATCH,
    ),
    Experiment(
        "e8", "E8: 40k tokens of context, 8 requests",
        ("throughput --model qwen3-8b --simulate-cr 1,4,8 --input-len 40448 --output-len 512 "
         "--max-num-seqs 8 --max-num-batched-tokens 8192 --num-iters 3",),
        {4.0: 1.5, 8.0: 2.0},
    ),
]  # fmt: skip

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument(
        "experiments", nargs="*", metavar="NAME",
        help="default: all; " + "; ".join(f"{e.name}: {e.title}" for e in EXPERIMENTS),
    )  # fmt: skip
    parser.add_argument("--output", metavar="FOLDER", required=True, help="where results go")
    parser.add_argument("--model", metavar="MODEL", help="instead of the experiments' models")
    parser.add_argument(
        "--cpu-smoke", action="store_true",
        help="a tiny model and short prompts on the CPU: shows that everything runs, measures nothing",
    )  # fmt: skip


def command_line(command: str, args: argparse.Namespace, folder: Path) -> list[str]:
    """A command's arguments as they are run: model, smoke shapes, folder."""
    words = command.split()
    flags = {"--output": str(folder)}
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


def _rows_of(words: list[str], number: int, failures: list[str]) -> list[Row]:
    try:
        rows = _run_command(words)
    except (DMCError, RuntimeError, ValueError, OSError) as e:
        # out of memory is a RuntimeError too
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        failures.append(f"{' '.join(words)}: {reason}")
        return [{"command": number, "skipped": reason}]
    model = Path(words[words.index("--model") + 1]).stem if "--model" in words else None
    return [{"command": number, "model": model, **row} for row in rows]


def run(args: argparse.Namespace) -> Result:
    """Run the experiments; prints their tables.

    Raises:
        DMCError: one of them does not exist, or there is no GPU.
    """
    import torch

    from megatron_dmc.bench.measure import Settings, document, release_memory

    known = {e.name: e for e in EXPERIMENTS}
    if unknown := [name for name in args.experiments if name not in known]:
        raise DMCError(f"bench suite {unknown[0]}: no such experiment; use {', '.join(known)}")
    if not torch.cuda.is_available() and not args.cpu_smoke:
        raise DMCError("bench suite: there is no GPU; --cpu-smoke runs tiny shapes on the CPU")
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    if args.cpu_smoke and args.model is None:
        model = folder / "smoke-model.json"
        model.write_text(json.dumps(SMOKE_MODEL))
        args.model = str(model)
    settings = Settings(
        torch.device("cpu" if args.cpu_smoke else "cuda"), torch.bfloat16, (), 1, folder
    )
    failures: list[str] = []
    tables: dict[str, list[Row]] = {}
    result = document("suite", settings, tables=tables, failures=failures)
    gpu = result["gpu"] or "a CPU: tiny shapes that say nothing about a GPU"
    parts = [f"# Results on {gpu}\n"]
    curves: dict[str, Curves] = {}
    for name in dict.fromkeys(args.experiments or known):
        experiment = known[name]
        rows, lines = tables.setdefault(name, []), []
        for number, command in enumerate(experiment.commands, start=1):
            words = command_line(command, args, folder / f"{name}-{number}")
            lines.append("megatron-dmc bench " + " ".join(words))
            print(f"== {experiment.title}\n   {lines[-1]}", flush=True)
            rows += _rows_of(words, number, failures)
            release_memory()
        compare(experiment, rows)
        write_csv(rows, folder / f"{name}.csv")
        parts.append(section(experiment, lines, rows))
        # after each: a run that is cut off leaves what it has
        (folder / "results.md").write_text("\n".join(parts))
        if name != "kernels":
            series = ["model", "engine", *(["batch_size"] if name == "e3" else [])]
            curves[name] = Curves(rows, "cr", experiment.metric, series, experiment.title)
    print("\n".join(parts))
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return Result(result, folder, curves=curves, exit_code=1 if failures else 0)


def compare(experiment: Experiment, rows: list[Row]) -> None:
    """Add `speedup` and `must_reach` to the rows that have something to be compared with."""
    measured = [row for row in rows if row.get(experiment.metric)]

    def is_base(other: Row, row: Row) -> bool:
        is_another = row["cr"] != 1 or row["engine"] != other["engine"]
        return other["cr"] == 1 and is_another and all(row[k] == other[k] for k in experiment.same)

    for row in measured:
        base = next((other for other in measured if is_base(other, row)), None)
        if row["engine"] == "megatron-dmc" and base is not None:
            row["speedup"] = row[experiment.metric] / base[experiment.metric]
            row["must_reach"] = experiment.must_reach.get(row["cr"])


def section(experiment: Experiment, lines: list[str], rows: list[Row]) -> str:
    """Title, commands and table."""
    columns = _KERNELS if experiment.name == "kernels" else _ENGINE
    used = {k: title for k, title in columns.items() if any(row.get(k) is not None for row in rows)}
    commands = "\n".join(f"{i}. `{line}`" for i, line in enumerate(lines, start=1))
    return f"## {experiment.title}\n\n{commands}\n\n{markdown(rows, used)}\n"
