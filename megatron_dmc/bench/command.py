"""`megatron-dmc bench NAME`: the table of benchmarks and their flags, named as vLLM's where it has them. No torch: a
benchmark's module is imported when it runs."""

import argparse
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_dmc.bench import suite, window
from megatron_dmc.bench.output import Result, finish
from megatron_dmc.bench.peers import command as peers
from megatron_dmc.engine.flags import add_engine_arguments, add_settings
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


def _add_host(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64, 256], metavar="B",
                        help="requests (default: 1, 16, 64 and 256)")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=30, help="timed steps (default: 30)")


def _add_decode(parser: argparse.ArgumentParser) -> None:
    _add_measured(parser)
    parser.add_argument("--layers", type=int, help="layers (default: 32, 2 on a CPU)")
    parser.add_argument("--batch", type=int, default=4, help="requests (default: 4)")
    parser.add_argument("--crs", type=float, nargs="+", default=[1.0, 2.0, 4.0, 8.0], metavar="CR",
                        help="imposed CRs (default: 1 2 4 8)")  # fmt: skip
    add_settings(parser, ["kv_cache_dtype"])


def _add_serve(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench serve`."""
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL")
    parser.add_argument("--endpoint", default="/v1/completions")
    parser.add_argument("--model", metavar="NAME", help="default: the first that the server lists")
    parser.add_argument("--api-key", help="default: environment variable OPENAI_API_KEY")
    parser.add_argument("--num-prompts", type=int, default=100)
    parser.add_argument(
        "--request-rate", type=float, default=float("inf"), help="per second; default: all at once"
    )
    parser.add_argument(
        "--burstiness", type=float, default=1.0,
        help="1: Poisson arrivals; less: burstier; more: more even (gamma distributed gaps)",
    )  # fmt: skip
    parser.add_argument("--max-concurrency", type=int, help="requests in progress, at most")
    _add_prompts(parser, "--random-input-len", "--random-output-len", 256, 128)
    parser.add_argument(
        "--random-range-ratio", type=float, default=0.0,
        help="lengths are drawn from [length x (1 - ratio), length x (1 + ratio)]",
    )  # fmt: skip
    parser.add_argument("--ignore-eos", action="store_true", help="full-length completions")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--extra-body", metavar="JSON", default="{}", help="parameters to add to every request"
    )
    parser.add_argument(
        "--goodput", nargs="+", default=[], metavar="METRIC:MS",
        help="count requests per second that keep these limits: ttft, tpot, e2el",
    )  # fmt: skip
    parser.add_argument("--metric-percentiles", default="50,90,99", metavar="P,...")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and the arrivals")
    parser.add_argument("--output", metavar="FILE", help="also write the JSON here")


def _add_startup(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="as of `generate` and `serve`")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs (default: 3)")


def _add_server(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench server`."""
    parser.add_argument(
        "--tokenizer", required=True, metavar="PATH", help="folder, or id of the Hub"
    )
    parser.add_argument("--streams", type=int, default=64, help="completions at a time")
    parser.add_argument(
        "--requests", type=int, default=4, help="of each stream, one after the other"
    )
    parser.add_argument("--output-len", type=int, default=256, help="tokens of a completion")
    parser.add_argument(
        "--step-ms",
        type=float,
        default=200,
        help="from one step of the engine to the next, if the client is late",
    )


def add_throughput(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench throughput`."""
    parser.add_argument(
        "--num-prompts", type=int, help="requests; default: as many as run at a time"
    )
    _add_engine_and_sweep(parser, num_in=128, num_out=128, repeats=1)
    parser.add_argument(
        "--max-num-seqs", type=_list_of(int, auto=True), default=[64], metavar="N,...",
        help="requests that run at a time (default: 64); auto: as many as the cache holds",
    )  # fmt: skip


def _add_latency(parser: argparse.ArgumentParser) -> None:
    """Flags of `bench latency`."""
    parser.add_argument(
        "--batch-size", type=_list_of(int), default=[8], metavar="B,...", help="default: 8"
    )
    parser.add_argument("--num-iters-warmup", type=int, default=1)
    _add_engine_and_sweep(parser, num_in=32, num_out=128, repeats=5)
    parser.set_defaults(num_prompts=None)  # one batch


def _add_engine_and_sweep(
    parser: argparse.ArgumentParser, *, num_in: int, num_out: int, repeats: int
) -> None:
    """Flags of the engine, of the sweep, and of its output files."""
    add_engine_arguments(parser)
    parser.add_argument(
        "--num-iters", type=int, default=repeats, help=f"repeats (default: {repeats})"
    )
    group = parser.add_argument_group("benchmark")
    group.add_argument(
        "--load-format", choices=["auto", "dummy"], default="auto",
        help="dummy: random weights; MODEL is then one of the names that plan knows (llama2-7b, "
        "llama2-13b, llama2-70b, llama3-8b, qwen3-8b, ...), a folder or a config.json",
    )  # fmt: skip
    group.add_argument(
        "--simulate-cr", type=_list_of(float), metavar="CR,...",
        help="impose merge decisions that give this CR, total tokens / total entries; 1: the engine "
        "without DMC (default: as the model decides)",
    )  # fmt: skip
    group.add_argument(
        "--simulate-cr-profile", metavar="FILE",
        help="JSON that megatron-dmc report wrote: how the CR spreads over layers and heads (default: "
        "log-normal)",
    )  # fmt: skip
    group.add_argument(
        "--tensor-parallel-slice", type=int, default=1, metavar="N",
        help="run one rank's share of N on this device: its heads, its part of the MLP and of the "
        "vocabulary; communication is left out",
    )  # fmt: skip
    group.add_argument(
        "--dense-baseline", action="store_true",
        help="dense attention over contiguous caches in the same engine, at CR 1",
    )  # fmt: skip
    group.add_argument(
        "--compare", choices=["transformers"], help="then run another engine on the same requests"
    )
    _add_prompts(parser, "--input-len", "--output-len", num_in, num_out, lists=True)
    group.add_argument(
        "--output", metavar="FOLDER", help="also write JSON, CSV and plots into this folder"
    )


def _list_of(kind: type, *, auto: bool = False) -> Callable[[str], list[Any]]:
    """The type of a flag that takes one number or several, separated by commas; all at least 1."""

    def parse(text: str) -> list[Any]:
        values = [None if auto and word == "auto" else kind(word) for word in text.split(",")]
        if any(value is not None and not value >= 1 for value in values):
            raise argparse.ArgumentTypeError(f"{text}: use numbers of 1 or more")
        return values

    parse.__name__ = f"list of {kind.__name__}"
    return parse


def _add_prompts(
    parser: argparse.ArgumentParser, in_flag: str, out_flag: str, num_in: int, num_out: int,
    *, lists: bool = False,
) -> None:  # fmt: skip
    """Flags of `prompts`; with `lists` of both lengths several, for a sweep."""
    for flag, dest, number, text in (
        (in_flag, "input_len", num_in, "tokens of a prompt"),
        (out_flag, "output_len", num_out, "tokens to generate"),
    ):
        parser.add_argument(
            flag, dest=dest, help=f"{text} (default: {number})",
            type=_list_of(int) if lists else int, default=[number] if lists else number,
            metavar="T,..." if lists else "T",
        )  # fmt: skip
    parser.add_argument(
        "--dataset-path", metavar="FILE",
        help='JSON lines with "prompt" and perhaps "output_tokens"; default: random token ids, which '
        "say nothing about compression",
    )  # fmt: skip


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
    Benchmark("host", "host",
              "host time of the engine's decode step outside of the model", _add_host),
    Benchmark("serve", "load",
              "a load of streamed completions on a running OpenAI-compatible server",
              _add_serve),
    Benchmark("server", "server",
              "the server's own work for each streamed token, with an engine without a model",
              _add_server),
    Benchmark("startup", "startup",
              "the time from the start of a process to its first token, generate and serve",
              _add_startup),
    Benchmark("throughput", "offline",
              "tokens per second of the engine, all requests given at once; lists (1,2,4) make a sweep",
              add_throughput),
    Benchmark("latency", "offline",
              "seconds of one batch through the engine, from prompts to last tokens; lists make a sweep",
              _add_latency),
    Benchmark("peers", "peers.command",
              "this engine next to transformers, vLLM for CPUs and llama.cpp on one model",
              peers.add_arguments),
    Benchmark("suite", "suite", "all tables of docs/performance.md, into a folder",
              suite.add_arguments),
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
