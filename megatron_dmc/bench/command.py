"""`megatron-dmc bench NAME`: arguments. The benchmark's own module is imported when it runs."""

import argparse
import importlib
from dataclasses import dataclass

from megatron_dmc.bench.serving import add_serving_benchmarks


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's name, its module with `run(Namespace) -> int`, and its help text."""

    name: str
    module: str
    help: str


BENCHMARKS = [
    Benchmark(
        "train-kernels",
        "megatron_dmc.bench.train_kernels",
        "merge and training attention against their ceilings and the alternatives",
    ),
    Benchmark(
        "train-step",
        "megatron_dmc.bench.train_step",
        "a Transformer layer and a full training step, with and without DMC",
    ),
]


def add_benchmarks(parser: argparse.ArgumentParser) -> None:
    """Add every benchmark as a subcommand; it sets `module` in the namespace."""
    names = parser.add_subparsers(title="benchmarks", metavar="NAME", required=True)
    for benchmark in BENCHMARKS:
        sub = names.add_parser(
            benchmark.name,
            help=benchmark.help,
            description=f"Measure {benchmark.help}. The last line printed is a JSON document. On a "
            "CPU the shapes are small and say nothing about a GPU.",
        )
        sub.add_argument("--device", help="default: the GPU if there is one")
        sub.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
        sub.add_argument(
            "--lengths", type=int, nargs="+", metavar="T",
            help="sequence lengths (default: as on the page of results, small ones on a CPU)",
        )  # fmt: skip
        sub.add_argument("--repeats", type=int, help="timed runs (default: 50, 5 on a CPU)")
        sub.add_argument("--output", metavar="FOLDER", help="also write the JSON and plots here")
        if benchmark.name == "train-step":
            sub.add_argument(
                "--layers", type=int, help="layers of the full step (default: 8, 2 on a CPU)"
            )
        sub.set_defaults(module=benchmark.module)
    add_serving_benchmarks(names)


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark."""
    return importlib.import_module(args.module).run(args)
