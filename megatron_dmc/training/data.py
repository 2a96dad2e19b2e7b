"""Datasets for Megatron's loop: its own GPT datasets over `.bin/.idx` files, or mock data."""

from argparse import Namespace

from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.training import get_args, get_tokenizer, print_rank_0
from megatron.training.utils import get_blend_and_blend_per_split


def keeps_documents_apart(args: Namespace) -> bool:
    """Whether attention and merging stop at the documents packed into a sequence."""
    return args.reset_attention_mask or args.reset_position_ids


def dataset_provider(num_samples: list[int], vp_stage: int | None = None):
    """Megatron's `train_valid_test_dataset_provider`.

    Args:
        num_samples: wanted sequences of the train, valid and test splits.
        vp_stage: virtual pipeline stage.

    Returns:
        the three datasets.
    """
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        # the restarting position ids say where documents start
        reset_position_ids=keeps_documents_apart(args),
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
    )

    def needed_here() -> bool:
        ends = mpu.is_pipeline_first_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ) or mpu.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
        # every stage keeps the documents apart, and so has to know them
        return (ends or keeps_documents_apart(args)) and mpu.get_tensor_model_parallel_rank() == 0

    kind = MockGPTDataset if args.mock_data else GPTDataset
    print_rank_0("> building train, validation, and test datasets ...")
    return BlendedMegatronDatasetBuilder(kind, num_samples, needed_here, config).build()


dataset_provider.is_distributed = True  # type: ignore[attr-defined]
