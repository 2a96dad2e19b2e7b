"""Flags of `megatron-dmc plan`. No torch, so that `--help` is quick."""

import argparse

from megatron_dmc.plan.assumptions import GPUS, Assumptions
from megatron_dmc.plan.presets import PRESETS

RECOMPUTE = ("none", "selective", "full")
SIZES = {
    "--tensor-model-parallel-size": "GPUs that share every layer",
    "--pipeline-model-parallel-size": "GPUs that the layers are split over",
    "--num-virtual-stages-per-pipeline-rank": "model chunks of a pipeline rank",
    "--context-parallel-size": "GPUs that the sequence is split over; not searched over: 1 unless given",
    "--micro-batch-size": "sequences of one forward",
}
LINK_EFFICIENCY = 0.8
"""Part of a data sheet's bandwidth that collectives reach: an assumption."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `megatron-dmc plan`, named as Megatron's where Megatron has them."""
    parser.add_argument(
        "--model", required=True,
        help=f"{', '.join(PRESETS)}, a Hugging Face folder or Hub id, or a config.json",
    )  # fmt: skip
    parser.add_argument("--revision", metavar="NAME", help="of a Hub id; default: its main branch")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of the whole job")
    parser.add_argument("--gpu", choices=list(GPUS), default="h100", help="default: h100")
    parser.add_argument("--gpu-memory", help="such as 80GB or 141GB; default: the GPU's")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="default: 8")
    parser.add_argument("--seq-length", type=int, default=4096, help="tokens; default: 4096")
    parser.add_argument("--global-batch-size", type=int, default=1024, help="default: 1024")
    parser.add_argument(
        "--dmc-target-cr", type=float, default=4.0, help="compression ratio; default: 4"
    )
    parser.add_argument(
        "--dmc-merge-delay", type=int, default=0, metavar="TOKENS",
        help="newest tokens that stay raw; default: 0",
    )  # fmt: skip
    parser.add_argument("--top", type=int, default=10, help="layouts to show; default: 10")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")

    group = parser.add_argument_group("layout", "what is left out is searched over")
    for flag, text in SIZES.items():
        group.add_argument(flag, type=int, help=text)
    group.add_argument("--recompute-granularity", choices=RECOMPUTE, help="activation recompute")
    for flag, text in [
        ("--sequence-parallel", "default: wherever tensor parallelism is"),
        (
            "--use-distributed-optimizer",
            "shard the optimizer over data parallel ranks; default: on",
        ),
    ]:
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)

    group = parser.add_argument_group("assumptions", "all of them are printed with the result")
    a = Assumptions()
    group.add_argument("--peak-tflops", type=float, help="dense bfloat16; default: the GPU's")
    group.add_argument(
        "--efficiency", type=float, default=a.efficiency,
        help=f"part of the peak that computing reaches; default: {a.efficiency}",
    )  # fmt: skip
    for where, which in (("intra", "within a node"), ("inter", "between nodes")):
        group.add_argument(
            f"--{where}-node-bandwidth", type=float, metavar="GB/S",
            help=f"per GPU and direction {which}; default: {LINK_EFFICIENCY} of the GPU's",
        )  # fmt: skip
    group.add_argument(
        "--dmc-overhead", type=float, default=a.dmc_overhead,
        help=f"time that DMC adds to computing; default: {a.dmc_overhead}",
    )  # fmt: skip
    group.add_argument("--reserved-memory", default="6GB", help="kept free per GPU; default: 6GB")
    group.add_argument(
        "--steps-per-cr", type=int, default=3000,
        help="steps of 1024 x 4096 tokens for each unit of CR above 1; default: 3000",
    )  # fmt: skip
