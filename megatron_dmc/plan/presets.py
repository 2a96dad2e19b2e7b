"""Sizes of well-known models, as in their published `config.json` files. No torch."""

from typing import Any


def _preset(
    layers: int,
    hidden: int,
    ffn: int,
    heads: int,
    groups: int,
    vocab: int,
    context: int,
    base: int,
    **other: Any,
) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": 128,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "rotary_base": base,
        "dtype": "bfloat16",
        **other,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "llama2-7b": _preset(32, 4096, 11008, 32, 32, 32000, 4096, 10000),
    "llama2-13b": _preset(40, 5120, 13824, 40, 40, 32000, 4096, 10000),
    "llama2-70b": _preset(80, 8192, 28672, 64, 8, 32000, 4096, 10000),
    "llama3-8b": _preset(32, 4096, 14336, 32, 8, 128256, 8192, 500000),
    "llama3-70b": _preset(80, 8192, 28672, 64, 8, 128256, 8192, 500000),
    "mistral-7b": _preset(32, 4096, 14336, 32, 8, 32768, 32768, 1000000),  # v0.3: no window
    "qwen3-8b": _preset(
        36,
        4096,
        12288,
        32,
        8,
        151936,
        40960,
        1000000,
        layernorm_epsilon=1e-6,
        qk_layernorm=True,
        model_type="qwen3",
    ),
    "qwen3-14b": _preset(
        40,
        5120,
        17408,
        40,
        8,
        151936,
        40960,
        1000000,
        layernorm_epsilon=1e-6,
        qk_layernorm=True,
        model_type="qwen3",
    ),
}
