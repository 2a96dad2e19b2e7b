"""A Hugging Face `config.json` to a `ModelDescription`, and back."""

from pathlib import Path
from typing import Any

from megatron_dmc.checkpoint.description import ModelDescription, parse_dtype
from megatron_dmc.checkpoint.families import Family, check_names, family_named, family_of
from megatron_dmc.checkpoint.field_checks import field_problems, read_json_object, shown
from megatron_dmc.config import DMCConfig
from megatron_dmc.errors import UnsupportedConfig

DMC_CLASS, DMC_TYPE = "DMC", "dmc_"
"""Prefixes of architecture and `model_type` in the folder of a DMC model."""

LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Fixed parameters of Megatron's --use-rope-scaling; only the factor can be chosen."""


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """A `config.json` with the names of the model that DMC was added to; others are left as they are.

    Its `dmc` keeps the settings.
    """
    if not str(config.get("model_type", "")).startswith(DMC_TYPE):
        return config
    plain = {name: value for name, value in config.items() if name != "auto_map"}
    plain["model_type"] = config["model_type"].removeprefix(DMC_TYPE)
    plain["architectures"] = [a.removeprefix(DMC_CLASS) for a in config.get("architectures") or []]
    return plain


def from_hf_config(config: dict[str, Any]) -> ModelDescription:
    """The description of a model from the contents of its `config.json`.

    Raises:
        UnsupportedConfig: lists every setting that is missing, of a wrong type, out of bounds or
            without a counterpart here, with its value.
    """
    check_names(config)
    values, problems = _description_fields(plain_config(config))
    problems += field_problems(values)
    try:
        values["dtype"] = parse_dtype(values["dtype"])
    except UnsupportedConfig as e:
        problems.append(str(e))
    if problems:
        raise UnsupportedConfig(f"config.json: {'; '.join(dict.fromkeys(problems))}")
    return ModelDescription(**values)


def from_hf_folder(path: str | Path) -> ModelDescription:
    """The description of the model in a folder with a `config.json`.

    Raises:
        CheckpointError: the file is missing or is not JSON.
        UnsupportedConfig: see `from_hf_config`.
    """
    return from_hf_config(read_json_object(Path(path) / "config.json"))


