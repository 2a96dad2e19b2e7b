"""Check which checkpoint a stage may start or resume from.

A stage starts from the one before it (`--pretrained-checkpoint`, or `--load` with `--finetune`) and resumes
from its own (`--load`). A checkpoint holds the arguments of the run that saved it: its stage, its target
CR and how far it was.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_dmc.checkpoint.torch_dist import TRACKER_FILE, iteration_folder, read_common
from megatron_dmc.config import DMCConfig, Stage
from megatron_dmc.errors import CheckpointError
from megatron_dmc.schedule import target_cr, zero_out_scale

STARTS_FROM = {
    Stage.OFF: (Stage.OFF, Stage.ZERO_OUT),
    Stage.ZERO_OUT: (Stage.OFF, Stage.ZERO_OUT),
    Stage.RETROFIT: (Stage.ZERO_OUT,),
    Stage.FINETUNE: (Stage.RETROFIT, Stage.FINETUNE),
}
"""Stage -> those whose checkpoints it may start from; plain models are of the stage off."""

SAME_MODEL = (
    "policy", "merge_window", "alpha_offset", "importance", "shared_decisions", "pool_after_rope",
    "eviction_delay",
)  # fmt: skip
"""Settings that are part of a compressed model: with others, its weights mean something else."""

REMEDY = "; --dmc-no-stage-check accepts it as it is"


def check_stage(args: Namespace) -> None:
    """Refuse a checkpoint of the wrong stage. Reads `torch_dist` checkpoints; others are Megatron's matter.

    Args:
        args: Megatron's and DMC's, validated; `args.ckpt_step` as it will be loaded.

    Raises:
        CheckpointError: names the checkpoint, what it is, and the remedy.
    """
    if not args.dmc_stage_check or args.ckpt_format != "torch_dist":
        return
    if args.load and (Path(args.load) / TRACKER_FILE).is_file():
        flag, path, starts = "--load", args.load, bool(args.finetune)
    elif args.pretrained_checkpoint:
        flag, path, starts = "--pretrained-checkpoint", args.pretrained_checkpoint, True
    else:
        return
    folder = iteration_folder(path)
    if flag == "--load" and args.ckpt_step:
        folder = Path(path) / f"iter_{args.ckpt_step:07d}"
    common = read_common(folder)
    saved = common.get("args")
    if saved is None:
        return
    iteration = common.get("iteration", 0)
    name = f"{flag} {path}"
    _check_rope_pairs(args, saved, name)
    if starts:
        _check_start(args, saved, name, iteration)
    else:
        _check_resumed(args, saved, name, iteration)
    _check_same_model(args, saved, name, starts)


def _setting(args: Namespace, name: str) -> Any:
    return getattr(args, f"dmc_{name}", getattr(DMCConfig, name))


def _stage(args: Namespace) -> Stage:
    return Stage(_setting(args, "stage"))


def _check_rope_pairs(args: Namespace, saved: Namespace, name: str) -> None:
    """The order of RoPE pairs is the weights', whatever the stage."""
    theirs, ours = _rope_pair(saved), _rope_pair(args)
    if theirs == ours:
        return
    raise CheckpointError(
        f"{name}: its weights are for --dmc-borrowed-rope-pair {theirs}, and here it is {ours} (None: leave "
        f"the flag out){REMEDY}"
    )


def _rope_pair(args: Namespace) -> int | None:
    """The borrowed pair; None: the last one, which may also be named."""
    pair = getattr(args, "dmc_borrowed_rope_pair", None)
    return None if pair is None or pair == args.kv_channels // 2 - 1 else pair


def _check_start(args: Namespace, saved: Namespace, name: str, iteration: int) -> None:
    stage, theirs = _stage(args), _stage(saved)
    if theirs not in STARTS_FROM[stage]:
        wanted = " or ".join(
            "a plain model" if s is Stage.OFF else f"--dmc-stage {s}" for s in STARTS_FROM[stage]
        )
        what = "a plain model" if theirs is Stage.OFF else f"of --dmc-stage {theirs}"
        raise CheckpointError(
            f"{name}: is {what}; --dmc-stage {stage} starts from a checkpoint of {wanted}{REMEDY}"
        )
    if stage is Stage.RETROFIT and (rest := _fade(saved, iteration)) > 0:
        raise CheckpointError(
            f"{name}: its zero-out is not finished, at iteration {iteration} the borrowed channels "
            f"still have {rest:.0%} of their values; run --dmc-stage zero-out to its end{REMEDY}"
        )
    if stage is Stage.FINETUNE:
        reached, ours = _target(saved, iteration), _setting(args, "target_cr")
        if abs(reached - ours) > 1e-6 * ours:
            raise CheckpointError(
                f"{name}: was trained to a target CR of {reached:g}, and --dmc-target-cr is {ours:g}; "
                f"a finetune has the CR that the retrofit reached{REMEDY}"
            )


def _check_resumed(args: Namespace, saved: Namespace, name: str, iteration: int) -> None:
    stage, theirs = _stage(args), _stage(saved)
    if stage is not theirs:
        raise CheckpointError(
            f"{name}: its iteration {iteration} is of --dmc-stage {theirs}, and --load would continue "
            f"counting from there; to start --dmc-stage {stage} from it give it as "
            f"--pretrained-checkpoint, and to --load and --save a folder of this stage's own{REMEDY}"
        )
    if stage.compresses:
        before, now = _target(saved, iteration), _target(args, iteration, saved)
        what = "target CR"
    elif stage is Stage.ZERO_OUT:
        before, now = _fade(saved, iteration), _fade(args, iteration, saved)
        what = "factor on the borrowed channels"
    else:
        return
    if abs(before - now) > 1e-6:
        raise CheckpointError(
            f"{name}: at iteration {iteration} its {what} was {before:.4g}, and with these flags it "
            f"would be {now:.4g}; give the length and target that it was started with "
            f"(--dmc-ramp-steps or --dmc-zero-out-steps to train for longer){REMEDY}"
        )


def _check_same_model(args: Namespace, saved: Namespace, name: str, starts: bool) -> None:
    if not (_stage(args).compresses and _stage(saved).compresses):
        return
    for setting in SAME_MODEL:
        theirs, ours = _setting(saved, setting), _setting(args, setting)
        if theirs != ours:
            flag = "--dmc-" + setting.replace("_", "-")
            raise CheckpointError(
                f"{name}: was trained with {flag} {theirs}, and here it is {ours}; its weights are for "
                f"the former{REMEDY}"
            )


def _progress(
    args: Namespace, given: int | None, iteration: int, counted: Namespace
) -> tuple[int, int]:
    """As `CompressionLoss.progress`, of the arguments of a run at an iteration.

    Args:
        counted: where the consumed samples are counted.
    """
    if given is not None:
        return iteration, given
    if args.train_samples:
        return getattr(counted, "consumed_train_samples", 0), args.train_samples
    return iteration, args.train_iters or 0


def _target(args: Namespace, iteration: int, counted: Namespace | None = None) -> float:
    given = _setting(args, "ramp_steps")
    target = _setting(args, "target_cr")
    if given is None and _stage(args) is not Stage.RETROFIT:
        return float(target)
    done, length = _progress(args, given, iteration, counted or args)
    return target_cr(done, ramp_steps=length, target=target, schedule=_setting(args, "cr_schedule"))


def _fade(args: Namespace, iteration: int, counted: Namespace | None = None) -> float:
    given = _setting(args, "zero_out_steps")
    done, length = _progress(args, given, iteration, counted or args)
    return zero_out_scale(done, steps=length, fraction=_setting(args, "zero_out_fraction"))
