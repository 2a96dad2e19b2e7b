"""Megatron's GPTModel from any checkpoint, in one process, on a CPU or a GPU."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_utils import router_gating_linear
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.nn.functional import silu

from megatron_dmc.checkpoint.convert import open_checkpoint, read_weights
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.generation_config import (
    find_generation_config,
    read_generation_config,
)
from megatron_dmc.checkpoint.hub import local_path
from megatron_dmc.checkpoint.single_process import ensure_single_process
from megatron_dmc.checkpoint.tokenizer import (
    TOKENIZER_FOLDER,
    Tokenizer,
    check_vocab,
    load_tokenizer,
)
from megatron_dmc.checkpoint.weights import ShardSource, megatron_shapes
from megatron_dmc.config import DMCConfig
from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.model.build import build_gpt
from megatron_dmc.model.config import DMCTransformerConfig
from megatron_dmc.model.specs import dmc_layer_spec
from megatron_dmc.ops.cpu import advise_huge_pages
from megatron_dmc.ops.gates import exchange_borrowed_pair


@dataclass
class LoadedModel:
    """A model in evaluation mode, what it is, and its tokenizer where it has one."""

    model: GPTModel
    description: ModelDescription
    tokenizer: Tokenizer | None
    generation_config: dict[str, Any] = field(default_factory=dict)
    """The contents of its `generation_config.json`; empty where it has none."""


class _RotaryEmbedding(RotaryEmbedding):
    """Megatron's RoPE angles, computed where the model is; Megatron's own moves them to a GPU."""

    def get_emb(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Angles of positions `offset` to `offset + max_seq_len - 1`: [positions, 1, 1, D]."""
        freqs = self.get_freqs_non_repeated(max_seq_len, offset)
        return torch.cat((freqs, freqs), dim=-1)[:, None, None, :]


class _Router(TopKRouter):
    """Megatron's router, computing where the model is; Megatron's own moves its weight to a GPU."""

    def gating(self, input: Tensor) -> Tensor:
        """Logits of the experts, [..., experts], in the dtype of `input`, [..., hidden]."""
        return router_gating_linear(input, self.weight, self.bias, input.dtype)


class _MLP(MLP):
    """Megatron's gated MLP without biases, in as few operations as it has products and functions; Megatron's
    own adds an offset of 0 to one factor."""

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **unused: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As `MLP.forward`: output, [..., hidden], and no bias."""
        assert per_token_scale is None, "a dense MLP"
        gate, up = self.linear_fc1(hidden_states)[0].chunk(2, dim=-1)
        return self.linear_fc2(silu(gate) * up)


def _with_own_mlp(spec: Any, *, is_moe: bool) -> Any:
    """A copy of a block's submodules in which MLPs are `_MLP`, or mixtures of experts have `_Router`."""
    spec = copy.copy(spec)
    layers = []
    for layer in spec.layer_specs:
        layer = copy.copy(layer)
        layer.submodules = copy.copy(layer.submodules)
        mlp = layer.submodules.mlp
        if is_moe:
            submodules = replace(mlp.keywords["submodules"], router=_Router)
            layer.submodules.mlp = functools.partial(mlp, submodules=submodules)
        else:
            layer.submodules.mlp = functools.partial(_MLP.as_mlp_submodule, **mlp.keywords)
        layers.append(layer)
    spec.layer_specs = layers
    return spec


def transformer_config(
    description: ModelDescription,
    *,
    dmc: DMCConfig | None,
    dtype: torch.dtype,
    tensor_parallel_size: int = 1,
) -> DMCTransformerConfig:
    """Megatron's configuration of the model: local layer spec, no fusions, weights not drawn."""
    d = description
    moe: dict[str, Any] = {}
    if d.num_experts is not None:
        moe = {
            "moe_router_topk": d.moe_router_topk,
            "moe_ffn_hidden_size": d.moe_ffn_hidden_size,
            "moe_router_pre_softmax": d.moe_router_pre_softmax,
        }
    return DMCTransformerConfig(
        num_layers=d.num_layers,
        hidden_size=d.hidden_size,
        ffn_hidden_size=d.ffn_hidden_size,
        num_attention_heads=d.num_attention_heads,
        num_query_groups=d.num_query_groups,
        kv_channels=d.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=d.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        add_qkv_bias=d.add_qkv_bias,
        qk_layernorm=d.qk_layernorm,
        num_moe_experts=d.num_experts,
        **moe,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=d.init_method_std,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        use_cpu_initialization=True,
        perform_initialization=False,
        transformer_impl="local",
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        tensor_model_parallel_size=tensor_parallel_size,
        dmc=dmc if dmc is not None else DMCConfig(),
    )


def rotary_embedding(description: ModelDescription, device: str | torch.device) -> RotaryEmbedding:
    """RoPE angles for the model, in its order of pairs, computed on `device`."""
    rotary = _RotaryEmbedding(
        description.kv_channels,
        rotary_percent=1.0,
        rotary_base=description.rotary_base,
        seq_len_interpolation_factor=description.rope_linear_factor,  # type: ignore[arg-type]
        rope_scaling=description.rope_scaling_factor is not None,
        rope_scaling_factor=description.rope_scaling_factor or 8.0,
        use_cpu_initialization=True,
    )
    inv_freq = rotary.inv_freq.to(device)
    rotary.inv_freq = exchange_borrowed_pair(inv_freq, description.borrowed_rope_pair)
    return rotary