def _description_fields(config: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The arguments of `ModelDescription` from the contents of a `config.json`, and what is wrong.

    Returns:
        the fields, as found: `field_checks.field_problems` says whether they can be; and a text for
        every setting that is missing, of a wrong type, or has no counterpart here.

    Raises:
        UnsupportedConfig: the architecture is not supported, and nothing else can be said then.
    """
    family = family_of(config)
    config = {**family.defaults, **config}
    problems = _setting_problems(config, family)

    def size(*names: str, default: Any = None) -> Any:
        value = next((config[n] for n in names if config.get(n) is not None), default)
        if value is None:
            problems.append(f"{names[0]} is missing")
        return value

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    head_dim = None
    if type(heads) is int and type(hidden) is int and heads > 0:
        head_dim = hidden // heads
    elif config.get("head_dim") is None:
        head_dim = 2  # the sizes that it would come from are wrong already
    dmc = None
    if config.get("dmc") not in (None, {}):
        try:
            dmc = DMCConfig.from_dict(config["dmc"])
        except UnsupportedConfig as e:
            problems.append(f"dmc: {e}")
    fields = {
        "model_type": family.model_type,
        "num_layers": size("num_hidden_layers"),
        "hidden_size": hidden,
        "ffn_hidden_size": size("intermediate_size"),
        "num_attention_heads": heads,
        "num_query_groups": size("num_key_value_heads", default=heads),
        "kv_channels": size("head_dim", default=head_dim),
        "vocab_size": size("vocab_size"),
        "max_position_embeddings": size("max_position_embeddings", default=2048),
        "layernorm_epsilon": config.get("rms_norm_eps", 1e-6),
        "share_embeddings_and_output_weights": config.get("tie_word_embeddings", False),
        "add_qkv_bias": family.add_qkv_bias,
        "qk_layernorm": family.qk_layernorm,
        "dtype": next((config[n] for n in _DTYPE_KEYS if config.get(n) is not None), "float32"),
        "dmc": dmc,
        "borrowed_rope_pair": config.get("borrowed_rope_pair"),
        "init_method_std": config.get("initializer_range", 0.02),
        # a key that is absent means the family's default; a null means none
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_id": config.get("eos_token_id"),
        "pad_token_id": config.get("pad_token_id"),
        **_rope_fields(config, problems),
    }
    if family.experts is not None:
        normalised = config.get("norm_topk_prob", True)
        if not isinstance(normalised, bool):
            problems.append(f"norm_topk_prob={shown(normalised)} must be true or false")
        fields |= {
            "num_experts": size(*family.experts.count_keys),
            "moe_router_topk": size("num_experts_per_tok"),
            "moe_ffn_hidden_size": size(family.experts.width_key),
            "moe_router_pre_softmax": not normalised,
        }
    missing = {name for name in _SIZES if fields.get(name) is None}
    return {name: value for name, value in fields.items() if name not in missing}, problems


_DTYPE_KEYS = ("dtype", "torch_dtype")
_SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
          "kv_channels", "vocab_size", "num_experts", "moe_router_topk", "moe_ffn_hidden_size")  # fmt: skip
"""Fields that are left out where `config.json` has none: it was said already that they are missing."""


def _setting_problems(config: dict[str, Any], family: Family) -> list[str]:
    """Settings that change the computation and have no counterpart."""
    problems = []
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
            problems.append(
                f"{name}={shown(value)} is not supported for {family.architecture}"
                + remedies.get(name, only)
            )
    window, context = config.get("sliding_window"), config.get("max_position_embeddings")
    for name in ("sliding_window", "max_window_layers"):
        value = config.get(name)
        if value is not None and (type(value) is not int or value < 0):
            return [*problems, f"{name}={shown(value)} must be a whole number or null"]
    if "use_sliding_window" in family.required:
        first, layers = config.get("max_window_layers"), config.get("num_hidden_layers")
        kinds = config.get("layer_types")
        if not isinstance(kinds, list | None):
            problems.append(f"layer_types={shown(kinds)} must be a list")
            kinds = None
        used = config.get("use_sliding_window") and (
            first is None or type(layers) is not int or first < layers
        )
        used = used or "sliding_attention" in (kinds or [])
        window = window if used else None
    if window is not None and (type(context) is not int or window < context):
        problems.append(
            f"sliding_window={window} below max_position_embeddings={shown(context)} is "
            "active, and a DMC entry stands for many positions, so a window over positions is not "
            f"defined; set max_position_embeddings to {window} (within it the window leaves "
            "nothing out) or, if the model was trained with full attention, sliding_window to null"
        )
    return problems


def _rope_fields(config: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """rotary_base and RoPE scaling from either spelling (`rope_parameters`, `rope_scaling`)."""
    base = config.get("rope_theta")
    found: dict[str, Any] = {"rotary_base": base if base is not None else 10000.0}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key), dict | None):
            problems.append(f"{key}={shown(config[key])} must be an object or null")
            continue
        rope = dict(config.get(key) or {})
        if not rope:
            continue
        base = rope.pop("rope_theta", None)
        found["rotary_base"] = base if base is not None else found["rotary_base"]
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        rope.pop("type", None)
        partial = rope.pop("partial_rotary_factor", 1.0)
        factor = rope.pop("factor", None)
        number = isinstance(factor, int | float) and not isinstance(factor, bool)
        if partial != 1.0 or config.get("partial_rotary_factor", 1.0) != 1.0:
            problems.append(
                f"{key}.partial_rotary_factor={shown(partial)}: RoPE over a part of the head is not "
                "supported; only 1.0 is"
            )
        elif kind == "llama3" and rope == LLAMA3_ROPE and factor is not None:
            found["rope_scaling_factor"] = float(factor) if number else factor
        elif kind == "linear" and not rope and number and factor == factor // 1:
            found["rope_linear_factor"] = int(factor)
        elif kind != "default" or rope or factor is not None:
            problems.append(
                f"{key}={shown(config[key])}: Megatron has plain RoPE, rope_type 'llama3' "
                f"with {LLAMA3_ROPE} and any factor, and 'linear' with a whole factor; a model "
                "whose scaling only lengthens its context can be converted without it: remove "
                f"{key}'s scaling and set max_position_embeddings to the original length"
            )
    return found


def _rope_config(d: ModelDescription) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": float(d.rotary_base), "rope_type": "default"}
    if d.rope_scaling_factor is not None:
        rope |= {"rope_type": "llama3", "factor": d.rope_scaling_factor, **LLAMA3_ROPE}
    elif d.rope_linear_factor is not None:
        rope |= {"rope_type": "linear", "factor": float(d.rope_linear_factor)}
    config = {"rope_parameters": rope, "rope_theta": float(d.rotary_base)}
    if rope["rope_type"] != "default":
        config["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return config


def to_hf_config(d: ModelDescription) -> dict[str, Any]:
    """The contents of a `config.json`, readable by transformers 4 and 5.

    Their own models know no `borrowed_rope_pair`: a plain model has its usual order (`hf_folder.write_folder`).
    """
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
    if d.borrowed_rope_pair is not None:
        config["borrowed_rope_pair"] = d.borrowed_rope_pair
    return config
