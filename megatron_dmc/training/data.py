"""Datasets for Megatron's loop: its own, of text, mock data, fill-in-the-middle or conversations."""

import functools
import json
from argparse import Namespace
from typing import Any

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.training import get_args, get_tokenizer, print_rank_0
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.datasets.fim_dataset import GPTFIMDataset, GPTFIMDatasetConfig
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_dmc.config import Stage


def is_plain(args: Namespace) -> bool:
    """Whether the run is Megatron's own model and step (`--dmc-stage off`, without a teacher)."""
    return Stage(args.dmc_stage) is Stage.OFF and not args.dmc_teacher


def keeps_documents_apart(args: Namespace) -> bool:
    """Whether attention and merging stop at the documents packed into a sequence.

    The restarting position ids, which all four of these bring, say where documents start.
    """
    return (
        args.reset_attention_mask
        or args.reset_position_ids
        or args.dataloader_inter_document_masking
        or args.sft
    )


def dataset_config(args: Namespace) -> GPTDatasetConfig:
    """Megatron's dataset settings of its arguments."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path) as file:
            sequences = json.load(file)
    settings: dict[str, Any] = dict(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        sequences_per_dataset=sequences,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        data_parallel_size=args.data_parallel_size,
        sequence_parallel_size=args.tensor_model_parallel_size * args.sequence_parallel,
        inter_document_masking=args.dataloader_inter_document_masking,
    )
    if not is_plain(args):  # DMC takes no mask; position ids mark the starts of documents
        apart = args.reset_attention_mask or args.reset_position_ids
        settings |= dict(reset_position_ids=apart, reset_attention_mask=False)
        settings |= dict(create_attention_mask=False, context_parallel_size=1)
    if not args.fim_data:
        return GPTDatasetConfig(**settings)
    names = ("prefix", "middle", "suffix", "pad", "eod")
    return GPTFIMDatasetConfig(
        **settings,
        fim_rate=args.fim_rate,
        fim_spm_rate=args.fim_spm_rate,
        fim_extra_tokens={name: getattr(args, f"fim_{name}_token") for name in names},
        fim_split_sample=args.fim_split_sample,
        fim_fragment_rate=args.fim_fragment_rate,
        fim_no_prefix=args.fim_no_prefix,
    )


def _needed_here(args: Namespace, vp_stage: int | None) -> bool:
    if mpu.get_tensor_model_parallel_rank() != 0:
        return False
    # every stage keeps the documents apart, and so has to know them
    if is_first_or_last_pipeline_stage(vp_stage) or keeps_documents_apart(args):
        return True
    config = core_transformer_config_from_args(args)
    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout, mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False, vp_stage=vp_stage,
    )  # fmt: skip


def dataset_provider(num_samples: list[int], vp_stage: int | None = None):
    """Megatron's `train_valid_test_dataset_provider`.

    Args:
        num_samples: wanted sequences of the train, valid and test splits.
        vp_stage: virtual pipeline stage.

    Returns:
        the three datasets.
    """
    args = get_args()
    kind: Any = GPTDataset
    if args.sft:
        kind = SFTDataset
    elif args.mock_data:
        kind = MockGPTDataset
    elif args.fim_data:
        kind = GPTFIMDataset
    print_rank_0("> building train, validation, and test datasets ...")
    needed = functools.partial(_needed_here, args, vp_stage)
    return BlendedMegatronDatasetBuilder(kind, num_samples, needed, dataset_config(args)).build()


dataset_provider.is_distributed = True  # type: ignore[attr-defined]
