"""Every flag of the pinned Megatron-LM, and what `pretrain_dmc.py` does with it (`flags.toml`)."""

import argparse
import tomllib
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from megatron.training.arguments import add_megatron_arguments
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.training.arguments import add_dmc_args
from megatron_dmc.training.data import is_plain

TABLE = Path(__file__).with_name("flags.toml")
OWN = "--dmc-"
"""Prefix of the flags that are not Megatron's, and not in the table."""


@dataclass(frozen=True)
class Group:
    """Flags with which the same is done."""

    status: str
    """tested, megatron, same, off or refused; `flags.toml` says what each means."""
    flags: tuple[str, ...]
    """The first name of each; `--flag=value`: with this value, whatever the flag's own group says."""
    why: str = ""


@cache
def flag_table() -> tuple[Group, ...]:
    """The groups of `flags.toml`."""
    groups = tomllib.loads(TABLE.read_text())["group"]
    return tuple(Group(g["status"], tuple(g["flags"].split()), g.get("why", "")) for g in groups)


@cache
def flag_parser() -> ArgumentParser:
    """All flags of `pretrain_dmc.py`, as Megatron's `parse_args` makes its parser."""
    parser = argparse.ArgumentParser(description="Megatron-LM Arguments", allow_abbrev=False)
    with_megatrons: ArgumentParser = add_megatron_arguments(parser)
    return add_dmc_args(with_megatrons)


def _refusals(args: Namespace) -> dict[str, str]:
    """Flags, or values of them (`--flag=value`), that a run refuses, with the reason."""
    refused: dict[str, str] = {}
    for group in flag_table():
        if group.status == "refused":
            refused |= dict.fromkeys(group.flags, group.why)
        elif group.status == "off" and not is_plain(args):
            by = "--dmc-teacher" if args.dmc_teacher else f"--dmc-stage {args.dmc_stage}"
            refused |= dict.fromkeys(group.flags, f"not with {by}: {group.why}")
    return refused


def _given(parser: ArgumentParser, args: Namespace, dests: set[str] | None) -> dict[str, Any]:
    """First name and value of the flags that are not at their default."""
    defaults = parser.parse_args([])
    return {
        action.option_strings[0]: value
        for action in parser._actions
        if action.dest != "help" and (dests is None or action.dest in dests)
        and (value := getattr(args, action.dest)) != getattr(defaults, action.dest)
    }  # fmt: skip


def check_listed(argv: list[str]) -> None:
    """Refuse what the table refuses. A flag that is set to its default has no effect and passes.

    Args:
        argv: the command line, without the program. A mistake in it ends the process, as argparse does.

    Raises:
        UnsupportedConfig: names the flag, its value and the reason.
    """
    parser = flag_parser()
    args = parser.parse_args(argv)
    _refuse(_given(parser, args, None), _refusals(args))


def _refuse(given: dict[str, Any], refusals: dict[str, str]) -> None:
    listed = {flag for group in flag_table() for flag in group.flags}
    for flag, value in given.items():
        why = refusals.get(flag) or refusals.get(f"{flag}={value}")
        if flag not in listed and not flag.startswith(OWN):
            why = f"a flag that {TABLE.name} does not list; what it does here is not known"
        if why:
            shown = flag if isinstance(value, bool) else f"{flag} {value}"
            raise UnsupportedConfig(f"{shown}: {why}")


FROM_CHECKPOINT = {
    "spec", "hybrid_layer_pattern", "hybrid_override_pattern", "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json", "mtp_num_layers", "position_embedding_type",
    "moe_latent_size", "apply_query_key_layer_scaling",
}  # fmt: skip
"""Destinations that `--use-checkpoint-args` may set to something that the table refuses."""


def check_combinations(args: Namespace) -> None:
    """Refuse what single flags do not show: arguments that come from a checkpoint, and pairs.

    Args:
        args: validated by Megatron. `create_attention_mask_in_dataloader` may be turned off.

    Raises:
        UnsupportedConfig: names the flags and the reason.
    """
    if args.use_checkpoint_args:
        _refuse(_given(flag_parser(), args, FROM_CHECKPOINT), _refusals(args))
    plain, local = is_plain(args), args.transformer_impl == "local"
    apart = args.reset_attention_mask or args.reset_position_ids
    packed = "--sft" if args.sft else "--dataloader-inter-document-masking"
    uses_thd = args.sft or args.dataloader_inter_document_masking
    per_split = get_blend_and_blend_per_split(args)[1] if args.full_validation else None
    rows, split = args.eval_micro_batch_size, args.tensor_model_parallel_size > 1
    split = split or args.pipeline_model_parallel_size > 1
    refusals = [
        (plain and local and uses_thd,
         f"{packed} with --dmc-stage off and --transformer-impl local: Megatron's own attention takes "
         "packed sequences only from Transformer Engine; use that, or a stage with DMC"),
        (plain and not local and args.reset_attention_mask,
         "--reset-attention-mask with --dmc-stage off and Transformer Engine: its causal attention "
         "reads no mask; use --dataloader-inter-document-masking"),
        (plain and args.reset_attention_mask and not args.create_attention_mask_in_dataloader,
         "--reset-attention-mask with --no-create-attention-mask-in-dataloader: there is no mask to "
         "reset; leave one of them out"),
        (plain and args.reset_attention_mask and args.window_size is not None,
         f"--window-size {args.window_size} with --reset-attention-mask: Megatron's local attention "
         "takes the window for the whole mask; leave one of them out"),
        (plain and local and args.context_parallel_size > 1,
         f"--context-parallel-size {args.context_parallel_size} with --dmc-stage off and "
         "--transformer-impl local: Megatron's own attention splits a sequence only with Transformer "
         "Engine"),
        (plain and local and args.qk_l2_norm,
         "--qk-l2-norm with --dmc-stage off and --transformer-impl local: Megatron's builder leaves the "
         "norm out; use Transformer Engine"),
        (args.sft and apart,
         "--sft with --reset-attention-mask or --reset-position-ids: conversations are kept apart "
         "already; leave these out"),
        (args.multiple_validation_sets != args.full_validation,
         "--full-validation and --multiple-validation-sets work in Megatron 0.19.2 only together, also "
         "with one set; give both"),
        (args.full_validation and (per_split is None or per_split[2] is not None),
         "--full-validation takes --train-data-path and --valid-data-path (or --per-split-data-args-path) "
         "and no test set: Megatron 0.19.2 cannot evaluate one after it"),
        (args.full_validation and rows > 1 and split,
         f"--full-validation with --eval-micro-batch-size {rows}: its microbatches hold one sequence, "
         "which other ranks have to know; give --eval-micro-batch-size 1"),
        (args.log_straggler and args.distributed_backend == "gloo",
         "--log-straggler: it times kernels with CUDA events; use it on GPUs (nccl)"),
        (args.cuda_graph_impl != "none" and not torch.cuda.is_available(),
         f"--cuda-graph-impl {args.cuda_graph_impl} (also by --enable-cuda-graph, --external-cuda-graph): "
         "a CUDA graph needs a GPU"),
        (args.fim_data and args.mock_data, "--fim-data with --mock-data: mock data has no text"),
        (args.sft and args.mock_data, "--sft with --mock-data: mock data has no conversations"),
    ]  # fmt: skip
    for refused, why in refusals:
        if refused:
            raise UnsupportedConfig(why)
    if args.sft:  # its dataset makes no mask
        args.create_attention_mask_in_dataloader = False
