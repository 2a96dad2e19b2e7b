"""A random tiny Llama as transformers writes it."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 200


def llama_config(*, groups: int = 2, tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=96,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=groups,
        head_dim=32,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-5,
        rope_theta=50000.0,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.1,
    )


def save_llama(path: Path, dtype: torch.dtype = torch.float32, **options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(**options)).to(dtype).eval()
    with torch.no_grad():  # norms of 1 would hide a norm in the wrong place
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(0.2 * torch.randn_like(weight))
    model.save_pretrained(path)
    return model


def edit_config(folder: Path, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# Round trip and logits
