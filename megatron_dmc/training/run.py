"""The whole run of `pretrain_dmc.py`: set up, train through Megatron's `pretrain()`, finish a stage."""

import sys
from argparse import Namespace

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import destroy_rerun_state_machine
from megatron.training import training
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from megatron_dmc.config import DMCTransformerConfig
from megatron_dmc.decisions import DecisionRecorder
from megatron_dmc.errors import DMCError, UnsupportedConfig
from megatron_dmc.training import cpu_adapter
from megatron_dmc.training.arguments import (
    add_dmc_args,
    check_paths,
    exit_with,
    transformer_config_from_args,
)
from megatron_dmc.training.data import dataset_provider
from megatron_dmc.training.model import CarryingCommunicator, build_model
from megatron_dmc.training.step import ForwardStep


def skip_needless_compilation() -> None:
    """Megatron runs `make` for its dataset helper, which the wheel ships compiled and without a
    Makefile; where the helper imports, there is nothing to compile."""
    from megatron.core.datasets import utils

    try:
        import megatron.core.datasets.helpers_cpp  # noqa: F401
    except ImportError:
        return
    utils.compile_helpers = lambda: None


def parse(argv: list[str] | None = None) -> tuple[Namespace, DMCTransformerConfig]:
    """Parse and validate Megatron's and DMC's flags; on a CPU, adapt Megatron to it first."""
    argv = sys.argv[1:] if argv is None else argv
    if cpu_adapter.is_needed():
        cpu_adapter.install()
        argv = [*cpu_adapter.FLAGS, *argv]
    sys.argv = [sys.argv[0], *argv]
    args = parse_and_validate_args(extra_args_provider=add_dmc_args)
    if args.reset_attention_mask or args.reset_position_ids:
        raise UnsupportedConfig(
            "--reset-attention-mask/--reset-position-ids: segments may not yet end at documents"
        )
    check_paths(args)
    return args, transformer_config_from_args(args)


def main(argv: list[str] | None = None) -> None:
    """Train one stage. A user's mistake ends with one line and exit code 2."""
    try:
        args, config = parse(argv)
    except DMCError as error:
        exit_with(error)
        return
    skip_needless_compilation()
    # Megatron makes its process groups in pretrain(); the pipeline communicator wants them before,
    # and of the things made here only the rerun state machine refuses to be made again.
    training.initialize_megatron()
    destroy_rerun_state_machine()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    recorder = DecisionRecorder(config.num_layers)
    communicator = CarryingCommunicator(groups.pp, config) if groups.pp.size() > 1 else None

    def model_provider(pre_process, post_process, vp_stage=None, config=None, pg_collection=None):
        return build_model(
            args, transformer_config, recorder, pre_process=pre_process,
            post_process=post_process, vp_stage=vp_stage, pg_collection=pg_collection,
        )  # fmt: skip

    transformer_config = config
    training.pretrain(
        pretrain_cfg_container_from_args(args),
        dataset_provider,
        ModelType.encoder_or_decoder,
        ForwardStep(config.dmc, recorder),
        model_provider=model_provider,
        p2p_communicator=communicator,
        pg_collection=groups if communicator is not None else None,
    )
    assert recorder.in_flight() == 0, "a microbatch's decisions were never collected"
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