def build_model(
    description: ModelDescription,
    *,
    dmc: DMCConfig | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    tensor_parallel_size: int = 1,
) -> GPTModel:
    """A GPTModel in evaluation mode with weights not yet set.

    Its attention is DMC's for plain models too (then it is plain causal attention), so that one
    engine runs both.

    Args:
        dmc: DMC settings; None: a plain model (`description.dmc` is not looked at).
        dtype: of weights and computation; default: `description.dtype`.
        tensor_parallel_size: this rank's share of the heads; Megatron's groups must be running.

    Raises:
        UnsupportedConfig: DMC cannot be combined with this model.
    """
    if tensor_parallel_size == 1:
        ensure_single_process()
    else:
        check_divisible(description, tensor_parallel_size)
    dtype = dtype or description.dtype
    config = transformer_config(
        description, dmc=dmc, dtype=dtype, tensor_parallel_size=tensor_parallel_size
    )
    spec = _with_own_mlp(dmc_layer_spec(config), is_moe=bool(description.num_experts))
    model = build_gpt(
        config,
        spec=spec,
        vocab_size=description.padded_vocab_size,
        max_sequence_length=description.max_position_embeddings,
        parallel_output=False,
        share_embeddings_and_output_weights=description.share_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=description.rotary_base,
    )
    model.rotary_pos_emb = rotary_embedding(description, device)
    model.requires_grad_(False)
    return model.to(device=device, dtype=dtype).eval()


def check_divisible(description: ModelDescription, tensor_parallel_size: int) -> None:
    """Every rank must have whole KV heads and an equal part of the rest.

    Raises:
        UnsupportedConfig: with the number that does not divide.
    """
    for what, number in (
        ("num_query_groups", description.num_query_groups),
        ("ffn_hidden_size", description.ffn_hidden_size),
        ("padded_vocab_size", description.padded_vocab_size),
        ("moe_ffn_hidden_size", description.moe_ffn_hidden_size or 0),
    ):
        if number % tensor_parallel_size:
            raise UnsupportedConfig(
                f"tensor_parallel_size={tensor_parallel_size} does not divide the model's "
                f"{what}={number}; use a divisor of it"
            )


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    dmc: DMCConfig | Literal["auto"] | None = "auto",
    progress: bool = False,
    tensor_parallel_size: int = 1,
    allow_pickle: bool = False,
    verify_checkpoint: bool = True,
    check: Callable[[ModelDescription], None] | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> LoadedModel:
    """A model from a Hugging Face folder, a Megatron checkpoint, a GGUF file or the Hugging Face Hub.

    Args:
        path, revision: see `hub.local_path`.
        dtype: of weights and computation; default: as stored.
        dmc: "auto": as the checkpoint says. None: run it as a plain model.
        progress: show a progress bar on a terminal.
        tensor_parallel_size: load this rank's share only (every rank reads all weights, one tensor at a
            time); Megatron's groups must be running.
        allow_pickle, verify_checkpoint, check: see `checkpoint.convert.open_checkpoint`.
        trust_remote_code: run the code of a tokenizer that brings its own; the model's is never run.

    Returns:
        the model, ready for `model(input_ids, position_ids, attention_mask=None)`, which gives
        logits [B, T, padded_vocab_size]; columns from `description.vocab_size` on are padding.

    Raises:
        CheckpointError: the checkpoint or its tokenizer is missing or damaged.
        UnsupportedConfig: the model is of no supported family.
    """
    path = local_path(path, revision=revision)
    description, source, tokenizer_place = open_checkpoint(
        path, allow_pickle=allow_pickle, verify_checkpoint=verify_checkpoint, progress=progress,
        check=check, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if description.num_experts and tensor_parallel_size > 1 and torch.device(device).type == "cpu":
        raise UnsupportedConfig(
            f"tensor_parallel_size={tensor_parallel_size} with num_experts={description.num_experts} on "
            "a CPU: Megatron's token dispatcher gathers on GPUs only; use tensor_parallel_size=1"
        )
    tokenizer = None
    if tokenizer_place is not None:
        tokenizer = load_tokenizer(tokenizer_place, trust_remote_code=trust_remote_code)
        check_vocab(tokenizer, description)
    generation_config = read_generation_config(
        find_generation_config(path, path / TOKENIZER_FOLDER, tokenizer_place)
    )
    settings = description.dmc if dmc == "auto" else dmc
    description = replace(description, dmc=settings, dtype=dtype or description.dtype)
    model = build_model(description, dmc=settings, tensor_parallel_size=tensor_parallel_size)
    for parameter in model.parameters():  # before they are written, so that nothing has to move
        advise_huge_pages(parameter, at_once=True)
    state: dict[str, Any] = model.state_dict()
    rank = 0
    if tensor_parallel_size > 1:
        rank = parallel_state.get_tensor_model_parallel_rank()
        source = ShardSource(source, description, size=tensor_parallel_size, rank=rank)
    weights = {name: state[name] for name in megatron_shapes(description)}
    read_weights(source, weights, progress=progress and rank == 0)
    model.to(device)
    assert isinstance(model.rotary_pos_emb, _RotaryEmbedding)
    model.rotary_pos_emb.inv_freq = model.rotary_pos_emb.inv_freq.to(device)
    return LoadedModel(model, description, tokenizer, generation_config)


@torch.no_grad()
def full_forward(model: GPTModel, input_ids: Tensor) -> Tensor:
    """Logits of whole sequences, without a cache.

    Args:
        input_ids: [B, T] int64.

    Returns:
        [B, T, padded_vocab_size].
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    return model(input_ids, positions, attention_mask=None)
