"""One rank of `test_layouts.py`: Megatron's real schedule over a given layout, in float64.

Started by torchrun. Loads the weights from a distributed checkpoint (or makes and saves them), runs
one forward and backward over all microbatches, and writes loss reports and full gradients.
"""

import argparse
from argparse import Namespace

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.training.global_vars import set_args

from megatron_dmc.config import DMCConfig, DMCTransformerConfig
from megatron_dmc.decisions import DecisionRecorder
from megatron_dmc.training import cpu_adapter
from megatron_dmc.training.model import CarryingCommunicator, build_model
from megatron_dmc.training.step import ForwardStep

LENGTH, MICRO_BATCH, MICRO_BATCHES, VOCAB = 24, 2, 4, 128


def full_gradients(model) -> dict[str, torch.Tensor]:
    """Gradients by global layer number, with tensor-parallel shards joined."""
    group = parallel_state.get_tensor_model_parallel_group()
    gradients = {}
    for name, parameter in model.named_parameters():
        if ".layers." in name:
            local = int(name.split(".layers.")[1].split(".")[0])
            number = model.decoder.layers[local].layer_number - 1
            name = name.replace(f".layers.{local}.", f".layers.{number}.")
        gradient = parameter.grad
        assert gradient is not None, name
        if group.size() > 1 and getattr(parameter, "tensor_model_parallel", False):
            shards = [torch.empty_like(gradient) for _ in range(group.size())]
            torch.distributed.all_gather(shards, gradient.contiguous(), group=group)
            if "linear_fc1" in name:  # gate and up are split separately
                halves = [s.chunk(2) for s in shards]
                shards = [h[0] for h in halves] + [h[1] for h in halves]
            gradient = torch.cat(shards, dim=parameter.partition_dim)
        gradients[name] = gradient
    return gradients


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--recompute", choices=["full", "selective"])
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--merge-window", type=int, default=0)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--make-weights", action="store_true")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()

    cpu_adapter.install()
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(options.tp, options.pp)
    model_parallel_cuda_manual_seed(7)
    torch.manual_seed(7)
    config = DMCTransformerConfig(
        num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4,
        num_query_groups=options.kv_heads, kv_channels=8, normalization="RMSNorm",
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True,
        params_dtype=torch.float64, pipeline_dtype=torch.float64, transformer_impl="local",
        tensor_model_parallel_size=options.tp, pipeline_model_parallel_size=options.pp,
        deallocate_pipeline_outputs=True,
        gradient_accumulation_fusion=False, bias_activation_fusion=False, persist_layer_norm=False,
        recompute_granularity=options.recompute,
        recompute_method="uniform" if options.recompute == "full" else None,
        recompute_num_layers=1 if options.recompute == "full" else None,
        init_method_std=0.3,
        dmc=DMCConfig(stage="finetune", target_cr=4.0, alpha_offset=0.5, temperature=0.5,
                      merge_window=options.merge_window),
    )  # fmt: skip
    args = Namespace(
        curr_iteration=3, micro_batch_size=MICRO_BATCH, seq_length=LENGTH, seed=11,
        tensorboard_log_interval=1000, padded_vocab_size=VOCAB, max_position_embeddings=LENGTH,
        fp16_lm_cross_entropy=False, untie_embeddings_and_output_weights=True,
        position_embedding_type="rope", rotary_percent=1.0, rotary_base=10000,
        use_rope_scaling=False, rope_scaling_factor=8.0, rotary_seq_len_interpolation_factor=None,
    )  # fmt: skip
    set_args(args)
    init_num_microbatches_calculator(0, None, MICRO_BATCH * MICRO_BATCHES, MICRO_BATCH, 1)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    recorder = DecisionRecorder(config.num_layers)
    model = build_model(
        args,
        config,
        recorder,
        pre_process=groups.pp.rank() == 0,
        post_process=groups.pp.rank() == options.pp - 1,
        pg_collection=groups,
    )
    model.double().train()
    if options.make_weights:
        dist_checkpointing.save(model.sharded_state_dict(), options.weights)
    loaded = dist_checkpointing.load(model.sharded_state_dict(), options.weights)
    model.load_state_dict(loaded, strict=False)

    generator = torch.Generator().manual_seed(5)
    samples = torch.randint(0, VOCAB, (MICRO_BATCHES, MICRO_BATCH, LENGTH + 1), generator=generator)

    def batches():
        for batch in samples:
            yield {
                "tokens": batch[:, :-1],
                "labels": batch[:, 1:],
                "loss_mask": torch.ones(MICRO_BATCH, LENGTH),
                "position_ids": torch.arange(LENGTH).expand(MICRO_BATCH, -1),
            }

    communicator = CarryingCommunicator(groups.pp, config) if options.pp > 1 else None
    reports = get_forward_backward_func(pp_size=options.pp, vp_size=None)(
        forward_step_func=ForwardStep(config.dmc, recorder),
        data_iterator=batches(),
        model=model,
        num_microbatches=MICRO_BATCHES,
        seq_length=LENGTH,
        micro_batch_size=MICRO_BATCH,
        forward_only=False,
        p2p_communicator=communicator,
        pg_collection=groups if communicator is not None else None,
    )
    assert recorder.in_flight() == 0
    gathered: list = [None] * torch.distributed.get_world_size()
    mine = {"reports": reports, "gradients": full_gradients(model)}
    torch.distributed.all_gather_object(gathered, mine)
    if torch.distributed.get_rank() == 0:
        gradients = {}
        for part in gathered:
            gradients.update(part["gradients"])
        torch.save({"reports": gathered[-1]["reports"], "gradients": gradients}, options.out)
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
