"""Random tiny DMC models of transformers, for the tests of the export."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.remote_code import SUPPORTED, module_of, write_remote_code
from megatron_dmc.config import DMCConfig

VOCAB = 96
SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.35,
    bos_token_id=None, eos_token_id=None, pad_token_id=0, rope_theta=10000.0,
)  # fmt: skip
FAMILIES = {family.model_type: family for family in SUPPORTED.values()}


def settings(**changes) -> dict:
    # a small offset: about half of the tokens merge in a random model
    return DMCConfig(
        **{"stage": "finetune", "target_cr": 4.0, "alpha_offset": 0.3} | changes
    ).to_dict()


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (batch, length), generator=generator)


def model_of(family: str = "llama", seed: int = 0, sizes: dict | None = None, **dmc):
    """A random DMC model in evaluation mode."""
    module, name = module_of(FAMILIES[family]), "DMC" + FAMILIES[family].architecture
    extra = {"sliding_window": None} if family == "mistral" else {}
    config_class = getattr(module, name.replace("ForCausalLM", "Config"))
    torch.manual_seed(seed)
    config = config_class(**SIZES | extra | (sizes or {}), dmc=settings(**dmc))
    return getattr(module, name)(config).eval()


def in_float64(model):
    """The model in float64, its norms too: transformers' compute in float32 in any dtype."""
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                exact = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(parent, name, exact)
    return model.double()


def save_with_code(model, folder: Path) -> None:
    """A folder as the export writes it, from a model of any family."""
    plain = model.config.to_dict()
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    description = replace(
        ModelDescription(2, 8, 8, 2, 2, 4, 8, 8), dmc=DMCConfig.from_dict(plain["dmc"])
    )
    (folder / "config.json").write_text(json.dumps(config))
    write_remote_code(folder, description)
