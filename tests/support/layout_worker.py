"""Runs of `test_layouts.py`: Megatron's real schedule over given layouts, in float64.

Each job is a process group of its own: its ranks are forked from the server of `training_runs.py`, which has
imported Megatron and done nothing else (imports would take most of the time), and meet over gloo. A rank
loads the weights from a distributed checkpoint (or makes and saves them), runs one forward and
backward over all microbatches, and rank 0 writes loss reports and full gradients to the job's `--out`.
"""

import argparse
import copy
from argparse import Namespace
from pathlib import Path

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.timers import Timers
from megatron.training import global_vars
from megatron.training.global_vars import set_args
from training_runs import ensure_fork_server, free_port

from megatron_dmc.checkpoint.torch_dist_write import SynchronousSave
from megatron_dmc.config import DMCConfig
from megatron_dmc.model.config import DMCTransformerConfig
from megatron_dmc.model.decisions import DecisionRecorder
from megatron_dmc.training import cpu_adapter
from megatron_dmc.training.model import CarryingCommunicator, build_model
from megatron_dmc.training.step import CompressionLoss, ForwardStep
from megatron_dmc.training.teacher import SAME, Teacher, load_teacher

LENGTH, MICRO_BATCH, BATCH, VOCAB = 24, 2, 8, 128


def gather_shards(ddp: DistributedDataParallel) -> None:
    """The distributed optimizer leaves every rank its share of the reduced gradients: join them."""
    for buffer in ddp.buffers + ddp.expert_parallel_buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shards = list(bucket.grad_data.view(group.size(), -1))
            own = shards[group.rank()].clone()
            torch.distributed.all_gather(shards, own, group=group)


def full_gradients(ddp: DistributedDataParallel, *, tied: bool) -> dict[str, torch.Tensor]:
    """Gradients by global layer number, with tensor-parallel shards joined."""
    group = parallel_state.get_tensor_model_parallel_group()
    model = ddp.module
    gradients = {}
    for name, parameter in model.named_parameters():
        if ".layers." in name:
            local = int(name.split(".layers.")[1].split(".")[0])
            number = model.decoder.layers[local].layer_number - 1
            name = name.replace(f".layers.{local}.", f".layers.{number}.")
        if tied and name == "output_layer.weight":
            name = "embedding.word_embeddings.weight"
        gradient = parameter.main_grad
        if group.size() > 1 and getattr(parameter, "tensor_model_parallel", False):
            shards = [torch.empty_like(gradient) for _ in range(group.size())]
            torch.distributed.all_gather(shards, gradient.contiguous(), group=group)
            if "linear_fc1" in name:  # gate and up are split separately
                halves = [s.chunk(2) for s in shards]
                shards = [h[0] for h in halves] + [h[1] for h in halves]
            gradient = torch.cat(shards, dim=parameter.partition_dim)
        gradients[name] = gradient.clone()
    return gradients


