"""The experiments and flags of `megatron-dmc bench suite`. No torch."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from megatron_dmc.bench.output import Row


@dataclass(frozen=True)
class Experiment:
    """One of benchmarks' tables.

    Attributes:
        commands: arguments of `megatron-dmc bench`.
        must_reach: of each CR, the ratio of `metric` to that of the base.
        base: (row, other) -> whether `other` is what `row` is compared with.
    """

    name: str
    title: str
    commands: tuple[str, ...]
    must_reach: dict[float, float]
    base: Callable[[Row, Row], bool]
    metric: str = "decode_tokens_per_second"


def _uncompressed(row: Row, other: Row) -> bool:
    """CR 1 of the same model and lengths, whatever its batch."""
    same = ("command", "input_len", "output_len")
    return other["cr"] == 1 and all(row[k] == other[k] for k in same)


def _uncompressed_at_batch(row: Row, other: Row) -> bool:
    return _uncompressed(row, other) and row["batch_size"] == other["batch_size"]


def _other_engine(row: Row, other: Row) -> bool:
    same = ("input_len", "output_len", "batch_size")
    return row["engine"] != other["engine"] and all(row[k] == other[k] for k in same)


_LONG = "--input-len 2048 --output-len 2048 --max-num-seqs auto --max-num-batched-tokens 8192"

E1_MUST_REACH = {2.0: 1.9, 4.0: 3.7, 8.0: 7.0}
E7_MUST_REACH = 0.95
"""Ratio to dense attention."""

EXPERIMENTS = [
    Experiment(
        "kernels", "K4 and K5: attention and append of a decode step", ("kernels",), {},
        _uncompressed,
    ),
    Experiment(
        "e1", "E1: decode throughput, largest batch that fits",
        (f"throughput --model llama2-7b --simulate-cr 1,2,4,8 {_LONG} --num-iters 3",
         f"throughput --model llama2-13b --simulate-cr 1,2,4,8 {_LONG} --num-iters 3"),
        E1_MUST_REACH, _uncompressed,
    ),
    Experiment(
        "e2", "E2: without DMC, against the roofline (must reach 80 % of it) and another engine",
        (f"throughput --model llama2-7b --simulate-cr 1 {_LONG} --num-iters 3 --compare transformers",),
        {1.0: 1.0}, _other_engine,
    ),
    Experiment(
        "e3", "E3: latency per token at equal batch and 4k context",
        ("latency --model llama2-7b --simulate-cr 1,2,4,8 --batch-size 1,4,16 --input-len 3968 "
         "--output-len 128 --num-iters 3",),
        {2.0: 1.0, 4.0: 1.0, 8.0: 1.0}, _uncompressed_at_batch,
    ),
    Experiment(
        "e4", "E4: one rank's slice of a 70B in tensor parallel 8, communication excluded",
        (f"throughput --model llama2-70b --tensor-parallel-slice 8 --simulate-cr 1,2,4,8 {_LONG} "
         "--num-iters 3",),
        E1_MUST_REACH, _uncompressed,
    ),
    Experiment(
        "e5", "E5: pages held / bytes of live entries at CR 4, 4k tokens (at most 1.10)",
        ("throughput --model llama2-7b --simulate-cr 4 --input-len 3968 --output-len 128 "
         "--max-num-seqs 16",),
        {}, _uncompressed,
    ),
    Experiment(
        "e7", "E7: per-head paging at CR 1 against dense attention in the same engine",
        ("latency --model llama2-7b --simulate-cr 1 --batch-size 1,8 --input-len 3968 "
         "--output-len 128 --num-iters 3",
         "latency --model llama2-7b --simulate-cr 1 --batch-size 1,8 --input-len 3968 "
         "--output-len 128 --num-iters 3 --dense-baseline"),
        {1.0: E7_MUST_REACH}, _other_engine,
    ),
    Experiment(
        "e8", "E8: 40k tokens of context, 8 requests",
        ("throughput --model qwen3-8b --simulate-cr 1,4,8 --input-len 40448 --output-len 512 "
         "--max-num-seqs 8 --max-num-batched-tokens 8192 --num-iters 3",),
        {4.0: 1.5, 8.0: 2.0}, _uncompressed,
    ),
]  # fmt: skip


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
