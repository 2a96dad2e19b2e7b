"""A model's description as Megatron's parsed arguments, as saved in a checkpoint, and as its command-line flags."""

from argparse import Namespace
from dataclasses import fields
from pathlib import Path, PurePath
from typing import Any

import torch

from megatron_dmc.checkpoint.description import VOCAB_MULTIPLE, ModelDescription, parse_dtype
from megatron_dmc.checkpoint.families import family_with
from megatron_dmc.checkpoint.field_checks import shown
from megatron_dmc.config import DMCConfig
from megatron_dmc.errors import CheckpointError, UnsupportedConfig

_PLAIN = (str, bool, int, float, list, tuple, torch.dtype, PurePath, type(None))


def saved_args(args: Any, folder: Path) -> Namespace:
    """The plain values among a checkpoint's saved arguments; enums, tensors and the rest are left out.

    Raises:
        CheckpointError: it holds none.
    """
    if not isinstance(args, Namespace):
        raise CheckpointError(
            f"{folder}: holds no saved arguments, so the model's sizes are unknown"
        )
    plain = {name: value for name, value in vars(args).items() if isinstance(value, _PLAIN)}
    return Namespace(**plain)


def megatron_flags(d: ModelDescription) -> list[str]:
    """Flags with which Megatron's parser builds this model.

    Training's own choices (--seq-length, --bf16, the tokenizer, DMC's settings) are left out.
    """
    flags = {
        "--num-layers": d.num_layers,
        "--hidden-size": d.hidden_size,
        "--ffn-hidden-size": d.ffn_hidden_size,
        "--num-attention-heads": d.num_attention_heads,
        "--kv-channels": d.kv_channels,
        "--max-position-embeddings": d.max_position_embeddings,
        "--position-embedding-type": "rope",
        "--rotary-base": d.rotary_base,
        "--normalization": "RMSNorm",
        "--norm-epsilon": d.layernorm_epsilon,
        "--init-method-std": d.init_method_std,
        "--attention-dropout": 0.0,
        "--hidden-dropout": 0.0,
        "--vocab-size": d.vocab_size,
        "--padded-vocab-size": d.padded_vocab_size,
    }
    out = [text for flag, value in flags.items() for text in (flag, str(value))]
    out += ["--swiglu", "--disable-bias-linear"]
    if d.num_query_groups != d.num_attention_heads:
        out += ["--group-query-attention", "--num-query-groups", str(d.num_query_groups)]
    if not d.share_embeddings_and_output_weights:
        out.append("--untie-embeddings-and-output-weights")
    if d.add_qkv_bias:
        out.append("--add-qkv-bias")
    if d.qk_layernorm:
        out.append("--qk-layernorm")
    if d.rope_scaling_factor is not None:
        out += ["--use-rope-scaling", "--rope-scaling-factor", str(d.rope_scaling_factor)]
    if d.rope_linear_factor is not None:
        out += ["--rotary-seq-len-interpolation-factor", str(d.rope_linear_factor)]
    if d.borrowed_rope_pair is not None:
        out += ["--dmc-borrowed-rope-pair", str(d.borrowed_rope_pair)]
    if d.num_experts is not None:
        out += [
            "--num-experts", str(d.num_experts),
            "--moe-router-topk", str(d.moe_router_topk),
            "--moe-ffn-hidden-size", str(d.moe_ffn_hidden_size),
            *(["--moe-router-pre-softmax"] if d.moe_router_pre_softmax else []),
        ]  # fmt: skip
    return out


