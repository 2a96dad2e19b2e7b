"""Flags `--dmc-*`, generated from `DMCConfig`, and back."""

import sys
from argparse import ArgumentParser, Namespace
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from megatron.training.argument_utils import ArgumentGroupFactory, core_transformer_config_from_args

from megatron_dmc.checkpoint.torch_dist import (
    TRACKER_FILE,
    check_whole,
    is_checkpoint,
    iteration_folder,
    older_usable_iteration,
)
from megatron_dmc.config import DMCConfig
from megatron_dmc.errors import DMCError, UnsupportedConfig
from megatron_dmc.model.config import DMCTransformerConfig
from megatron_dmc.training import accelerators


class _PrefixedGroup(ArgumentGroupFactory):
    """Flags `--dmc-NAME`, stored as `args.dmc_NAME`."""

    def _format_arg_name(self, config_attr_name: str, prefix: str | None = None) -> str:
        return super()._format_arg_name(f"dmc_{config_attr_name}", prefix)

    def _build_argparse_kwargs_from_field(self, attribute) -> dict[str, Any]:
        kwargs = super()._build_argparse_kwargs_from_field(attribute)
        kwargs["dest"] = f"dmc_{attribute.name}"
        if kwargs["default"] is not None:
            kwargs["help"] += f" (default: {kwargs['default']})"
        return kwargs


def add_dmc_args(parser: ArgumentParser) -> ArgumentParser:
    """Megatron's `extra_args_provider`: the flags of `DMCConfig` and the teacher's, and for Megatron's
    own flags the defaults that this machine can run (`accelerators`)."""
    accelerators.set_defaults(parser)
    dmc = _PrefixedGroup(DMCConfig).build_group(parser, title="dynamic memory compression")
    dmc.add_argument(
        "--dmc-no-stage-check", action="store_false", dest="dmc_stage_check",
        help="start or resume from a checkpoint of any stage, target CR or setting",
    )  # fmt: skip
    dmc.add_argument(
        "--dmc-borrowed-lr-mult", type=float, default=1.0, metavar="FACTOR",
        help="learning rate of the rows that feed the borrowed channels, as a multiple of the model's "
        "(default: 1.0)",
    )  # fmt: skip
    dmc.add_argument(
        "--dmc-borrowed-rope-pair", type=int, metavar="PAIR",
        help="part of the model in every stage: the RoPE pair that exchanges its frequency with the last "
        "one's, as `megatron-dmc convert --calibration-data` writes it into the model's flags "
        "(default: the usual order)",
    )  # fmt: skip
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--dmc-teacher", metavar="CHECKPOINT",
        help="the plain model (torch_dist) whose distribution over the vocabulary is learned, by "
        "KL(teacher || student), in place of the data's next tokens",
    )  # fmt: skip
    group.add_argument(
        "--dmc-teacher-weight", type=float, default=1.0,
        help="part of the KL in the loss; the language-model loss has the rest (default: 1.0)",
    )  # fmt: skip
    group.add_argument(
        "--dmc-teacher-cache", metavar="FOLDER",
        help="keep the teacher's last hidden states in this folder, tokens x hidden size values; data that "
        "comes again, in another epoch or another run, then needs the teacher's output layer only",
    )  # fmt: skip
    return parser


def dmc_config_from_args(args: Namespace) -> DMCConfig:
    """The DMCConfig of parsed flags. A ramp or fade whose length was not given takes all of the stage:
    `CompressionLoss.progress`.

    Raises:
        UnsupportedConfig: for a value out of range.
    """
    return DMCConfig(**{f.name: getattr(args, f"dmc_{f.name}") for f in fields(DMCConfig)})


def check_borrowed_rope_pair(args: Namespace) -> None:
    """Refuse a pair that the model does not have.

    Args:
        args: validated by Megatron; the last pair becomes None, which means the same.

    Raises:
        UnsupportedConfig: it is out of range, or heads have no such pairs.
    """
    pair = args.dmc_borrowed_rope_pair
    if pair is None:
        return
    name, pairs = f"--dmc-borrowed-rope-pair {pair}", args.kv_channels // 2
    if args.position_embedding_type != "rope" or args.multi_latent_attention:
        raise UnsupportedConfig(f"{name}: needs --position-embedding-type rope on keys per head")
    if args.rotary_percent != 1 or args.rotary_interleaved:
        raise UnsupportedConfig(
            f"{name} with --rotary-percent {args.rotary_percent:g}, --rotary-interleaved "
            f"{args.rotary_interleaved}: it needs RoPE on whole heads in the half-split layout"
        )
    if not 0 <= pair < pairs:
        raise UnsupportedConfig(
            f"{name}: heads of --kv-channels {args.kv_channels} have the pairs 0 to {pairs - 1}"
        )
    if pair == pairs - 1:
        args.dmc_borrowed_rope_pair = None


def transformer_config_from_args(args: Namespace) -> DMCTransformerConfig:
    """Megatron's `core_transformer_config_from_args` with DMC's settings in it, validated.

    Raises:
        UnsupportedConfig: for what is not installed, and what DMC cannot be combined with.
    """
    accelerators.check(args)
    check_borrowed_rope_pair(args)
    dmc = dmc_config_from_args(args)
    config = core_transformer_config_from_args(args, config_class=DMCTransformerConfig)
    if config.transformer_impl == "local":  # PyTorch's norms, which have no such kernel
        config.persist_layer_norm = False
    config.dmc = dmc
    config.borrowed_rope_pair = args.dmc_borrowed_rope_pair
    config.validate_dmc()
    return config


