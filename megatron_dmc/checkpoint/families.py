"""The model families that convert: one row of the table each, for both directions.

A family says how Hugging Face spells it: the architecture, which parts it has, the names of its
tensors, and what a key means that `config.json` leaves out. `hf_config.py` reads and writes
`config.json` by it, `hf_tensors.py` the tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_dmc.checkpoint.field_checks import shown
from megatron_dmc.errors import UnsupportedConfig


@dataclass(frozen=True)
class ExpertNames:
    """A mixture of experts in Hugging Face's names, below `model.layers.N.`."""

    router: str
    expert: str
    """With `{e}` for the expert and `{part}` for one of `parts`."""
    parts: tuple[str, str, str]
    """Gate, up and down projection."""
    count_keys: tuple[str, ...]
    """`config.json`'s keys for the number of experts; all are written, the first found is read."""
    width_key: str
    """`config.json`'s key for an expert's feed-forward size."""


@dataclass(frozen=True)
class Family:
    """One architecture: RMSNorm before attention and MLP, RoPE (half-split), SwiGLU."""

    architecture: str
    model_type: str
    add_qkv_bias: bool = False
    """The query, key and value projections have biases, and nothing else has."""
    qk_layernorm: bool = False
    """RMSNorm over the head dim of queries and keys, before RoPE."""
    experts: ExpertNames | None = None
    required: Mapping[str, Any] = field(default_factory=dict)
    """Settings that must have this value (or be absent), and are written so."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Default of transformers if `config.json` lacks the key."""
    always_head_dim: bool = True
    """False: its configuration has no key `head_dim`, which is then written only where it is unusual."""
    remote_code: bool = False
    """transformers can run its DMC models: see `remote_code.py`."""

    @property
    def name(self) -> str:
        """The prefix of transformers' classes, such as `Llama`."""
        return self.architecture.removesuffix("ForCausalLM")


_QWEN_WINDOW = {"use_sliding_window": False}
_LLAMA_TOKENS = {"bos_token_id": 1, "eos_token_id": 2}

FAMILIES: tuple[Family, ...] = (
    Family(
        "LlamaForCausalLM", "llama", remote_code=True,
        required={"attention_bias": False, "mlp_bias": False},
        defaults=_LLAMA_TOKENS,
    ),
    Family(
        "MistralForCausalLM", "mistral", remote_code=True,
        defaults={**_LLAMA_TOKENS, "sliding_window": 4096, "num_key_value_heads": 8},
    ),
    Family(
        "Qwen2ForCausalLM", "qwen2", remote_code=True, add_qkv_bias=True,
        required=_QWEN_WINDOW, defaults={"sliding_window": 4096}, always_head_dim=False,
    ),
    Family(
        "Qwen3ForCausalLM", "qwen3", remote_code=True, qk_layernorm=True,
        required={"attention_bias": False, **_QWEN_WINDOW},
        defaults={"sliding_window": 4096, "head_dim": 128},
    ),
    Family(
        "MixtralForCausalLM", "mixtral",
        experts=ExpertNames(
            "block_sparse_moe.gate", "block_sparse_moe.experts.{e}.{part}", ("w1", "w3", "w2"),
            ("num_local_experts",), "intermediate_size",
        ),
        required={"norm_topk_prob": True},
        defaults={
            **_LLAMA_TOKENS, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_key_value_heads": 8,
            "num_local_experts": 8, "num_experts_per_tok": 2,
        },
    ),
    Family(
        "Qwen3MoeForCausalLM", "qwen3_moe", qk_layernorm=True,
        experts=ExpertNames(
            "mlp.gate", "mlp.experts.{e}.{part}", ("gate_proj", "up_proj", "down_proj"),
            ("num_experts", "num_local_experts"), "moe_intermediate_size",
        ),
        required={
            "attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
            **_QWEN_WINDOW,
        },
        defaults={
            "sliding_window": 4096, "num_experts_per_tok": 8, "norm_topk_prob": False,
            "num_key_value_heads": 4,
        },
    ),
)  # fmt: skip

_REASONS = {
    "Deepseek": "its multi-latent attention (kv_lora_rank) keeps one latent per token, and there are "
    "no keys per head that DMC could merge",
    "Gemma": "its norms are zero-centred, its MLP is GeGLU, and layers have sliding windows or "
    "soft-capped scores",
    "Phi3": "it stores fused projections; save it with separate q, k, v, gate and up projections "
    "as LlamaForCausalLM",
    "Qwen2Moe": "it has a shared expert with a gate of its own",
    "GptOss": "it has attention sinks and sliding windows",
    "Llama4": "its layers differ (no RoPE in some, chunked attention)",
}


def check_names(config: dict[str, Any]) -> None:
    """Raises:
    UnsupportedConfig: `architectures` is no list of names, or `model_type` no name.
    """
    architectures, model_type = config.get("architectures"), config.get("model_type")
    names = architectures if architectures is not None else []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UnsupportedConfig(
            f"config.json: architectures={shown(architectures)} must be a list of names"
        )
    if not isinstance(model_type, str | None):
        raise UnsupportedConfig(f"config.json: model_type={shown(model_type)} must be a name")


def family_of(config: dict[str, Any]) -> Family:
    """The family of a `config.json`, by `architectures` or, where that is absent, `model_type`.

    Raises:
        UnsupportedConfig: names the architecture, the reason where one is known, and what is
            supported.
    """
    architectures = config.get("architectures") or []
    for family in FAMILIES:
        if family.architecture in architectures:
            return family
        if not architectures and config.get("model_type") == family.model_type:
            return family
    field_name = "architectures" if architectures else "model_type"
    found = ", ".join(architectures)[:100] or config.get("model_type") or "none"
    reason = next((f": {why}" for part, why in _REASONS.items() if part in str(found)), "")
    supported = ", ".join(f.architecture for f in FAMILIES)
    raise UnsupportedConfig(
        f"config.json: {field_name}={found} is not supported{reason}; convert a model of one of "
        f"{supported}"
    )


def family_with(
    *, model_type: str | None, add_qkv_bias: bool, qk_layernorm: bool, experts: bool
) -> Family:
    """The family of a model that is known by its parts, as Megatron's arguments describe it.

    Args:
        model_type: taken where it fits the parts; Megatron's own runs do not save it, and a Mistral
            without a sliding window is then a Llama, which computes the same.

    Raises:
        UnsupportedConfig: no family has these parts.
    """
    parts = (add_qkv_bias, qk_layernorm, experts)
    fitting = [
        f for f in FAMILIES if (f.add_qkv_bias, f.qk_layernorm, f.experts is not None) == parts
    ]
    if not fitting:
        raise UnsupportedConfig(
            f"--add-qkv-bias={add_qkv_bias} with --qk-layernorm={qk_layernorm} and "
            f"--num-experts={'set' if experts else 'not set'}: no supported Hugging Face family "
            "has these parts together"
        )
    return next((f for f in fitting if f.model_type == model_type), fitting[0])


def family_named(model_type: str) -> Family:
    """The family with this `model_type`, which must be in the table."""
    return next(f for f in FAMILIES if f.model_type == model_type)
