"""`megatron-dmc plan`: search the layouts, print the best ones, the flags and what it assumed."""

import argparse
import json
import re
import shlex
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_dmc.checkpoint.megatron_args import megatron_flags
from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.plan.arguments import LINK_EFFICIENCY, SIZES
from megatron_dmc.plan.assumptions import GPUS, Assumptions
from megatron_dmc.plan.layout import Job, Layout, valid_layouts
from megatron_dmc.plan.memory import Memory, cache_size, estimate_memory
from megatron_dmc.plan.model import PlannedModel, find_model
from megatron_dmc.plan.timing import Schedule, StepTime, estimate_step, retrofit_schedule

GB = 1e9


@dataclass
class Plan:
    """One layout with its estimates."""

    layout: Layout
    memory: Memory
    time: StepTime


def parse_bytes(text: str, flag: str) -> float:
    """`"80GB"` (1e9), `"80GiB"` (2**30) or `"80"` (GB) -> bytes.

    Raises:
        UnsupportedConfig: names the flag.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|GiB|G)?\s*", text, re.IGNORECASE)
    if not match:
        raise UnsupportedConfig(f"{flag} {text!r}: write it like 80GB or 80GiB")
    return float(match[1]) * (2**30 if (match[2] or "").lower() == "gib" else GB)


def run(args: argparse.Namespace) -> int:
    """Run `megatron-dmc plan`."""
    model = find_model(args.model, revision=args.revision)
    job = Job(
        args.gpus, args.gpus_per_node, args.seq_length, args.global_batch_size,
        args.dmc_merge_delay,
    )  # fmt: skip
    gpu = GPUS[args.gpu]
    capacity = (
        parse_bytes(args.gpu_memory, "--gpu-memory") if args.gpu_memory else gpu.memory_gb * GB
    )

    def given(value: float | None, default: float) -> float:
        return default if value is None else value

    assumptions = Assumptions(
        gpu=args.gpu,
        peak_tflops=given(args.peak_tflops, gpu.bf16_tflops),
        efficiency=args.efficiency,
        intra_node_bandwidth=given(args.intra_node_bandwidth, LINK_EFFICIENCY * gpu.link_gb_s),
        inter_node_bandwidth=given(args.inter_node_bandwidth, LINK_EFFICIENCY * gpu.network_gb_s),
        dmc_overhead=args.dmc_overhead,
        reserved_memory=parse_bytes(args.reserved_memory, "--reserved-memory"),
    )
    fixed = _fixed(args)
    schedule = retrofit_schedule(job, args.dmc_target_cr, steps_per_cr=args.steps_per_cr)
    if args.top < 1:
        raise UnsupportedConfig(f"--top {args.top}: it must be at least 1")
    plans = make_plans(model, job, assumptions, fixed)
    fitting = best_first(plans, capacity)
    if not fitting:
        raise nothing_fits(plans, job, capacity)
    if args.json:
        print(
            json.dumps(
                as_document(model, job, assumptions, capacity, args, schedule, fitting), indent=2
            )
        )
    else:
        print_plans(model, job, assumptions, capacity, args, schedule, fitting, len(plans))
    return 0


def _fixed(args: argparse.Namespace) -> dict[str, int | bool | str]:
    """Fields of `Layout` that the command line names."""
    fixed: dict[str, int | bool | str] = {}
    for flag in SIZES:
        name = flag.removeprefix("--").replace("-", "_")
        value = getattr(args, name)
        if value is not None:
            if value < 1:
                raise UnsupportedConfig(f"{flag} {value}: it must be at least 1")
            fixed[name] = value
    for name in ("recompute_granularity", "sequence_parallel", "use_distributed_optimizer"):
        if getattr(args, name) is not None:
            fixed[name] = getattr(args, name)
    return fixed


def make_plans(
    model: PlannedModel,
    job: Job,
    assumptions: Assumptions,
    fixed: dict[str, int | bool | str] | None = None,
) -> list[Plan]:
    """Every layout that can run, with its estimates, fitting or not.

    Raises:
        UnsupportedConfig: if there is none.
    """
    return [
        Plan(
            layout,
            estimate_memory(model, layout, job, reserved=assumptions.reserved_memory),
            estimate_step(model, layout, job, assumptions),
        )
        for layout in valid_layouts(model, job, fixed)
    ]


def best_first(plans: list[Plan], capacity: float) -> list[Plan]:
    """Those that fit into `capacity` bytes, by step time; where that is equal, by memory."""
    fitting = [p for p in plans if p.memory.total <= capacity]
    return sorted(fitting, key=lambda p: (p.time.total, p.memory.total))


def nothing_fits(plans: list[Plan], job: Job, capacity: float) -> UnsupportedConfig:
    """The error for a machine that is too small; names the layout that needs least."""
    least = min(plans, key=lambda p: p.memory.total)
    memory = least.memory
    return UnsupportedConfig(
        f"--gpu-memory {capacity / GB:g}GB: none of {len(plans)} layouts over --gpus {job.gpus} "
        f"fits; the smallest needs {memory.total / GB:.1f} GB per GPU "
        f"({describe(least.layout)}: weights and gradients "
        f"{(memory.weights + memory.gradients) / GB:.1f}, optimizer {memory.optimizer / GB:.1f}, "
        f"activations {(memory.activations + memory.temporaries) / GB:.1f}, reserved "
        f"{memory.reserved / GB:.1f}); use more GPUs, a GPU with more memory, or leave layout "
        "flags out"
    )


def describe(layout: Layout) -> str:
    """`TP8 x PP4 x DP2, micro-batch 1, recompute none`."""
    parts = [
        f"TP{layout.tensor_model_parallel_size}", f"PP{layout.pipeline_model_parallel_size}",
        f"VP{layout.num_virtual_stages_per_pipeline_rank}"
        if layout.num_virtual_stages_per_pipeline_rank > 1 else "",
        f"CP{layout.context_parallel_size}" if layout.context_parallel_size > 1 else "",
        f"DP{layout.data_parallel_size}",
    ]  # fmt: skip
    return (
        " x ".join(p for p in parts if p)
        + f", micro-batch {layout.micro_batch_size}, recompute {layout.recompute_granularity}"
    )


def as_document(
    model: PlannedModel,
    job: Job,
    assumptions: Assumptions,
    capacity: float,
    args: argparse.Namespace,
    schedule: Schedule,
    fitting: list[Plan],
) -> dict[str, Any]:
    """All of it for `--json`. Bytes, seconds, FLOP, tokens, unless a name says otherwise."""

    def one(plan: Plan) -> dict[str, Any]:
        return {
            **asdict(plan.layout),
            "num_microbatches": plan.layout.num_microbatches(job),
            "memory_bytes": {**asdict(plan.memory), "total": plan.memory.total},
            "step_seconds": {**asdict(plan.time), "total": plan.time.total},
            "model_tflops_per_gpu": tflops(plan, job),
            "tokens_per_second": job.tokens_per_step / plan.time.total,
            "gpu_hours": gpu_hours(plan, job, schedule),
        }

    return {
        "estimate": "parameter counts are exact, everything else is estimated, nothing measured",
        "model": {
            "name": model.name,
            "parameters": model.num_parameters,
            "flags": megatron_flags(model),
        },
        "job": asdict(job),
        "gpu_memory_bytes": capacity,
        "assumptions": asdict(assumptions),
        "schedule": {
            "target_cr": args.dmc_target_cr,
            "steps_per_cr": args.steps_per_cr,
            **asdict(schedule),
            "steps": schedule.steps,
        },
        "cache": asdict(cache_size(model, job, args.dmc_target_cr)),
        "num_fitting": len(fitting),
        "best": {**one(fitting[0]), "flags": fitting[0].layout.flags(job)},
        "layouts": [one(plan) for plan in fitting[: args.top]],
    }


def tflops(plan: Plan, job: Job) -> float:
    """Model TFLOP/s per GPU, recompute not counted."""
    return plan.time.model_flops / plan.time.total / job.gpus / 1e12


def gpu_hours(plan: Plan, job: Job, schedule: Schedule) -> float:
    """Of all three stages."""
    return schedule.steps * plan.time.total * job.gpus / 3600


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / GB:.1f}"


def print_plans(
    model: PlannedModel,
    job: Job,
    assumptions: Assumptions,
    capacity: float,
    args: argparse.Namespace,
    schedule: Schedule,
    fitting: list[Plan],
    num_valid: int,
) -> None:
    """The answer for people."""
    a, best = assumptions, fitting[0]
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.width = max(console.width, 110)
    say = console.print
    say(
        f"{model.name}: {model.num_parameters / 1e9:.2f} billion parameters; {job.gpus} x {a.gpu} "
        f"with {capacity / GB:g} GB, {job.gpus_per_node} a node;\n{job.global_batch_size} sequences "
        f"of {job.seq_length} tokens a step. {len(fitting)} of {num_valid} layouts fit; the fastest "
        "by estimate:\n"
    )
    shown = fitting[: args.top]
    columns: dict[str, list[Any]] = {
        "TP": [p.layout.tensor_model_parallel_size for p in shown],
        "PP": [p.layout.pipeline_model_parallel_size for p in shown],
        "VP": [p.layout.num_virtual_stages_per_pipeline_rank for p in shown],
        "CP": [p.layout.context_parallel_size for p in shown],
        "DP": [p.layout.data_parallel_size for p in shown],
        "micro": [p.layout.micro_batch_size for p in shown],
        "recompute": [p.layout.recompute_granularity for p in shown],
        "weights": [_gb(p.memory.weights + p.memory.gradients) for p in shown],
        "optim.": [_gb(p.memory.optimizer) for p in shown],
        "activ.": [_gb(p.memory.activations + p.memory.temporaries) for p in shown],
        "DMC's": [_gb(p.memory.dmc_activations) for p in shown],
        "GB/GPU": [_gb(p.memory.total) for p in shown],
        "bubble": [f"{p.time.bubble / p.time.total:.0%}" for p in shown],
        "s/step": [f"{p.time.total:.2f}" for p in shown],
        "TFLOP/s": [f"{tflops(p, job):.0f}" for p in shown],
        "GPU-hours": [f"{gpu_hours(p, job, schedule):,.0f}" for p in shown],
    }
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for name in list(columns):
        if name in ("VP", "CP") and set(columns[name]) == {1}:
            del columns[name]
        else:
            table.add_column(name, justify="left" if name == "recompute" else "right")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(str(value) for value in row))
    console.print(table, soft_wrap=False)
    reserve = f"{a.reserved_memory / GB:g} GB"
    say(
        "weights: with gradients. activ.: with working memory; DMC's: the part of the kept ones that "
        f"DMC adds.\nGB/GPU: on the fullest GPU, with {reserve} of reserve. TFLOP/s: of the model, "
        "per GPU, recompute not counted.\n"
    )
    say(
        f"CR {args.dmc_target_cr:g}: zero-out {schedule.zero_out_steps:,} + retrofit "
        f"{schedule.retrofit_steps:,} + finetune {schedule.finetune_steps:,} steps, "
        f"{schedule.tokens / 1e9:.1f} billion tokens;\nwith the first layout about "
        f"{schedule.steps * best.time.total / 3600:,.0f} hours, "
        f"{gpu_hours(best, job, schedule):,.0f} GPU-hours. The paper's rule: {args.steps_per_cr:,} "
        "steps of\n1024 x 4096 tokens for each unit of CR above 1 (--steps-per-cr), after 250 and "
        "before 2,000.\n"
    )
    cache = cache_size(model, job, args.dmc_target_cr)
    raw = f", the newest {job.merge_delay} tokens raw" if job.merge_delay else ""
    say(
        f"A cache of {job.seq_length} tokens in bfloat16: {_gb(cache.plain_bytes)} GB, compressed "
        f"{cache.end_bytes / GB:.2f} GB{raw}.\nDecided CR {cache.decided_cr:g}; cache CR, over the "
        f"sequence, {cache.cache_cr:.2f}.\n"
    )
    say(
        f"Best: {describe(best.layout)}\n(pipeline rank {best.memory.stage} is the fullest, with "
        f"{best.memory.parameters:,} parameters). Megatron's flags:\n"
    )
    say(paragraph(best.layout.flags(job)))
    say("\nand for the model:\n")
    say(paragraph(megatron_flags(model)))
    say(
        "\nThis is an estimate; nothing was run. Parameter counts are exact. Assumed:\n"
        f"  {a.peak_tflops:g} TFLOP/s bfloat16 peak, {a.efficiency:.0%} of it reached while "
        "computing, whatever the layout\n"
        "    (--peak-tflops, --efficiency)\n"
        f"  {a.intra_node_bandwidth:g} GB/s within a node, {a.inter_node_bandwidth:g} GB/s between "
        "nodes, per GPU and direction\n"
        "    (--intra-node-bandwidth, --inter-node-bandwidth)\n"
        "  no communication hidden behind computing; optimizer arithmetic, data loading, "
        "checkpoints and\n    evaluation left out\n"
        f"  DMC adds {a.dmc_overhead:.0%} to computing: an aim, not a measurement "
        "(--dmc-overhead)\n"
        "  bfloat16 weights, float32 gradients, master weights and Adam moments; "
        f"{reserve} per GPU kept free\n    (--reserved-memory)"
    )


def paragraph(flags: list[str], width: int = 100) -> str:
    """Flags with their values, wrapped into lines that a shell reads as one."""
    lines, line = [], "  "
    items: list[str] = []
    for flag in flags:
        if flag.startswith("--") or not items:
            items.append(shlex.quote(flag))
        else:
            items[-1] += " " + shlex.quote(flag)
    for item in items:
        if len(line) + len(item) + 2 > width:
            lines.append(line.rstrip() + " \\")
            line = "  "
        line += item + " "
    return "\n".join([*lines, line.rstrip()])