def check_paths(args: Namespace) -> None:
    """Say at once what would otherwise fail minutes later, or silently.

    Raises:
        DMCError: a folder to load from that holds no checkpoint, or data or tokenizer files that do not
            exist.
    """
    if args.load and not (Path(args.load) / TRACKER_FILE).is_file():
        starts_here = args.save and Path(args.save).resolve() == Path(args.load).resolve()
        if not args.pretrained_checkpoint and not starts_here:
            raise _no_checkpoint("--load", args.load)
    start = args.pretrained_checkpoint
    if start and not (Path(start) / TRACKER_FILE).is_file():
        raise _no_checkpoint("--pretrained-checkpoint", start)
    for flag in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        for item in getattr(args, flag) or []:
            file = item if args.sft else item + ".idx"
            if not item.replace(".", "", 1).isdigit() and not Path(file).is_file():
                remedy = (
                    "--sft reads JSON lines with `messages`"
                    if args.sft
                    else "build it with tools/preprocess_data.py"
                )
                raise DMCError(
                    f"--{flag.replace('_', '-')} {item}: {file} does not exist; {remedy}"
                )


def check_flags(args: Namespace) -> None:
    """Refuse what Megatron's arguments allow and its loop, or ours, then fails at.

    Raises:
        DMCError: names the flag, the reason and the remedy.
    """
    if not (args.train_iters or args.train_samples or args.skip_train):
        raise DMCError("give --train-iters or --train-samples: how long to train")
    if args.lr is None and not args.skip_train:
        raise DMCError("give --lr: Megatron has no learning rate of its own")


def resolve_paths(args: Namespace) -> None:
    """Make the tokenizer's path absolute, since checkpoints name it and are read from other folders."""
    if args.tokenizer_model and Path(args.tokenizer_model).exists():
        args.tokenizer_model = str(Path(args.tokenizer_model).resolve())


def check_teacher(args: Namespace) -> None:
    """Refuse what a teacher cannot be combined with. What its checkpoint holds, `load_teacher` looks at.

    Raises:
        DMCError: no checkpoint there, pipeline stages, a weight that is no part, or a folder that cannot be made.
    """
    if not args.dmc_teacher:
        if args.dmc_teacher_cache:
            raise UnsupportedConfig(
                f"--dmc-teacher-cache {args.dmc_teacher_cache}: give --dmc-teacher too"
            )
        return
    if not is_checkpoint(args.dmc_teacher):
        raise _no_checkpoint("--dmc-teacher", args.dmc_teacher)
    if args.pipeline_model_parallel_size > 1:
        raise UnsupportedConfig(
            f"--dmc-teacher with --pipeline-model-parallel-size {args.pipeline_model_parallel_size}: "
            "the teacher's logits are needed where the student's are, and the teacher has no pipeline "
            "stages; use tensor, context and data parallelism"
        )
    if not 0 <= args.dmc_teacher_weight <= 1:
        raise UnsupportedConfig(f"--dmc-teacher-weight={args.dmc_teacher_weight}: use 0 to 1")
    if args.dmc_teacher_cache:
        try:
            Path(args.dmc_teacher_cache).mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UnsupportedConfig(
                f"--dmc-teacher-cache {args.dmc_teacher_cache}: {e.strerror}; give a folder that can be written"
            ) from e


def pass_over_damaged(args: Namespace) -> None:
    """Look whether the checkpoint that training would start from is whole. Collective over all ranks.

    Other formats than `torch_dist` are left to Megatron.

    A damaged newest checkpoint in `--load` is passed over: `args.ckpt_step` becomes the newest whole
    one before it, and a line on stderr names both.

    Raises:
        CheckpointError: no checkpoint in `--load` is whole, or, where nothing is loaded from there
            yet, `--pretrained-checkpoint` is damaged.
    """
    if args.ckpt_format != "torch_dist":
        return
    if args.load and (Path(args.load) / TRACKER_FILE).is_file():
        older = None if args.ckpt_step else older_usable_iteration(args.load)
        if older is None:
            return
        args.ckpt_step, complaint = older
        if torch.distributed.get_rank() == 0:
            print(
                f"pretrain_dmc.py: warning: --load {args.load}: the newest checkpoint is damaged "
                f"({complaint}); resuming from iteration {args.ckpt_step}",
                file=sys.stderr,
                flush=True,
            )
    elif args.pretrained_checkpoint:
        check_whole(iteration_folder(args.pretrained_checkpoint))


def _no_checkpoint(flag: str, path: str) -> DMCError:
    return DMCError(
        f"{flag} {path}: no checkpoint there ({TRACKER_FILE} is missing); check "
        "the path, or convert one with `megatron-dmc convert`"
    )


def exit_with(error: Exception) -> None:
    """One line for a user's mistake, on every rank that saw it, and exit code 2."""
    print(f"pretrain_dmc.py: error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)
