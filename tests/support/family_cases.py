"""A tiny random model of every family, made by transformers."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCAB = 100
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2}
CASES = {
    "llama2": LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama3-tied": LlamaConfig(
        **SIZES, rope_parameters=LLAMA3 | {"factor": 32.0}, tie_word_embeddings=True
    ),
    "llama-linear": LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "factor": 4.0,
                                                          "rope_theta": 1e4}),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
    "qwen2-tied": Qwen2Config(
        **{k: v for k, v in SIZES.items() if k != "head_dim"}, tie_word_embeddings=True
    ),
    "qwen3": Qwen3Config(**SIZES),
    "qwen3-tied": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "mixtral": MixtralConfig(**SIZES, **EXPERTS, num_local_experts=4, sliding_window=None),
    "qwen3-moe": Qwen3MoeConfig(
        **SIZES, **EXPERTS, num_experts=4, moe_intermediate_size=24, norm_topk_prob=True
    ),
    "qwen3-moe-plain": Qwen3MoeConfig(
        **SIZES, **EXPERTS, num_experts=4, moe_intermediate_size=24, norm_topk_prob=False
    ),
}  # fmt: skip


def save(config, path: Path):
    """A random model in a folder; norms and biases are random too, so that a wrong location shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "bias" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    model.save_pretrained(path)
    return model


def tokens(batch=2, length=300):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCAB, (batch, length), generator=generator)


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}
