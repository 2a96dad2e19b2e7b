"""Workarounds for Megatron 0.19.2, called explicitly by the entry points.

Importing this module changes nothing.
"""

import functools
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

from megatron.core.num_microbatches_calculator import (
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.rerun_state_machine import RerunMode
from megatron.training import (
    arguments,
    get_args,
    get_tensorboard_writer,
    get_wandb_writer,
    training,
)
from megatron.training.utils import is_last_rank, print_rank_last

from megatron_dmc.errors import UnsupportedConfig

NOT_NEGATIVE_LOG_LIKELIHOODS = (
    "compression loss", "target cr", "measured cr", "distillation loss",
)  # fmt: skip
"""Figures of an evaluation whose exponential means nothing."""


def skip_needless_compilation() -> None:
    """Megatron runs `make` for its dataset helper, which the wheel ships compiled and without a
    Makefile; where the helper imports, there is nothing to compile."""
    from megatron.core.datasets import utils

    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        return
    utils.compile_helpers = lambda: None


def report_figures_of_evaluation() -> None:
    """Megatron prints "PPL", the exponential, of all that a forward step reports in evaluation. Those of
    `NOT_NEGATIVE_LOG_LIKELIHOODS` get a line of their own without it, and the same TensorBoard and W&B
    tags."""
    evaluate, print_results = training.evaluate, training.evaluate_and_print_results
    if hasattr(evaluate, "__wrapped__"):
        return
    sets: list[dict[str, float]] = []

    @functools.wraps(evaluate)
    def evaluating(*args, **options):
        losses, *rest = evaluate(*args, **options)
        names = [name for name in NOT_NEGATIVE_LOG_LIKELIHOODS if name in (losses or {})]
        sets.append({name: losses.pop(name).item() for name in names})
        return losses, *rest

    @functools.wraps(print_results)
    def printing(prefix, forward_step, data_iterator, model, iteration, *rest, **options):
        sets.clear()
        print_results(prefix, forward_step, data_iterator, model, iteration, *rest, **options)
        writes = options.get("write_to_tensorboard", True)
        writer = get_tensorboard_writer() if writes else None
        for index, figures in enumerate(sets):
            if not figures:
                continue
            suffix = f"-{_validation_set(index)}" if get_args().multiple_validation_sets else ""
            values = "".join(f"{name} value: {value:.6E} | " for name, value in figures.items())
            print_rank_last(f" validation{suffix} at {prefix} | {values}")
            for name, value in figures.items():
                tag = f"{name} validation{suffix}"
                if writer:
                    writer.add_scalar(tag, value, iteration)
                if writer and get_wandb_writer() and is_last_rank():
                    get_wandb_writer().log({tag: value}, iteration)

    training.evaluate, training.evaluate_and_print_results = evaluating, printing


def _validation_set(index: int) -> str:
    names = get_args().validation_set_names
    return names[index] if names else str(index)


def print_changed_arguments(add_args: Callable[[ArgumentParser], ArgumentParser]) -> Callable:
    """Megatron prints its 800 arguments; let it print those that differ from their defaults.

    Args:
        add_args: an `extra_args_provider`.

    Returns:
        the one to use in its place, which looks at the defaults. A checkpoint holds all arguments.
    """
    defaults: dict[str, Any] = {}
    print_args = getattr(arguments._print_args, "__wrapped__", arguments._print_args)

    @functools.wraps(print_args)
    def printing(title: str, args: Namespace) -> None:
        changed = {
            name: value for name, value in vars(args).items()
            if name not in defaults or defaults[name] != value
        }  # fmt: skip
        print_args(f"{title} that are not the default", Namespace(**changed))

    def provider(parser: ArgumentParser) -> ArgumentParser:
        parser = add_args(parser)
        defaults.update({action.dest: action.default for action in parser._actions})
        return parser

    arguments._print_args = printing
    return provider


def ramp_up_batch_size(args: Namespace) -> None:
    """Megatron 0.19.2 takes `--rampup-batch-size` and ignores it; make a step schedule of it.

    Mutates `args.step_batch_size_schedule` and Megatron's calculator of microbatches.

    Args:
        args: Megatron's, validated.

    Raises:
        UnsupportedConfig: for sizes that do not fit each other.
    """
    if args.rampup_batch_size is None:
        return
    start, increment, samples = map(int, args.rampup_batch_size)
    flag = f"--rampup-batch-size {start} {increment} {samples}"
    if args.step_batch_size_schedule is not None:
        raise UnsupportedConfig(f"{flag} and --step-batch-size-schedule: give one of them")
    rise, at_once = args.global_batch_size - start, args.micro_batch_size * args.data_parallel_size
    if increment <= 0 or rise < 0 or rise % increment or start <= 0 or samples < 0:
        raise UnsupportedConfig(
            f"{flag}: the batch must rise from a first size by equal increments to "
            f"--global-batch-size {args.global_batch_size}"
        )
    if start % at_once or increment % at_once:
        raise UnsupportedConfig(
            f"{flag}: both sizes must be multiples of micro-batch size times data-parallel size, "
            f"{args.micro_batch_size} x {args.data_parallel_size}"
        )
    steps = rise // increment
    schedule = {0: start}
    for i in range(1, steps + 1):
        schedule[i * samples // steps] = start + i * increment
    args.step_batch_size_schedule = " ".join(
        f"{first * args.seq_length}:{size}" for first, size in schedule.items()
    )
    destroy_num_microbatches_calculator()
    init_num_microbatches_calculator(
        rank=args.rank,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        data_parallel_size=args.data_parallel_size * args.gtp_weight_remat_size,
        decrease_batch_size_if_needed=args.decrease_batch_size_if_needed,
        step_batch_size_schedule=args.step_batch_size_schedule,
        seq_length=args.seq_length,
    )


def evaluate_at_the_end_alone(args: Namespace) -> None:
    """Without `--eval-interval`, which is Megatron's default, it divides by None; its documentation says
    that there is then no evaluation during training. Mutates `args.eval_interval`."""
    if args.eval_interval is None:
        args.eval_interval = sys.maxsize


def name_rerun_mode(args: Namespace) -> None:
    """`--rerun-mode report_stats` is called otherwise where Megatron 0.19.2 reads it. Mutates
    `args.rerun_mode`."""
    if args.rerun_mode == "report_stats":
        args.rerun_mode = RerunMode.REPORT_DETERMINISM_STATS.value
