"""Qwen2 with Dynamic Memory Compression of its KV cache. The method is in `modeling_dmc.py`."""

from typing import Any

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from .modeling_dmc import DMCAttention, DMCForCausalLM, DMCModel, complete_settings


class DMCQwen2Config(Qwen2Config):
    """Qwen2's configuration and `dmc`, the settings of DMC."""

    model_type = "dmc_qwen2"
    keys_to_ignore_at_inference = ["past_key_values", "compression_loss", "measured_cr"]

    dmc: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        self.dmc = complete_settings(self.dmc)
        super().__post_init__(**kwargs)


class DMCQwen2Attention(DMCAttention, Qwen2Attention):
    """Qwen2's projections, DMC's attention."""


class DMCQwen2Model(DMCModel, Qwen2Model):
    """Qwen2's decoder with DMC attention."""

    attention_class = DMCQwen2Attention
    config_class = DMCQwen2Config


class DMCQwen2ForCausalLM(DMCForCausalLM, Qwen2ForCausalLM):
    """Qwen2 as a language model with DMC."""

    model_class = DMCQwen2Model
    config_class = DMCQwen2Config
