"""A Hugging Face `config.json` to the fields of `ModelDescription`, and back."""

from typing import TYPE_CHECKING, Any

from megatron_dmc.checkpoint.families import Family, family_named, family_of
from megatron_dmc.config import DMCConfig
from megatron_dmc.errors import CheckpointError, UnsupportedConfig

if TYPE_CHECKING:
    from megatron_dmc.checkpoint.description import ModelDescription

LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What Megatron's --use-rope-scaling has built in; only the factor can be chosen."""


def description_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `ModelDescription` from the contents of a `config.json`.

    Raises:
        UnsupportedConfig: names the setting that has no counterpart here, its value, and what can be
            done.
        CheckpointError: a size is missing.
    """
    family = family_of(config)
    config = {**family.defaults, **config}
    _check_settings(config, family)

    def size(*names: str, default: int | None = None) -> int:
        value = next((config[n] for n in names if config.get(n) is not None), default)
        if value is None:
            raise CheckpointError(f"config.json: {names[0]} is missing")
        return value

    heads = size("num_attention_heads")
    hidden = size("hidden_size")
    fields = {
        "model_type": family.model_type,
        "num_layers": size("num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": size("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": size("num_key_value_heads", default=heads),
        "kv_channels": size("head_dim", default=hidden // max(1, heads)),
        "vocab_size": size("vocab_size"),
        "max_position_embeddings": size("max_position_embeddings", default=2048),
        "layernorm_epsilon": config.get("rms_norm_eps", 1e-6),
        "share_embeddings_and_output_weights": bool(config.get("tie_word_embeddings", False)),
        "add_qkv_bias": family.add_qkv_bias,
        "qk_layernorm": family.qk_layernorm,
        "dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
        "dmc": DMCConfig.from_dict(config["dmc"]) if config.get("dmc") else None,
        "init_method_std": config.get("initializer_range", 0.02),
        # a key that is absent means the family's default; a null means none
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": config.get("eos_token_id"),
        "pad_token_id": config.get("pad_token_id"),
        **_rope_fields(config),
    }
    if family.experts is not None:
        fields |= {
            "num_experts": size(*family.experts.count_keys),
            "moe_router_topk": size("num_experts_per_tok"),
            "moe_ffn_hidden_size": size(family.experts.width_key),
            "moe_router_pre_softmax": not config.get("norm_topk_prob", True),
        }
    return fields


def _check_settings(config: dict[str, Any], family: Family) -> None:
    """Refuse what changes the computation and has no counterpart."""
    required = {"hidden_act": "silu", "quantization_config": None, **family.required}
    if required.get("use_sliding_window") is False:
        del required["use_sliding_window"]  # looked at below: it may be set without effect
    remedies = {
        "quantization_config": "; dequantize the model and save it as safetensors first",
    }
    for name, plain in required.items():
        value = config.get(name)
        if value is not None and value != plain:
            only = f"; only {plain!r} is" if plain is not None else ""
            raise UnsupportedConfig(
                f"config.json: {name}={value!r} is not supported for {family.architecture}"
                + remedies.get(name, only)
            )
    window, context = config.get("sliding_window"), config.get("max_position_embeddings")
    if "use_sliding_window" in family.required:
        first = config.get("max_window_layers")
        used = config.get("use_sliding_window") and (
            first is None or first < config.get("num_hidden_layers", 0)
        )
        used = used or "sliding_attention" in (config.get("layer_types") or [])
        window = window if used else None
    if window is not None and (context is None or window < context):
        raise UnsupportedConfig(
            f"config.json: sliding_window={window} below max_position_embeddings={context} is "
            "active, and a DMC entry stands for many positions, so a window over positions is not "
            f"defined; set max_position_embeddings to {window} (within it the window leaves "
            "nothing out) or, if the model was trained with full attention, sliding_window to null"
        )


def _rope_fields(config: dict[str, Any]) -> dict[str, Any]:
    """rotary_base and RoPE scaling from either spelling (`rope_parameters`, `rope_scaling`)."""
    base = config.get("rope_theta")
    found: dict[str, Any] = {"rotary_base": base if base is not None else 10000.0}
    for key in ("rope_scaling", "rope_parameters"):
        rope = dict(config.get(key) or {})
        if not rope:
            continue
        found["rotary_base"] = rope.pop("rope_theta", None) or found["rotary_base"]
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        rope.pop("type", None)
        partial = rope.pop("partial_rotary_factor", 1.0)
        factor = rope.pop("factor", None)
        if partial != 1.0 or config.get("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedConfig(
                f"config.json: {key}.partial_rotary_factor={partial}: RoPE over a part of the head "
                "is not supported; only 1.0 is"
            )
        if kind == "llama3" and rope == LLAMA3_ROPE and factor is not None:
            found["rope_scaling_factor"] = float(factor)
        elif kind == "linear" and not rope and factor is not None and float(factor).is_integer():
            found["rope_linear_factor"] = int(factor)
        elif kind != "default" or rope or factor is not None:
            raise UnsupportedConfig(
                f"config.json: {key}={config[key]}: Megatron has plain RoPE, rope_type 'llama3' "
                f"with {LLAMA3_ROPE} and any factor, and 'linear' with a whole factor; a model "
                "whose scaling only lengthens its context can be converted without it: remove "
                f"{key}'s scaling and set max_position_embeddings to the original length"
            )
    return found


def _rope_config(d: "ModelDescription") -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": float(d.rotary_base), "rope_type": "default"}
    if d.rope_scaling_factor is not None:
        rope |= {"rope_type": "llama3", "factor": d.rope_scaling_factor, **LLAMA3_ROPE}
    elif d.rope_linear_factor is not None:
        rope |= {"rope_type": "linear", "factor": float(d.rope_linear_factor)}
    config = {"rope_parameters": rope, "rope_theta": float(d.rotary_base)}
    if rope["rope_type"] != "default":
        config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return config


def hf_config(d: "ModelDescription") -> dict[str, Any]:
    """The contents of a `config.json`, readable by transformers 4 and 5."""
    family = family_named(d.model_type)
    dtype = str(d.dtype).removeprefix("torch.")
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "attention_dropout": 0.0,
        "bos_token_id": d.bos_token_id,
        "dtype": dtype,
        "eos_token_id": d.eos_token_id,
        "hidden_act": "silu",
        "hidden_size": d.hidden_size,
        "initializer_range": d.init_method_std,
        "intermediate_size": d.ffn_hidden_size,
        "max_position_embeddings": d.max_position_embeddings,
        "model_type": family.model_type,
        "num_attention_heads": d.num_attention_heads,
        "num_hidden_layers": d.num_layers,
        "num_key_value_heads": d.num_query_groups,
        "pad_token_id": d.pad_token_id,
        "rms_norm_eps": d.layernorm_epsilon,
        **_rope_config(d),
        "tie_word_embeddings": d.share_embeddings_and_output_weights,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": d.vocab_size,
        **{k: v for k, v in family.required.items() if k != "norm_topk_prob"},
    }
    if family.always_head_dim or d.kv_channels * d.num_attention_heads != d.hidden_size:
        config["head_dim"] = d.kv_channels
    if "sliding_window" in family.defaults:
        config["sliding_window"] = None
    if family.experts is not None:
        config |= dict.fromkeys(family.experts.count_keys, d.num_experts)
        config[family.experts.width_key] = d.moe_ffn_hidden_size
        config["num_experts_per_tok"] = d.moe_router_topk
        if "norm_topk_prob" not in family.required:
            config["norm_topk_prob"] = not d.moe_router_pre_softmax
    if d.dmc is not None:
        config["dmc"] = d.dmc.to_dict()
    return config
