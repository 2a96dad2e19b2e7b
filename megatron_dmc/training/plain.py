"""`--dmc-stage off`: Megatron's own GPT, from its own builder, and the step of its pretraining script.

The wheel of megatron-core holds everything that these call; what is here stands in `pretrain_gpt.py` of
Megatron's repository, which is not in the wheel.
"""

import functools
from argparse import Namespace

import torch
from megatron.core import mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks, mtp_on_this_rank
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
    get_model_config,
)
from megatron.training import get_args, get_timers
from megatron.training.argument_utils import (
    core_transformer_config_from_args,
    gpt_config_from_args,
)
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec
from megatron.training.training import stimer, update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import is_first_or_last_pipeline_stage
from torch import Tensor

from megatron_dmc.model.build import order_rope_pairs
from megatron_dmc.model.specs import with_torch_norm
from megatron_dmc.training.arguments import check_borrowed_rope_pair
from megatron_dmc.training.step import check_loss, micro_batch_size

KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask", "cu_seqlens",
        "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")  # fmt: skip


def model_config(args: Namespace) -> GPTModelConfig:
    """The config from which Megatron's `pretrain()` builds the model, by `GPTModelBuilder`.

    Adds to Megatron's what its own conversion of the arguments leaves out: `--rope-scaling-factor`, the order of
    RoPE pairs, and without Transformer Engine norms that work wherever the model does.

    Raises:
        UnsupportedConfig: `--dmc-borrowed-rope-pair` is no pair of the model.
    """
    check_borrowed_rope_pair(args)
    model = gpt_config_from_args(args)
    model.rope_scaling_factor = args.rope_scaling_factor
    if (pair := args.dmc_borrowed_rope_pair) is not None:

        def exchange(chunks):
            for chunk in chunks:
                order_rope_pairs(chunk, pair)
            return chunks

        model.pre_wrap_hooks.append(exchange)
    config = model.transformer
    if config.transformer_impl != "local":
        return model
    config.persist_layer_norm = False
    if args.spec is None and not (
        args.multi_latent_attention
        or args.experimental_attention_variant
        or args.heterogeneous_layers_config_path
    ):

        def spec(model, vp_stage):
            return with_torch_norm(default_layer_spec(model, vp_stage), config, vp_stage)

        model.transformer_layer_spec = spec
    return model


def embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """The pipeline ranks that hold a copy of the word embeddings."""
    args = get_args()
    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pp_ranks[-1])
        ranks.update(get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args)))
    return sorted(ranks)


def get_batch(data_iterator, model) -> dict:
    """The next microbatch, by `KEYS`, of this context-parallel rank; None where the stage needs none."""
    args, config = get_args(), get_model_config(model)
    vp_stage = get_attr_wrapped_model(model, "vp_stage")
    packed = args.sft or args.dataloader_inter_document_masking
    mtp = mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout, mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False, vp_stage=vp_stage,
    )  # fmt: skip
    used = is_first_or_last_pipeline_stage(vp_stage) or mtp
    if not (used or packed):
        return dict.fromkeys(KEYS)
    rank = mpu.get_tensor_model_parallel_rank()
    batch: dict = {}
    if rank == 0:
        data = next(data_iterator)
        for key in KEYS:
            value = data.get(key)
            batch[key] = None if value is None else value.cuda(non_blocking=True)
    batch = get_batch_on_this_tp_rank(
        batch,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        has_cu_seqlens=packed,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        cp_size=args.context_parallel_size,
        tp_rank=rank,
        micro_batch_size=micro_batch_size(args, training=model.training),
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = flatten_batch_for_packed_sequences(batch)
    if not used:
        return dict.fromkeys(KEYS) | {
            k: batch[k] for k in ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")
        }
    return get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=False,
        cp_group=mpu.get_context_parallel_group(),
        use_per_sequence_balancing=args.dataloader_inter_document_masking and not args.sft,
    )


def packed_sequences(batch: dict) -> PackedSeqParams | None:
    """The documents of a packed batch (thd); None: it is not packed."""
    if batch["cu_seqlens"] is None:
        return None
    unpadded = batch["cu_seqlens"].squeeze(0)
    padded = batch["cu_seqlens_padded"]
    if padded is not None:
        padded = padded.squeeze(0)
    update_seqlen_stats_from_cu_seqlens(unpadded)  # of Megatron's count of operations
    ends, longest = unpadded if padded is None else padded, int(batch["max_seqlen"].item())
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded, max_seqlen_q=longest, max_seqlen_kv=longest,
        tokens_per_sample=get_args().seq_length,
    )  # fmt: skip


def loss_func(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Summed loss, its tokens and the report, as Megatron's schedules expect them of a step."""
    mask = loss_mask.view(-1).float()
    loss = (losses.view(-1).float() * mask).sum()
    num_tokens = mask.sum().to(torch.int)
    check_loss(loss)
    report = {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}
    return loss, num_tokens, report


def forward_step(data_iterator, model, return_schedule_plan: bool = False):
    """Megatron's `forward_step_func`."""
    timers = get_timers()
    timers("batch-generator", log_level=2).start()
    with stimer(bdata=True):
        batch = get_batch(data_iterator, model)
    packed = packed_sequences(batch)
    timers("batch-generator").stop()
    loss_mask = batch["loss_mask"]
    inputs = [batch["tokens"], batch["position_ids"], batch["attention_mask"]]
    options = dict(labels=batch["labels"], loss_mask=loss_mask)
    with stimer:
        if return_schedule_plan:
            output = model.build_schedule_plan(*inputs, **options)
        else:
            output = model(*inputs, **options, packed_seq_params=packed)
    return output, functools.partial(loss_func, loss_mask)
