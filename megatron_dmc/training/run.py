"""The whole run of `pretrain_dmc.py`: set up, train through Megatron's `pretrain()`, finish a stage."""

import functools
import os
import shutil
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import destroy_rerun_state_machine
from megatron.training import get_args, training
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.checkpointing import get_checkpoint_name
from megatron.training.utils import start_memory_history_recording
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dmc.checkpoint.convert import is_disk_full
from megatron_dmc.checkpoint.integrity import forget_checksums, write_checksums
from megatron_dmc.errors import DMCError
from megatron_dmc.model.config import DMCTransformerConfig
from megatron_dmc.model.decisions import DecisionRecorder
from megatron_dmc.training import accelerators, cpu_adapter, plain, repairs
from megatron_dmc.training.arguments import (
    add_dmc_args,
    check_flags,
    check_paths,
    check_teacher,
    dmc_config_from_args,
    exit_with,
    pass_over_damaged,
    resolve_paths,
    transformer_config_from_args,
)
from megatron_dmc.training.borrowed import check_borrowed_lr, scale_updates
from megatron_dmc.training.data import dataset_provider, is_plain
from megatron_dmc.training.flags import check_combinations, check_listed
from megatron_dmc.training.model import CarryingCommunicator, build_model
from megatron_dmc.training.stages import check_stage
from megatron_dmc.training.step import CompressionLoss, ForwardStep
from megatron_dmc.training.teacher import load_teacher


def save_with_checksums() -> None:
    """Have `pretrain()` write checksums for every `torch_dist` checkpoint that it saves.

    They are written after the checkpoint is complete; a run that is killed in between leaves one
    without, which loads as well. Not with `--async-save`, nor where `--verify-integrity` has Megatron
    do the same.
    """
    save = training.save_checkpoint
    if hasattr(save, "__wrapped__"):
        return

    @functools.wraps(save)
    def saving(iteration, *rest, non_persistent_ckpt=False, **options):
        args = get_args()
        if not args.save:  # only the fault detection saves where nothing was asked for
            raise DMCError(
                f"iteration {iteration + 1} was rejected by Megatron's fault detection (its reason is "
                "above) and would be saved to be repeated on another GPU, and there is no --save; "
                "give it, or --rerun-mode disabled to stop at the step itself"
            )
        ours = (
            args.ckpt_format == "torch_dist"
            and not (args.async_save or args.verify_integrity or non_persistent_ckpt)
        )  # fmt: skip
        folder = Path(get_checkpoint_name(args.save, iteration, return_base_dir=True))
        if ours:
            forget_checksums(folder)
        save(iteration, *rest, non_persistent_ckpt=non_persistent_ckpt, **options)
        if ours:
            write_checksums(folder)

    training.save_checkpoint = saving


def prepare_pipeline(config: DMCTransformerConfig) -> dict[str, Any]:
    """Initialise Megatron, and the arguments of `pretrain()` that carry the merge counts on.

    Call it after the flags are parsed and before `pretrain()`, which initialises again. It also has
    checkpoints saved with checksums, passes over a damaged newest one, and gives the figures of an
    evaluation that are not losses a line of their own.

    Raises:
        CheckpointError: the checkpoint to start from is damaged, and there is no other; or it is of
            another stage than this one starts from.
    """
    # Megatron makes its process groups in pretrain(); the pipeline communicator wants them before,
    # and of the things made here only the rerun state machine refuses to be made again.
    start_megatron()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    if groups.pp.size() == 1:
        return {}
    return {"p2p_communicator": CarryingCommunicator(groups.pp, config), "pg_collection": groups}


def start_megatron(**options) -> None:
    """Initialise Megatron, which `pretrain()` does again, and look at the checkpoint to start from.

    Raises:
        CheckpointError: it is damaged, and there is no other; or it is of another stage than this one
            starts from.
    """
    repairs.skip_needless_compilation()
    repairs.report_figures_of_evaluation()
    save_with_checksums()
    training.initialize_megatron(**options)
    destroy_rerun_state_machine()
    pass_over_damaged(get_args())
    check_stage(get_args())


def no_room_for_another(save: str | None) -> bool:
    """Whether the largest checkpoint in a folder, finished or not, is larger than what is free there.

    Megatron's writers run in processes of their own and report a full disk as an error without its
    reason.
    """
    if not save or not Path(save).is_dir():
        return False
    sizes = [
        sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        for folder in Path(save).glob("iter_*")
    ]
    return shutil.disk_usage(save).free < max(sizes, default=0)


