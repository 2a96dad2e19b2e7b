"""Llama with Dynamic Memory Compression of its KV cache. The method is in `modeling_dmc.py`."""

from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention

from .attention_dmc import DMCAttention
from .modeling_dmc import DMCForCausalLM, DMCModel, complete_settings


class DMCLlamaConfig(LlamaConfig):
    """Llama's configuration, `dmc`, the settings of DMC, and the RoPE pair in the last place."""

    model_type = "dmc_llama"
    keys_to_ignore_at_inference = ["past_key_values", "compression_loss", "measured_cr"]

    dmc: dict[str, Any] | None = None
    borrowed_rope_pair: int | None = None

    def __post_init__(self, **kwargs):
        self.dmc = complete_settings(self.dmc)
        super().__post_init__(**kwargs)


class DMCLlamaAttention(DMCAttention, LlamaAttention):
    """Llama's projections, DMC's attention."""


class DMCLlamaModel(DMCModel, LlamaModel):
    """Llama's decoder with DMC attention."""

    attention_class = DMCLlamaAttention
    config_class = DMCLlamaConfig


class DMCLlamaForCausalLM(DMCForCausalLM, LlamaForCausalLM):
    """Llama as a language model with DMC."""

    model_class = DMCLlamaModel
    config_class = DMCLlamaConfig