def parse(flags: list[str]) -> Namespace:
    parser = argparse.ArgumentParser()
    for name in ("tp", "pp", "cp"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--vp", type=int, help="virtual stages per pipeline rank")
    parser.add_argument("--sp", action="store_true", help="sequence parallel")
    parser.add_argument("--distributed-optimizer", action="store_true")
    parser.add_argument("--overlap-grad-reduce", action="store_true")
    parser.add_argument("--per-token-loss", action="store_true")
    parser.add_argument("--recompute", choices=["full", "selective"])
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--merge-window", type=int, default=0)
    parser.add_argument("--merge-delay", type=int, default=0)
    parser.add_argument("--shared-decisions", action="store_true", help="DMC-C")
    parser.add_argument("--evict", action="store_true", help="DMS")
    parser.add_argument("--pool-after-rope", action="store_true")
    parser.add_argument("--importance", default="learned")
    parser.add_argument("--stage", default="finetune")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--qk-norm", action="store_true")
    parser.add_argument("--moe", action="store_true")
    parser.add_argument("--rotary-percent", type=float, default=1.0)
    parser.add_argument("--rope-scaling", action="store_true")
    parser.add_argument(
        "--teacher", choices=["same", "other"], help="the student's own weights, or another model's"
    )
    parser.add_argument("--teacher-weight", type=float, default=1.0)
    parser.add_argument(
        "--teacher-cache",
        action="store_true",
        help="a forward before fills it, and a file gets lost",
    )
    parser.add_argument("--packed", action="store_true", help="several documents in a sequence")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--weights", required=True)
    parser.add_argument("--make-weights", action="store_true")
    parser.add_argument("--out", required=True)
    return parser.parse_args(flags)


def dtype_of(options: Namespace) -> torch.dtype:
    return torch.bfloat16 if options.bf16 else torch.float64


def config_of(options: Namespace) -> DMCTransformerConfig:
    moe = (
        {"num_moe_experts": 4, "moe_router_topk": 2, "moe_router_load_balancing_type": "none",
         "moe_ffn_hidden_size": 64, "moe_token_dispatcher_type": "alltoall"}
        if options.moe else {}
    )  # fmt: skip
    return DMCTransformerConfig(
        num_layers=4, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4,
        num_query_groups=options.kv_heads, kv_channels=8, normalization="RMSNorm",
        gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
        hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True,
        params_dtype=dtype_of(options), pipeline_dtype=dtype_of(options), transformer_impl="local",
        bf16=options.bf16,
        tensor_model_parallel_size=options.tp, pipeline_model_parallel_size=options.pp,
        virtual_pipeline_model_parallel_size=options.vp, sequence_parallel=options.sp,
        context_parallel_size=options.cp, qk_layernorm=options.qk_norm,
        calculate_per_token_loss=options.per_token_loss,
        deallocate_pipeline_outputs=True,
        # As Megatron's arguments do: between two ranks that are each other's next and previous one,
        # a batch of sends and receives is matched wrongly.
        overlap_p2p_comm=options.vp is not None, batch_p2p_comm=options.vp is None,
        gradient_accumulation_fusion=False, bias_activation_fusion=False, persist_layer_norm=False,
        recompute_granularity=options.recompute,
        recompute_method="uniform" if options.recompute == "full" else None,
        recompute_num_layers=1 if options.recompute == "full" else None,
        init_method_std=0.3,
        dmc=DMCConfig(stage=options.stage, target_cr=4.0, alpha_offset=0.5, temperature=0.5,
                      merge_window=options.merge_window, zero_out_steps=20,
                      merge_delay=options.merge_delay,
                      shared_decisions=options.shared_decisions,
                      pool_after_rope=options.pool_after_rope, importance=options.importance,
                      policy="evict" if options.evict else "merge", eviction_delay=3),
        **moe,
    )  # fmt: skip


def build_chunks(options: Namespace, config, args, recorder, groups) -> list:
    """This rank's model chunks, with the weights, in Megatron's data-parallel wrapper."""
    chunks = []
    for i in range(options.vp or 1):
        first = groups.pp.rank() == 0 and i == 0
        last = groups.pp.rank() == options.pp - 1 and i == (options.vp or 1) - 1
        model = build_model(
            args, config, recorder, pre_process=first, post_process=last,
            vp_stage=None if options.vp is None else i, pg_collection=groups,
        )  # fmt: skip
        chunks.append(model.to(dtype_of(options)).train())

    def state() -> dict:  # a checkpoint is read as a whole, by all chunks together
        return {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(chunks)}

    if options.make_weights:
        # Megatron's own way starts a process, which would import this file again
        dist_checkpointing.save(state(), options.weights, SynchronousSave())
    loaded = dist_checkpointing.load(state(), options.weights)
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[f"model{i}"], strict=False)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=options.distributed_optimizer,
        overlap_grad_reduce=options.overlap_grad_reduce,
        grad_reduce_in_fp32=options.bf16,
    )
    return [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]


def teacher_of(options: Namespace, config, args, groups, chunk) -> Teacher:
    """The student's weights, or random ones of a model with a KV head for every query head."""
    heads = config.num_query_groups if options.teacher == "same" else config.num_attention_heads
    folder = f"{options.weights}/teacher"
    args = Namespace(
        **dict.fromkeys(SAME) | vars(args), vocab_size=None, dmc_teacher=folder,
        dmc_teacher_weight=options.teacher_weight,
        dmc_teacher_cache=f"{options.out}.states" if options.teacher_cache else None,
    )  # fmt: skip
    if options.make_weights:
        if options.teacher == "other":
            plain = copy.copy(config)
            plain.dmc, plain.num_query_groups = DMCConfig(), heads
            chunk = build_model(args, plain, DecisionRecorder(4), pg_collection=groups).double()
        else:
            chunk = chunk.module
        saved = Namespace(**vars(args), group_query_attention=True, num_query_groups=heads)
        Path(folder).mkdir()
        dist_checkpointing.save(
            {"model": chunk.sharded_state_dict(), "args": saved}, folder, SynchronousSave()
        )
    return load_teacher(args, config)


def fill_cache(teacher: Teacher, batches, config, recorder: DecisionRecorder, chunk) -> None:
    """A forward of every microbatch; then one file gets lost, of whichever rank."""
    step = ForwardStep(CompressionLoss(config.dmc, recorder), teacher)
    with torch.no_grad():
        for batch in batches:
            step(iter([batch]), chunk)
    torch.distributed.barrier()
    files = sorted(teacher.states.folder.iterdir())
    assert files and all(file.suffix == ".safetensors" for file in files)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        files[0].unlink()
    torch.distributed.barrier()