def parse(argv: list[str] | None = None) -> Namespace:
    """Parse and validate Megatron's and DMC's flags; on a CPU, adapt Megatron to it first.

    Raises:
        DMCError: for what Megatron or DMC refuses.
    """
    argv = sys.argv[1:] if argv is None else argv
    if cpu_adapter.is_needed():
        cpu_adapter.install()
    sys.argv = [sys.argv[0], *argv]
    set_connections(argv)
    check_listed(argv)
    try:
        args = parse_and_validate_args(
            extra_args_provider=repairs.print_changed_arguments(add_dmc_args)
        )
    except (AssertionError, ValueError, RuntimeError) as error:
        raise DMCError(as_sentence(error)) from error
    if args.rank == 0:
        print(f"pretrain_dmc.py: {accelerators.Accelerators.found().describe()}", flush=True)
    check_flags(args)
    check_combinations(args)
    check_paths(args)
    check_teacher(args)
    check_borrowed_lr(args)
    resolve_paths(args)
    repairs.ramp_up_batch_size(args)
    repairs.evaluate_at_the_end_alone(args)
    repairs.name_rerun_mode(args)
    return args


def set_connections(argv: list[str]) -> None:
    """Set CUDA_DEVICE_MAX_CONNECTIONS=1 where the user has not set it.

    Megatron asks for it with tensor or context parallelism, and NVIDIA's scripts set it always; its FSDPs
    want another value. Call it before CUDA is initialised, which reads it.
    """
    if not any("fsdp" in word for word in argv):
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def as_sentence(error: Exception) -> str:
    """Megatron's reason for refusing its flags; for an assertion without a message, its condition."""
    if text := " ".join(str(error).split()):
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"Megatron's check of the flags fails: {frame.line}"


def _plain_run(args: Namespace) -> Callable[[], None]:
    """Megatron's own pretraining, ready to start."""
    accelerators.check(args)
    dmc_config_from_args(args)  # refuses values that no stage takes
    model = plain.model_config(args)
    start_megatron(get_embedding_ranks=plain.embedding_ranks)
    return functools.partial(
        training.pretrain, pretrain_cfg_container_from_args(args, model), dataset_provider,
        ModelType.encoder_or_decoder, plain.forward_step, get_embedding_ranks=plain.embedding_ranks,
    )  # fmt: skip


def _dmc_run(args: Namespace) -> Callable[[], None]:
    """A stage with DMC's attention, or with a teacher, ready to start."""
    config = transformer_config_from_args(args)
    if args.dmc_teacher:
        config.refuse_foreign_attention("--dmc-teacher")
    pipeline = prepare_pipeline(config)
    teacher = load_teacher(args, config) if args.dmc_teacher else None
    recorder = DecisionRecorder(config.num_layers)
    container = pretrain_cfg_container_from_args(args)

    def model_provider(pre_process, post_process, vp_stage=None, config=None, pg_collection=None):
        model = build_model(
            args, transformer_config, recorder, pre_process=pre_process,
            post_process=post_process, vp_stage=vp_stage, pg_collection=pg_collection,
        )  # fmt: skip
        if args.dmc_borrowed_lr_mult != 1:
            scale_updates(model, args.dmc_borrowed_lr_mult)
        return model

    transformer_config = config

    def run() -> None:
        start_memory_history_recording(container.profiling)
        training.pretrain(
            container,
            dataset_provider,
            ModelType.encoder_or_decoder,
            ForwardStep(CompressionLoss(config.dmc, recorder), teacher),
            model_provider=model_provider,
            **pipeline,
        )
        assert recorder.in_flight() == 0, "a microbatch's decisions were never collected"

    return run


def main(argv: list[str] | None = None) -> None:
    """Train one stage. A user's mistake ends with one line and exit code 2."""
    try:
        args = parse(argv)
        run = _plain_run(args) if is_plain(args) else _dmc_run(args)
    except DMCError as error:
        exit_with(error)
        return
    try:
        run()
    except DMCError as error:
        exit_with(error)
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        if not (is_disk_full(error) or no_room_for_another(args.save)):
            raise
        exit_with(
            DMCError(
                f"--save {args.save}: no space left on the device; a finished checkpoint is untouched. "
                "Make room and start the same command again"
            )
        )
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
