"""Measure the model and memory of a training run, for test_plan.py; prints one JSON document.

    python tests/support/plan_worker.py LAYOUTS_JSON

LAYOUTS_JSON is a list of {"world_size", "flags"}, with the flags that `megatron-dmc plan` prints;
they go through training's own parser. Each pipeline stage is built on the meta device under torch's
fake process groups, so that one process can be any rank of any world; the answer has every
stage's number of parameters. Then one attention layer runs forward and the bytes that autograd
saves are counted. Its kernels are the GPU's, which need Triton's interpreter: TRITON_INTERPRET=1.
"""

import json
import os
import sys

import megatron.core  # noqa: F401  before the CPU adapter stands in for CUDA
import torch
import triton_interpreter  # noqa: F401
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.spec_utils import build_module
from megatron.training.global_vars import destroy_global_vars
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_dmc.config import DMCConfig
from megatron_dmc.model.config import DMCTransformerConfig
from megatron_dmc.model.decisions import DecisionRecorder, GateKey
from megatron_dmc.model.specs import dmc_layer_spec
from megatron_dmc.training.arguments import transformer_config_from_args
from megatron_dmc.training.model import build_model
from megatron_dmc.training.run import parse

TRAINING = ["--train-iters", "10", "--lr", "1e-4", "--tokenizer-type", "NullTokenizer",
            "--mock-data", "--dmc-stage", "retrofit"]  # fmt: skip


def start(rank: int, world: int, tp: int = 1, pp: int = 1, cp: int = 1) -> None:
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(
        tp, pp, context_parallel_size=cp, create_gloo_process_groups=False
    )


def stop() -> None:
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def stage_parameters(args, config, stage: int) -> int:
    """Of the first rank of a pipeline stage."""
    world, pp = args.world_size, args.pipeline_model_parallel_size
    start(stage * (world // pp), world, args.tensor_model_parallel_size, pp)
    with torch.device("meta"):
        model = build_model(
            args, config, DecisionRecorder(config.num_layers),
            pre_process=stage == 0, post_process=stage == pp - 1,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )  # fmt: skip
    stop()
    assert all(p.is_meta for p in model.parameters())
    return sum(p.numel() for p in model.parameters())


def parameters(layout: dict) -> list[int]:
    """Of every pipeline stage."""
    os.environ["WORLD_SIZE"] = str(layout["world_size"])
    destroy_global_vars()
    destroy_num_microbatches_calculator()
    args = parse([*layout["flags"], *TRAINING])
    config = transformer_config_from_args(args)
    config.perform_initialization = False
    config.sequence_parallel = False  # adds no parameters; the local layers refuse it
    return [
        stage_parameters(args, config, stage) for stage in range(args.pipeline_model_parallel_size)
    ]


def saved_bytes(
    heads: int, groups: int, dim: int, recompute: str | None, delay: int, context_parallel: int
) -> float:
    """Bytes per own token that DMC's attention keeps from the projection on, RoPE tables included."""
    tokens, batch, hidden = 128, 2, 64
    start(0, context_parallel, cp=context_parallel)
    model_parallel_cuda_manual_seed(1)
    config = DMCTransformerConfig(
        num_layers=1, hidden_size=hidden, ffn_hidden_size=64, num_attention_heads=heads,
        num_query_groups=groups, kv_channels=dim, normalization="RMSNorm", gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, hidden_dropout=0.0,
        attention_dropout=0.0, use_cpu_initialization=True, params_dtype=torch.bfloat16, bf16=True,
        transformer_impl="local", gradient_accumulation_fusion=False,
        recompute_granularity=recompute, context_parallel_size=context_parallel,
        dmc=DMCConfig(stage="retrofit", merge_delay=delay),
    )  # fmt: skip
    recorder = DecisionRecorder(1)
    layer = build_module(
        dmc_layer_spec(config, recorder=recorder).layer_specs[0], config=config, layer_number=1,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )  # fmt: skip
    attention = layer.self_attention.bfloat16().train()
    rotary = RotaryEmbedding(dim, 1.0, use_cpu_initialization=True)(tokens * context_parallel)
    key = GateKey(1, 1, 0, 0)
    recorder.begin(key)
    x = torch.randn(tokens, batch, hidden, dtype=torch.bfloat16, requires_grad=True)
    elsewhere = {t.untyped_storage().data_ptr() for t in (*attention.parameters(), rotary, x)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in elsewhere:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attention(x, key.to_tensor(), rotary_pos_emb=rotary)
    stop()
    return sum(s.nbytes() for s in kept.values()) / (tokens * batch)


def main():
    os.environ.update(
        RANK="0",
        CUDA_DEVICE_MAX_CONNECTIONS="1",
        DMC_MERGE_BACKEND="triton",
        DMC_NEAR_BACKEND="triton",
    )
    counts = [parameters(layout) for layout in json.loads(sys.argv[1])]
    names = "heads", "groups", "dim", "recompute", "delay", "context_parallel"
    saved = [
        dict(zip(names, case, strict=True), bytes=saved_bytes(*case))
        for sizes in ((8, 8, 32), (8, 2, 64))
        for case in (
            (*sizes, None, 0, 1), (*sizes, "selective", 0, 1), (*sizes, None, 16, 1),
            (*sizes, None, 0, 2), (*sizes, None, 16, 2),
        )
    ]  # fmt: skip
    print(json.dumps({"parameters": counts, "saved": saved}))


if __name__ == "__main__":
    main()