def run_rank(rank: int, processes: int, port: int, flags: list[str]) -> None:
    """One rank of a job, in a process of its own."""
    torch.set_num_threads(1)
    options = parse(flags)
    cpu_adapter.install()
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes
    )
    parallel_state.initialize_model_parallel(
        options.tp, options.pp, options.vp, context_parallel_size=options.cp
    )
    model_parallel_cuda_manual_seed(7)
    torch.manual_seed(7)
    config = config_of(options)
    args = Namespace(
        curr_iteration=3, micro_batch_size=MICRO_BATCH, seq_length=LENGTH, seed=11,
        tensorboard_log_interval=1000, padded_vocab_size=VOCAB, max_position_embeddings=LENGTH,
        fp16_lm_cross_entropy=False, untie_embeddings_and_output_weights=not options.tied,
        position_embedding_type="rope", rotary_percent=options.rotary_percent, rotary_base=10000,
        use_rope_scaling=options.rope_scaling, rope_scaling_factor=8.0,
        rotary_seq_len_interpolation_factor=None, reset_position_ids=options.packed,
        reset_attention_mask=options.packed, dataloader_inter_document_masking=False, sft=False,
        check_for_nan_in_loss_and_grad=False, check_for_spiky_loss=False,
    )  # fmt: skip
    set_args(args)
    global_vars._GLOBAL_TIMERS = Timers(0, "minmax")
    dp_rank = parallel_state.get_data_parallel_rank()
    dp = parallel_state.get_data_parallel_world_size()
    micro_batches = BATCH // (MICRO_BATCH * dp)
    init_num_microbatches_calculator(0, None, BATCH, MICRO_BATCH, dp)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    recorder = DecisionRecorder(config.num_layers)
    chunks = build_chunks(options, config, args, recorder, groups)
    teacher = teacher_of(options, config, args, groups, chunks[0]) if options.teacher else None
    config.finalize_model_grads_func = finalize_model_grads
    if options.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if options.vp else no_sync[0]

    generator = torch.Generator().manual_seed(5)
    samples = torch.randint(0, VOCAB, (BATCH, LENGTH + 1), generator=generator)

    loss_mask = torch.ones(BATCH, LENGTH)
    if options.teacher:
        loss_mask[:, ::6] = 0  # as many on every context-parallel rank

    # documents of 1 to 17 tokens, other ones in every sequence
    starts = torch.rand(BATCH, LENGTH, generator=generator) < (0.2 if options.packed else 0.0)
    starts[:, 0] = True
    tokens = torch.arange(LENGTH).expand(BATCH, -1)
    positions = tokens - (tokens * starts).cummax(1).values

    def batches():
        for i in range(micro_batches):
            first = (i * dp + dp_rank) * MICRO_BATCH
            batch = samples[first : first + MICRO_BATCH]
            yield {
                "tokens": batch[:, :-1],
                "labels": batch[:, 1:],
                "loss_mask": loss_mask[first : first + MICRO_BATCH],
                "position_ids": positions[first : first + MICRO_BATCH],
            }

    if options.teacher_cache:
        assert teacher is not None and teacher.states is not None
        fill_cache(teacher, batches(), config, recorder, chunks[0])

    communicator = CarryingCommunicator(groups.pp, config) if options.pp > 1 else None
    data = [batches() for _ in chunks]
    reports = get_forward_backward_func(pp_size=options.pp, vp_size=options.vp)(
        forward_step_func=ForwardStep(CompressionLoss(config.dmc, recorder), teacher),
        data_iterator=data if options.vp else data[0],
        model=chunks if options.vp else chunks[0],
        num_microbatches=micro_batches,
        seq_length=LENGTH,
        micro_batch_size=MICRO_BATCH,
        forward_only=False,
        p2p_communicator=communicator,
        pg_collection=groups if communicator is not None else None,
    )
    assert recorder.in_flight() == 0
    totals = {}
    for key in reports[0] if reports else ():  # the last stage's ranks have them
        totals[key] = torch.stack([report[key].double() for report in reports]).sum(0)
        torch.distributed.all_reduce(totals[key], group=groups.dp_cp)
    gradients = {}
    for chunk in chunks:
        if options.distributed_optimizer:
            gather_shards(chunk)
        gradients.update(full_gradients(chunk, tied=options.tied))
    gathered: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, {"totals": totals, "gradients": gradients})
    if torch.distributed.get_rank() == 0:
        joined = {name: g for part in gathered for name, g in part["gradients"].items()}
        reports = {k: (n / d).item() for k, (n, d) in gathered[-1]["totals"].items()}
        torch.save({"reports": reports, "gradients": joined}, options.out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def run_job(processes: int, flags: list[str]) -> None:
    """Run the ranks of a job to their end.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of a rank that failed.
    """
    ensure_fork_server()
    torch.multiprocessing.start_processes(
        run_rank, (processes, free_port(), flags), nprocs=processes, start_method="forkserver"
    )
