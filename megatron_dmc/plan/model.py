"""The model to train, by name or from a Hugging Face `config.json`."""

from dataclasses import dataclass, fields

from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.field_checks import read_json_object
from megatron_dmc.checkpoint.hf_config import from_hf_config, from_hf_folder
from megatron_dmc.checkpoint.hub import local_path
from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.plan.presets import PRESETS


@dataclass
class PlannedModel(ModelDescription):
    """A `ModelDescription` with a name, of a model with a dense MLP."""

    name: str = ""
    """As the user gave it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts is not None:
            raise UnsupportedConfig(
                f"--model {self.name}: {self.num_experts} experts; memory and time are estimated for "
                "dense models only"
            )

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole model, vocabulary padding left out."""
        embeddings = (2 - self.share_embeddings_and_output_weights) * self.vocab_size
        return (
            embeddings * self.hidden_size + self.num_layers * layer_parameters(self, 1)
        ) + self.hidden_size


def layer_parameters(model: PlannedModel, tensor_parallel: int) -> int:
    """Parameters of one transformer layer on one of `tensor_parallel` ranks.

    Args:
        tensor_parallel: divides query heads, KV heads and the MLP's width.
    """
    h, d = model.hidden_size, model.kv_channels
    heads = model.num_attention_heads // tensor_parallel
    groups = model.num_query_groups // tensor_parallel
    attention = h * (heads + 2 * groups) * d + heads * d * h
    mlp = 3 * h * (model.ffn_hidden_size // tensor_parallel)
    norms = 2 * h + (2 * d if model.qk_layernorm else 0)
    biases = (heads + 2 * groups) * d if model.add_qkv_bias else 0
    return attention + mlp + norms + biases


def find_model(name: str, *, revision: str | None = None) -> PlannedModel:
    """A preset's name, a Hugging Face folder, a Hub id, or the path of a `config.json`.

    Raises:
        UnsupportedConfig: neither a preset nor a path that exists, or of no supported family.
        CheckpointError: an unreadable `config.json`.
    """
    if name in PRESETS:
        return PlannedModel(**PRESETS[name], name=name)
    path = local_path(name, revision=revision, with_weights=False)
    if path.is_dir():
        description = from_hf_folder(path)
    elif path.is_file():
        config = read_json_object(path)
        description = from_hf_config(config)
    else:
        raise UnsupportedConfig(
            f"--model {name}: neither a folder, a config.json, nor one of {', '.join(PRESETS)}"
        )
    values = {f.name: getattr(description, f.name) for f in fields(ModelDescription)}
    return PlannedModel(**values, name=name)
