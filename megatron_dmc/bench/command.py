"""`megatron-dmc bench NAME`: the table of benchmarks. A benchmark's module is imported when it runs."""

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass

from megatron_dmc.bench import serving, suite_experiments, window
from megatron_dmc.bench.output import Result, finish
from megatron_dmc.bench.peers import command as peers
from megatron_dmc.engine.flags import add_settings
from megatron_dmc.errors import DMCError


def _add_measured(parser: argparse.ArgumentParser) -> None:
    """Flags of the benchmarks that fill in `measure.Settings`."""
    parser.add_argument("--device", help="default: the GPU if there is one")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="T",
        help="sequence lengths (default: those of docs/performance.md, small ones on a CPU)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, help="timed runs (default: 50, 5 on a CPU)")
    parser.add_argument("--output", metavar="FOLDER", help="also write the JSON and plots here")


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    _add_measured(parser)
    parser.add_argument(
        "--batches", type=int, nargs="+", metavar="B",
        help="requests (default: 1, 16, 64 and 256, 2 on a CPU)",
    )  # fmt: skip
    parser.add_argument(
        "--crs", type=float, nargs="+", metavar="CR",
        help="tokens over entries (default: 1, 4 and 8, 1 and 4 on a CPU)",
    )  # fmt: skip
    add_settings(parser, ["kv_cache_dtype"])
    parser.add_argument(
        "--prompts", type=int, nargs="+", metavar="T",
        help="tokens of a prompt that is prefilled (default: 4096 and 32768, 512 on a CPU)",
    )  # fmt: skip


def _add_train_step(parser: argparse.ArgumentParser) -> None:
    _add_measured(parser)
    parser.add_argument(
        "--layers", type=int, help="layers of the full step (default: 8, 2 on a CPU)"
    )


def _add_decode(parser: argparse.ArgumentParser) -> None:
    _add_measured(parser)
    parser.add_argument("--layers", type=int, help="layers (default: 32, 2 on a CPU)")
    parser.add_argument("--batch", type=int, default=4, help="requests (default: 4)")
    parser.add_argument("--crs", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0], metavar="CR",
                        help="imposed CRs (default: 1 2 4 8)")  # fmt: skip
    add_settings(parser, ["kv_cache_dtype"])


@dataclass(frozen=True)
class Benchmark:
    """A line of the table.

    Attributes:
        module: under `megatron_dmc.bench`, with `run(Namespace) -> Result`.
        help: a noun phrase.
        add_arguments: adds the flags.
    """

    name: str
    module: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]


BENCHMARKS = (
    Benchmark("train-kernels", "train_kernels",
              "merge and training attention against their ceilings and the alternatives",
              _add_measured),
    Benchmark("kernels", "decode_kernels",
              "decode attention and append over ragged pages against their bytes, and prefill",
              _add_kernels),
    Benchmark("train-step", "train_step",
              "a Transformer layer and a full training step, with and without DMC",
              _add_train_step),
    Benchmark("decode", "decode_step",
              "decode throughput over a long paged cache at several CRs", _add_decode),
    Benchmark("serve", "load",
              "a load of streamed completions on a running OpenAI-compatible server",
              serving.add_serve),
    Benchmark("server", "server",
              "the server's own work for each streamed token, with an engine without a model",
              serving.add_server),
    Benchmark("throughput", "offline",
              "tokens per second of the engine, all requests given at once; lists (1,2,4) make a sweep",
              serving.add_throughput),
    Benchmark("latency", "offline",
              "seconds of one batch through the engine, from prompts to last tokens; lists make a sweep",
              serving.add_latency),
    Benchmark("peers", "peers.command",
              "this engine next to transformers, vLLM for CPUs and llama.cpp on one model",
              peers.add_arguments),
    Benchmark("suite", "suite", "all tables of docs/performance.md, into a folder",
              suite_experiments.add_arguments),
    Benchmark("window", "window",
              "kernels and engine, checked and measured on one GPU within ten minutes",
              window.add_arguments),
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every benchmark as a subcommand; it sets `module` and `benchmark` in the namespace."""
    names = parser.add_subparsers(title="benchmarks", metavar="NAME", required=True)
    for benchmark in BENCHMARKS:
        sub = names.add_parser(
            benchmark.name,
            help=benchmark.help,
            description=f"Measure {benchmark.help}. The last line printed is a JSON document. On a "
            "CPU the figures say nothing about a GPU.",
            conflict_handler="resolve",  # throughput makes a list of the engine's --max-num-seqs
        )
        benchmark.add_arguments(sub)
        sub.set_defaults(module=benchmark.module, benchmark=benchmark.name)


def measure(args: argparse.Namespace) -> Result:
    """Run the chosen benchmark.

    Raises:
        DMCError: it runs the model and megatron-core is not installed; or as the benchmark's own `run`.
    """
    try:
        module = importlib.import_module(f"megatron_dmc.bench.{args.module}")
    except ImportError:
        try:
            importlib.import_module("megatron.core")
        except ImportError as missing:
            raise DMCError(
                f"bench {args.benchmark} runs the model and megatron-core does not import ({missing}): pip "
                "install megatron-core, or use the benchmarks that need none: kernels, train-kernels, window"
            ) from missing
        raise
    return module.run(args)


def run(args: argparse.Namespace) -> int:
    """Run the chosen benchmark, write its files and print its document."""
    return finish(measure(args))
