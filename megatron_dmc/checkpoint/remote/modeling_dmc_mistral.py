"""Mistral with Dynamic Memory Compression of its KV cache. The method is in `modeling_dmc.py`."""

from typing import Any

from transformers import MistralConfig, MistralForCausalLM, MistralModel
from transformers.models.mistral.modeling_mistral import MistralAttention

from .modeling_dmc import DMCAttention, DMCForCausalLM, DMCModel, complete_settings


class DMCMistralConfig(MistralConfig):
    """Mistral's configuration and `dmc`, the settings of DMC."""

    model_type = "dmc_mistral"
    keys_to_ignore_at_inference = ["past_key_values", "compression_loss", "measured_cr"]

    dmc: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        self.dmc = complete_settings(self.dmc)
        super().__post_init__(**kwargs)


class DMCMistralAttention(DMCAttention, MistralAttention):
    """Mistral's projections, DMC's attention."""


class DMCMistralModel(DMCModel, MistralModel):
    """Mistral's decoder with DMC attention."""

    attention_class = DMCMistralAttention
    config_class = DMCMistralConfig


class DMCMistralForCausalLM(DMCForCausalLM, MistralForCausalLM):
    """Mistral as a language model with DMC."""

    model_class = DMCMistralModel
    config_class = DMCMistralConfig
