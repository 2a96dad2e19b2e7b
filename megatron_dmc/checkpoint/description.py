"""Description of a model: sizes, dtype, DMC settings.

It is spelled as a Hugging Face `config.json` (`hf_config`), and as Megatron's parsed arguments and command-line flags
(`megatron_args`).
"""

from dataclasses import dataclass

import torch

from megatron_dmc.checkpoint.field_checks import field_problems, shown
from megatron_dmc.config import DMCConfig
from megatron_dmc.errors import UnsupportedConfig

VOCAB_MULTIPLE = 128
"""Megatron pads the vocabulary to a multiple of this (its --make-vocab-size-divisible-by)."""

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    """`"bfloat16"` or `"torch.bfloat16"` -> `torch.bfloat16`.

    Raises:
        UnsupportedConfig: for anything that is not a floating-point dtype of `DTYPES`.
    """
    key = str(name).removeprefix("torch.")
    if key not in DTYPES:
        raise UnsupportedConfig(
            f"dtype {shown(name)} is not supported; use one of {', '.join(DTYPES)}"
        )
    return DTYPES[key]


@dataclass
class ModelDescription:
    """Sizes and settings of a decoder with RMSNorm, RoPE (half-split) and SwiGLU."""

    num_layers: int
    """Transformer layers."""

    hidden_size: int
    """Width of the residual stream."""

    ffn_hidden_size: int
    """Width of the gate, and of the up projection."""

    num_attention_heads: int
    """Query heads."""

    num_query_groups: int
    """Key/value heads."""

    kv_channels: int
    """Head dim."""

    vocab_size: int
    """Token ids of the model, without padding."""

    max_position_embeddings: int
    """Longest context that the model was made for."""

    rotary_base: int = 10000
    """Base of the RoPE frequencies."""

    layernorm_epsilon: float = 1e-5
    """Added to the mean square in RMSNorm."""

    share_embeddings_and_output_weights: bool = False
    """True where the output layer is the embedding."""

    model_type: str = "llama"
    """Hugging Face's name of the family (`families.FAMILIES`)."""

    add_qkv_bias: bool = False
    """The query, key and value projections have biases (Qwen2)."""

    qk_layernorm: bool = False
    """RMSNorm over the head dim of queries and keys, before RoPE (Qwen3)."""

    rope_scaling_factor: float | None = None
    """Llama 3's RoPE scaling: its factor. None: plain RoPE."""

    rope_linear_factor: int | None = None
    """Positions are divided by this before RoPE."""

    borrowed_rope_pair: int | None = None
    """RoPE pair that has exchanged its frequency with the last one, whose second channel DMC borrows. None: the
    usual order, as is the last pair itself."""

    num_experts: int | None = None
    """Experts of every layer's MLP; None: a dense MLP."""

    moe_router_topk: int = 2
    """Experts that a token goes to."""

    moe_ffn_hidden_size: int | None = None
    """An expert's feed-forward size, where there are experts."""

    moe_router_pre_softmax: bool = False
    """The experts' weights are the softmax over all experts, not renormalised over the chosen."""

    dtype: torch.dtype = torch.float32
    """Dtype of the weights."""

    dmc: DMCConfig | None = None
    """DMC settings; None: a plain model."""

    padded_vocab_size: int = 0
    """Rows of the embedding as Megatron keeps it. 0: the next multiple of 128."""

    init_method_std: float = 0.02
    """Standard deviation of the initial weights; no part in computing."""

    bos_token_id: int | None = None
    """Begin-of-text token, where known."""

    eos_token_id: int | list[int] | None = None
    """End-of-text token or tokens, where known."""

    pad_token_id: int | None = None
    """Padding token, where known."""

    def __post_init__(self) -> None:
        problems = field_problems(vars(self))
        if problems:
            raise UnsupportedConfig("; ".join(problems))
        if self.num_experts is not None and self.moe_ffn_hidden_size is None:
            self.moe_ffn_hidden_size = self.ffn_hidden_size
        self.rotary_base = int(self.rotary_base)
        if self.borrowed_rope_pair == self.kv_channels // 2 - 1:
            self.borrowed_rope_pair = None
        self.dtype = parse_dtype(self.dtype)
        if not self.padded_vocab_size:
            self.padded_vocab_size = -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def summary(self) -> str:
        """One line for people."""
        heads = f"{self.num_attention_heads}/{self.num_query_groups} heads of {self.kv_channels}"
        experts = f", {self.num_experts} experts" if self.num_experts else ""
        dmc = f", DMC {self.dmc.stage} at target CR {self.dmc.target_cr}" if self.dmc else ""
        return (
            f"{self.model_type}, {self.num_layers} layers of {self.hidden_size}, {heads}{experts}, "
            f"vocabulary {self.vocab_size}, {dtype_name(self.dtype)}{dmc}"
        )