def to_megatron_args(d: ModelDescription) -> Namespace:
    """The part of Megatron's parsed arguments that describes the model, for a checkpoint.

    A run that loads the checkpoint with --use-checkpoint-args gets this model.
    """
    grouped = d.num_query_groups != d.num_attention_heads
    args = Namespace(
        num_layers=d.num_layers,
        hidden_size=d.hidden_size,
        ffn_hidden_size=d.ffn_hidden_size,
        seq_length=d.max_position_embeddings,
        num_attention_heads=d.num_attention_heads,
        group_query_attention=grouped,
        num_query_groups=d.num_query_groups,
        kv_channels=d.kv_channels,
        max_position_embeddings=d.max_position_embeddings,
        position_embedding_type="rope",
        add_position_embedding=True,
        rotary_base=d.rotary_base,
        rotary_percent=1.0,
        rotary_interleaved=False,
        rotary_seq_len_interpolation_factor=d.rope_linear_factor,
        use_rope_scaling=d.rope_scaling_factor is not None,
        rope_scaling_factor=d.rope_scaling_factor or 8.0,
        dmc_borrowed_rope_pair=d.borrowed_rope_pair,
        normalization="RMSNorm",
        layernorm_epsilon=d.layernorm_epsilon,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=d.add_qkv_bias,
        qk_layernorm=d.qk_layernorm,
        num_experts=d.num_experts,
        moe_router_topk=d.moe_router_topk,
        moe_ffn_hidden_size=d.moe_ffn_hidden_size if d.num_experts else None,
        moe_router_pre_softmax=d.moe_router_pre_softmax,
        untie_embeddings_and_output_weights=not d.share_embeddings_and_output_weights,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=d.init_method_std,
        vocab_size=d.vocab_size,
        padded_vocab_size=d.padded_vocab_size,
        make_vocab_size_divisible_by=VOCAB_MULTIPLE,
        params_dtype=d.dtype,
        bf16=d.dtype == torch.bfloat16,
        fp16=d.dtype == torch.float16,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        world_size=1,
        data_parallel_size=1,
        ckpt_format="torch_dist",
        no_save_optim=True,
        no_save_rng=True,
        bos_token_id=d.bos_token_id,
        eos_token_id=d.eos_token_id,
        pad_token_id=d.pad_token_id,
        hf_model_type=d.model_type,
    )
    for name, value in (d.dmc.to_dict() if d.dmc else {}).items():
        setattr(args, f"dmc_{name}", value)
    return args


