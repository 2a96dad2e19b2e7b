"""`megatron-dmc bench serve|throughput|latency`: flags, named as vLLM's where it has them."""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from megatron_dmc.engine.flags import add_engine_arguments
from megatron_dmc.errors import DMCError

HIGHEST_RANDOM_ID = 500
"""Random prompts draw their token ids from [3, this): every vocabulary has those."""


def add_serve(parser: argparse.ArgumentParser) -> None:
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


def add_server(parser: argparse.ArgumentParser) -> None:
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


def add_latency(parser: argparse.ArgumentParser) -> None:
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
    add_engine_arguments(parser)
    _add_sweep(parser, num_in, num_out)
    parser.add_argument(
        "--num-iters", type=int, default=repeats, help=f"repeats (default: {repeats})"
    )


def _add_sweep(parser: argparse.ArgumentParser, num_in: int, num_out: int) -> None:
    """Flags of the sweep and of its output files."""
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
    group.add_argument("--csv", metavar="FILE", help="also write the rows here")
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


def prompts(
    args: argparse.Namespace, count: int, *, range_ratio: float = 0.0, seed: int = 0
) -> list[tuple[Any, int]]:
    """(prompt, tokens to generate) of `count` requests; a short dataset is gone through again.

    Raises:
        DMCError: a length is not positive, or the dataset is missing or malformed.
    """
    if min(args.input_len, args.output_len, count) < 1:
        raise DMCError(
            f"{count} prompts of {args.input_len} tokens, {args.output_len} to generate: all three must "
            "be 1 or more"
        )
    if not 0 <= range_ratio < 1:
        raise DMCError(f"--random-range-ratio {range_ratio:g}: use 0 or more, less than 1")
    if args.dataset_path is not None:
        rows = list(_read(args.dataset_path))
        return [
            (row["prompt"], int(row.get("output_tokens", args.output_len)))
            for row in (rows[i % len(rows)] for i in range(count))
        ]
    generator = random.Random(seed)

    def length(mean: int) -> int:
        return max(1, round(mean * generator.uniform(1 - range_ratio, 1 + range_ratio)))

    return [
        (
            [generator.randrange(3, HIGHEST_RANDOM_ID) for _ in range(length(args.input_len))],
            length(args.output_len),
        )
        for _ in range(count)
    ]


def _read(path: str) -> Iterator[dict[str, Any]]:
    found = False
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("prompt"), str | list):
                    raise DMCError(f'--dataset-path {path}: line {number} has no "prompt"')
                found = True
                yield row
    except (OSError, ValueError) as e:
        raise DMCError(f"--dataset-path {path}: {e}") from e
    if not found:
        raise DMCError(f"--dataset-path {path}: it is empty")
