"""`megatron-dmc bench NAME`: arguments. The benchmark's own module is imported when it runs."""

import argparse
import importlib
from dataclasses import dataclass

from megatron_dmc.bench.serving import add_serving_benchmarks
from megatron_dmc.bench.suite_plan import add_suite
from megatron_dmc.bench.window import add_window
from megatron_dmc.engine.flags import add_settings
from megatron_dmc.errors import DMCError


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
        "kernels",
        "megatron_dmc.bench.decode_kernels",
        "decode attention and append over ragged pages against their bytes, and prefill",
    ),
    Benchmark(
        "train-step",
        "megatron_dmc.bench.train_step",
        "a Transformer layer and a full training step, with and without DMC",
    ),
    Benchmark(
        "decode",
        "megatron_dmc.bench.engine_decode",
        "decode throughput over a long paged cache at several CRs",
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
        if benchmark.name == "kernels":
            sub.add_argument(
                "--batches", type=int, nargs="+", metavar="B",
                help="requests (default: 1, 16, 64 and 256, 2 on a CPU)",
            )  # fmt: skip
            sub.add_argument(
                "--crs", type=float, nargs="+", metavar="CR",
                help="tokens over entries (default: 1, 4 and 8, 1 and 4 on a CPU)",
            )  # fmt: skip
            add_settings(sub, ["kv_cache_dtype"])
            sub.add_argument(
                "--prompts", type=int, nargs="+", metavar="T",
                help="tokens of a prompt that is prefilled (default: 4096 and 32768, 512 on a CPU)",
            )  # fmt: skip
        if benchmark.name == "decode":
            sub.add_argument("--layers", type=int, help="layers (default: 32, 2 on a CPU)")
            sub.add_argument("--batch", type=int, default=4, help="requests (default: 4)")
            sub.add_argument("--crs", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0],
                             metavar="CR", help="imposed CRs (default: 1 2 4 8)")  # fmt: skip
            add_settings(sub, ["kv_cache_dtype"])
        sub.set_defaults(module=benchmark.module, benchmark=benchmark.name)
    add_serving_benchmarks(names)
    add_suite(names)
    add_window(names)


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark.

    Raises:
        DMCError: it runs the model and megatron-core is not there; or as the benchmark's own `run`.
    """
    try:
        benchmark = importlib.import_module(args.module)
    except ImportError:
        try:
            importlib.import_module("megatron.core")
        except ImportError as missing:
            name = args.module.rsplit(".", 1)[1].replace("_", "-")
            raise DMCError(
                f"bench {getattr(args, 'benchmark', name)} runs the model and megatron-core does not import "
                f"({missing}): pip install megatron-core, or use the benchmarks that need none: kernels, "
                "train-kernels, window"
            ) from missing
        raise
    return benchmark.run(args)
