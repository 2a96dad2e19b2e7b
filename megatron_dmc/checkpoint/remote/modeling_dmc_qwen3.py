"""Qwen3 with Dynamic Memory Compression of its KV cache. The method is in `modeling_dmc.py`."""

from typing import Any

from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from .modeling_dmc import DMCAttention, DMCForCausalLM, DMCModel, complete_settings


class DMCQwen3Config(Qwen3Config):
    """Qwen3's configuration and `dmc`, the settings of DMC."""

    model_type = "dmc_qwen3"
    keys_to_ignore_at_inference = ["past_key_values", "compression_loss", "measured_cr"]

    dmc: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        self.dmc = complete_settings(self.dmc)
        super().__post_init__(**kwargs)


class DMCQwen3Attention(DMCAttention, Qwen3Attention):
    """Qwen3's projections, DMC's attention."""


class DMCQwen3Model(DMCModel, Qwen3Model):
    """Qwen3's decoder with DMC attention."""

    attention_class = DMCQwen3Attention
    config_class = DMCQwen3Config


class DMCQwen3ForCausalLM(DMCForCausalLM, Qwen3ForCausalLM):
    """Qwen3 as a language model with DMC."""

    model_class = DMCQwen3Model
    config_class = DMCQwen3Config
