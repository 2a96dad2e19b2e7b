"""Megatron models with random weights, plain or retrofitted, as tests of the engine use them."""

import torch

from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.load import LoadedModel, build_model
from megatron_dmc.config import DMCConfig

VOCAB = 96


def random_model(
    kv_heads=2, *, dmc=None, dtype=torch.float64, ffn_hidden_size=48, kv_channels=8, **fields
) -> LoadedModel:
    description = ModelDescription(
        num_layers=3,
        hidden_size=32,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=4,
        num_query_groups=kv_heads,
        kv_channels=kv_channels,
        vocab_size=VOCAB,
        max_position_embeddings=128,
        dtype=dtype,
        dmc=dmc,
        **fields,
    )
    model = build_model(description, dmc=dmc, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scale = 0.1 if "norm" in name else 0.35
        parameter.data.copy_(values * scale + (1.0 if "norm" in name else 0.0))
    return LoadedModel(model, description, None)


def retrofitted(merge_window=0, **settings) -> DMCConfig:
    # a small offset: about half of the tokens merge in a random model
    return DMCConfig(stage="finetune", target_cr=2.0, alpha_offset=0.3, merge_window=merge_window,
                     **settings)  # fmt: skip