def from_megatron_args(args: Namespace, *, vocab_size: int | None = None) -> ModelDescription:
    """From the arguments saved in a Megatron checkpoint.

    Args:
        args: `common_state["args"]`; --dmc-* flags are in it as `dmc_stage` and so on.
        vocab_size: used if the run was started without --vocab-size (it then counted the tokenizer's).

    Raises:
        UnsupportedConfig: names the flag that gives the model a part with no counterpart.
        CheckpointError: a size is missing.
    """
    for name, expected, flag in [
        ("position_embedding_type", "rope", "--position-embedding-type"),
        ("normalization", "RMSNorm", "--normalization"),
        ("swiglu", True, "--swiglu"),
        ("add_bias_linear", False, "--disable-bias-linear"),
        ("qk_l2_norm", False, "--qk-l2-norm"),
        ("rotary_percent", 1.0, "--rotary-percent"),
        ("rotary_interleaved", False, "--rotary-interleaved"),
        ("multi_latent_attention", False, "--multi-latent-attention"),
        ("window_size", None, "--window-size"),
        ("apply_layernorm_1p", False, "--apply-layernorm-1p"),
        ("layernorm_zero_centered_gamma", False, "--apply-layernorm-1p"),
        ("apply_query_key_layer_scaling", False, "--apply-query-key-layer-scaling"),
        ("attention_output_gate", False, "--attention-output-gate"),
        ("softmax_type", "vanilla", "--softmax-type"),
        ("no_rope_freq", None, "--no-rope-freq"),
        ("experimental_attention_variant", None, "--experimental-attention-variant"),
        ("heterogeneous_layers_config_path", None, "--heterogeneous-layers-config-path"),
        ("spec", None, "--spec"),
        ("use_mup", False, "--use-mup"),
        ("glu_linear_offset", 0.0, "--glu-linear-offset"),
        ("activation_func_clamp_value", None, "--activation-func-clamp-value"),
        ("mtp_num_layers", None, "--mtp-num-layers"),
        ("hybrid_layer_pattern", None, "--hybrid-layer-pattern"),
        ("moe_layer_freq", 1, "--moe-layer-freq"),
        ("moe_shared_expert_intermediate_size", None, "--moe-shared-expert-intermediate-size"),
        ("moe_router_score_function", "softmax", "--moe-router-score-function"),
        ("moe_router_topk_scaling_factor", None, "--moe-router-topk-scaling-factor"),
        ("moe_router_enable_expert_bias", False, "--moe-router-enable-expert-bias"),
        ("moe_router_num_groups", None, "--moe-router-num-groups"),
        ("moe_apply_probs_on_input", False, "--moe-apply-probs-on-input"),
        ("moe_latent_size", None, "--moe-latent-size"),
    ]:
        value = getattr(args, name, expected)
        if value != expected and (value or expected):
            raise UnsupportedConfig(
                f"the checkpoint was trained with {flag} ({name}={shown(value)}); only models with "
                f"{name}={expected!r} are supported"
            )

    def size(name: str) -> int:
        value = getattr(args, name, None)
        if value is None:
            raise CheckpointError(f"the checkpoint's saved arguments have no {name}")
        return value

    def flag_of(name: str) -> bool:
        value = getattr(args, name, False)
        if not isinstance(value, bool | None):
            raise UnsupportedConfig(
                f"the checkpoint's saved arguments have {name}={shown(value)}; it must be a flag"
            )
        return bool(value)

    heads = size("num_attention_heads")
    hidden = size("hidden_size")
    channels = getattr(args, "kv_channels", None)
    if channels is None:
        sizes = (hidden, heads)
        whole = all(type(n) is int and n > 0 for n in sizes)
        channels = hidden // heads if whole else 2  # of what is wrong already
    padded = size("padded_vocab_size")
    known = {f.name for f in fields(DMCConfig)}
    dmc_values = {
        name: value
        for name, value in ((n, getattr(args, f"dmc_{n}", None)) for n in known)
        if value is not None
    }
    dmc = DMCConfig.from_dict(dmc_values)
    experts = getattr(args, "num_experts", None) or None
    family = family_with(
        model_type=getattr(args, "hf_model_type", None),
        add_qkv_bias=flag_of("add_qkv_bias"),
        qk_layernorm=flag_of("qk_layernorm"),
        experts=experts is not None,
    )
    moe = {}
    if experts is not None:
        moe = {
            "num_experts": experts,
            "moe_router_topk": getattr(args, "moe_router_topk", 2),
            "moe_ffn_hidden_size": getattr(args, "moe_ffn_hidden_size", None),
            "moe_router_pre_softmax": flag_of("moe_router_pre_softmax"),
        }
    scaled = flag_of("use_rope_scaling")
    return ModelDescription(
        **moe,
        model_type=family.model_type,
        add_qkv_bias=family.add_qkv_bias,
        qk_layernorm=family.qk_layernorm,
        rope_scaling_factor=getattr(args, "rope_scaling_factor", 8.0) if scaled else None,
        rope_linear_factor=getattr(args, "rotary_seq_len_interpolation_factor", None),
        borrowed_rope_pair=getattr(args, "dmc_borrowed_rope_pair", None),
        num_layers=size("num_layers"),
        hidden_size=hidden,
        ffn_hidden_size=size("ffn_hidden_size"),
        num_attention_heads=heads,
        num_query_groups=size("num_query_groups") if flag_of("group_query_attention") else heads,
        kv_channels=channels,
        vocab_size=getattr(args, "vocab_size", None) or min(vocab_size or padded, padded),
        max_position_embeddings=size("max_position_embeddings"),
        rotary_base=getattr(args, "rotary_base", 10000),
        layernorm_epsilon=getattr(args, "layernorm_epsilon", 1e-5),
        share_embeddings_and_output_weights=not flag_of("untie_embeddings_and_output_weights"),
        dtype=parse_dtype(getattr(args, "params_dtype", None) or torch.float32),
        dmc=dmc if dmc.stage != "off" else None,
        padded_vocab_size=padded,
        init_method_std=getattr(args, "init_method_std", 0.02),
        bos_token_id=getattr(args, "bos_token_id", None),
        eos_token_id=getattr(args, "eos_token_id", None),
        pad_token_id=getattr(args, "pad_token_id", None),
    )
