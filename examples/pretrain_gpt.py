"""Your own Megatron script with DMC: an ordinary GPT pretraining, and the lines marked `# DMC`.

    torchrun --nproc-per-node 8 examples/pretrain_gpt.py <Megatron's flags> --dmc-stage retrofit ...

`pretrain_dmc.py` is the finished program; this shows what to add to one that you already have. The
lines marked `# DMC` bring the flags, the configuration, the attention, the compression loss and its
way through the pipeline; without them it is the script that it was.
"""

from functools import partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import broadcast_data
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_dmc import training as dmc  # DMC


def model_provider(config, pre_process=True, post_process=True, vp_stage=None, **groups):
    args = get_args()
    return dmc.DMCGPTModel(  # DMC: was GPTModel
        config=config,
        transformer_layer_spec=dmc.dmc_layer_spec(  # DMC: was get_gpt_layer_local_spec()
            config,
            recorder=compression.recorder,
            vp_stage=vp_stage,  # DMC
        ),
        recorder=compression.recorder,  # DMC
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        vp_stage=vp_stage,
        pg_collection=groups["pg_collection"],
    )


def get_batch(data_iterator):
    if not (mpu.is_pipeline_first_stage() or mpu.is_pipeline_last_stage()):
        return dict.fromkeys(("tokens", "labels", "loss_mask", "position_ids"))
    data = None if data_iterator is None else next(data_iterator)
    batch = broadcast_data(["tokens", "labels", "position_ids"], data, torch.int64)
    return batch | broadcast_data(["loss_mask"], data, torch.float32)


def loss_func(loss_mask, finish, output):
    loss_mask = loss_mask.view(-1).float()
    loss = torch.sum(output.float().view(-1) * loss_mask)
    num_tokens = loss_mask.sum().to(torch.int)
    report = {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}
    return finish(loss, num_tokens, report, loss_mask)  # DMC: was return loss, num_tokens, report


def forward_step(data_iterator, model):
    batch = get_batch(data_iterator)
    mask = compression.begin(model)  # DMC: was None
    output = model(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"])
    return output, partial(loss_func, batch["loss_mask"], compression.end(model))  # DMC


def datasets_provider(num_samples, vp_stage=None):
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(
        kind, num_samples, lambda: mpu.get_tensor_model_parallel_rank() == 0, config
    ).build()


datasets_provider.is_distributed = True

if __name__ == "__main__":
    args = parse_and_validate_args(extra_args_provider=dmc.add_dmc_args)  # DMC: was no argument
    config = dmc.transformer_config_from_args(args)  # DMC: was core_transformer_config_from_args
    compression = dmc.CompressionLoss(config.dmc, dmc.DecisionRecorder(config.num_layers))  # DMC
    pretrain(
        pretrain_cfg_container_from_args(args),
        datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        model_provider=lambda *_, **kwargs: model_provider(**{**kwargs, "config": config}),
        **dmc.prepare_pipeline(config),  # DMC
    )
