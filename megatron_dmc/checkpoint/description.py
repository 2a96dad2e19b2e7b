"""What a model is (sizes, dtype, DMC settings), and its three spellings.

The spellings are a Hugging Face `config.json`, Megatron's parsed arguments as saved in a
checkpoint, and Megatron's command-line flags.
"""

import json
from argparse import Namespace
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from megatron_dmc.config import DMCConfig
from megatron_dmc.errors import CheckpointError, UnsupportedConfig

VOCAB_MULTIPLE = 128
"""Megatron pads the vocabulary to a multiple of this (its --make-vocab-size-divisible-by)."""

HF_ARCHITECTURE = "LlamaForCausalLM"
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
        raise UnsupportedConfig(f"dtype {name!r} is not supported; use one of {', '.join(DTYPES)}")
    return DTYPES[key]


@dataclass
class ModelDescription:
    """Sizes and settings of a Llama-shaped model: RMSNorm, RoPE (half-split), SwiGLU, no biases."""

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
        for name in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "vocab_size",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UnsupportedConfig(f"{name}={value!r} must be a positive integer")
        if self.num_attention_heads % self.num_query_groups:
            raise UnsupportedConfig(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_query_groups={self.num_query_groups} (num_key_value_heads)"
            )
        if self.kv_channels % 2:
            raise UnsupportedConfig(
                f"kv_channels={self.kv_channels} (head dim) is odd: RoPE rotates pairs"
            )
        if int(self.rotary_base) != self.rotary_base or self.rotary_base <= 0:
            raise UnsupportedConfig(
                f"rotary_base={self.rotary_base}: Megatron's --rotary-base is a positive integer"
            )
        self.rotary_base = int(self.rotary_base)
        self.dtype = parse_dtype(self.dtype)
        if not self.padded_vocab_size:
            self.padded_vocab_size = -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        if self.padded_vocab_size < self.vocab_size:
            raise UnsupportedConfig(
                f"padded_vocab_size={self.padded_vocab_size} is below vocab_size={self.vocab_size}"
            )

    def summary(self) -> str:
        """One line for people."""
        heads = f"{self.num_attention_heads}/{self.num_query_groups} heads of {self.kv_channels}"
        dmc = f", DMC {self.dmc.stage} at target CR {self.dmc.target_cr}" if self.dmc else ""
        return (
            f"{self.num_layers} layers of {self.hidden_size}, {heads}, vocabulary "
            f"{self.vocab_size}, {dtype_name(self.dtype)}{dmc}"
        )

    # Hugging Face

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> "ModelDescription":
        """From the contents of a `config.json`.

        Raises:
            UnsupportedConfig: names the setting that has no counterpart here, and its value.
            CheckpointError: a size is missing.
        """
        architectures = config.get("architectures") or []
        is_llama = HF_ARCHITECTURE in architectures if architectures else (
            config.get("model_type") == "llama"
        )  # fmt: skip
        if not is_llama:
            found = ", ".join(architectures) or config.get("model_type") or "none"
            raise UnsupportedConfig(
                f"config.json: architecture {found} is not supported; only {HF_ARCHITECTURE} is"
            )
        for name, plain in [
            ("attention_bias", False),
            ("mlp_bias", False),
            ("hidden_act", "silu"),
            ("quantization_config", None),
            ("sliding_window", None),
        ]:
            value = config.get(name)
            if value is not None and value != plain:
                raise UnsupportedConfig(
                    f"config.json: {name}={value!r} is not supported for {HF_ARCHITECTURE}"
                    + (f"; only {plain!r} is" if plain is not None else "")
                )

        rope = dict(config.get("rope_parameters") or {})
        scaling = dict(config.get("rope_scaling") or {})
        for key, source in (("rope_parameters", rope), ("rope_scaling", scaling)):
            kind = source.get("rope_type", source.get("type", "default"))
            extra = set(source) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
            if kind != "default" or extra or source.get("partial_rotary_factor", 1.0) != 1.0:
                raise UnsupportedConfig(
                    f"config.json: {key}={source}: RoPE scaling is not supported; only plain RoPE "
                    'over the whole head (rope_type "default") is'
                )
        theta = rope.get("rope_theta", scaling.get("rope_theta", config.get("rope_theta", 10000.0)))

        def size(name: str, default: int | None = None) -> int:
            value = config.get(name)
            if value is None:
                value = default
            if value is None:
                raise CheckpointError(f"config.json: {name} is missing")
            return value

        heads = size("num_attention_heads")
        hidden = size("hidden_size")
        return cls(
            num_layers=size("num_hidden_layers"),
            hidden_size=hidden,
            ffn_hidden_size=size("intermediate_size"),
            num_attention_heads=heads,
            num_query_groups=size("num_key_value_heads", heads),
            kv_channels=size("head_dim", hidden // max(1, heads)),
            vocab_size=size("vocab_size"),
            max_position_embeddings=size("max_position_embeddings", 2048),
            rotary_base=theta,
            layernorm_epsilon=config.get("rms_norm_eps", 1e-6),
            share_embeddings_and_output_weights=bool(config.get("tie_word_embeddings", False)),
            dtype=parse_dtype(config.get("dtype") or config.get("torch_dtype") or "float32"),
            dmc=DMCConfig.from_dict(config["dmc"]) if config.get("dmc") else None,
            init_method_std=config.get("initializer_range", 0.02),
            # A key that is absent means Llama's defaults; a null means none.
            bos_token_id=config.get("bos_token_id", 1),
            eos_token_id=config.get("eos_token_id", 2),
            pad_token_id=config.get("pad_token_id"),
        )

    @classmethod
    def from_hf_folder(cls, path: str | Path) -> "ModelDescription":
        """From a folder with a `config.json`.

        Raises:
            CheckpointError: the file is missing or is not JSON.
            UnsupportedConfig: see `from_hf_config`.
        """
        file = Path(path) / "config.json"
        try:
            config = json.loads(file.read_text())
        except OSError as e:
            raise CheckpointError(f"{file}: cannot be read ({e.strerror or e})") from e
        except ValueError as e:
            raise CheckpointError(f"{file}: not valid JSON ({e}); copy the file again") from e
        if not isinstance(config, dict):
            raise CheckpointError(f"{file}: holds {type(config).__name__}, not a JSON object")
        return cls.from_hf_config(config)

    def to_hf_config(self) -> dict[str, Any]:
        """The contents of a `config.json`, readable by transformers 4 and 5."""
        config: dict[str, Any] = {
            "architectures": [HF_ARCHITECTURE],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "dtype": dtype_name(self.dtype),
            "eos_token_id": self.eos_token_id,
            "head_dim": self.kv_channels,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.init_method_std,
            "intermediate_size": self.ffn_hidden_size,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_query_groups,
            "pad_token_id": self.pad_token_id,
            "rms_norm_eps": self.layernorm_epsilon,
            "rope_parameters": {"rope_theta": float(self.rotary_base), "rope_type": "default"},
            "rope_theta": float(self.rotary_base),
            "tie_word_embeddings": self.share_embeddings_and_output_weights,
            "torch_dtype": dtype_name(self.dtype),
            "use_cache": True,
            "vocab_size": self.vocab_size,
        }
        if self.dmc is not None:
            config["dmc"] = self.dmc.to_dict()
        return config

    # Megatron

    def megatron_flags(self) -> list[str]:
        """Flags with which Megatron's parser builds this model.

        Training's own choices (--seq-length, --bf16, the tokenizer, --dmc-*) are left out.
        """
        flags = {
            "--num-layers": self.num_layers,
            "--hidden-size": self.hidden_size,
            "--ffn-hidden-size": self.ffn_hidden_size,
            "--num-attention-heads": self.num_attention_heads,
            "--kv-channels": self.kv_channels,
            "--max-position-embeddings": self.max_position_embeddings,
            "--position-embedding-type": "rope",
            "--rotary-base": self.rotary_base,
            "--normalization": "RMSNorm",
            "--norm-epsilon": self.layernorm_epsilon,
            "--init-method-std": self.init_method_std,
            "--attention-dropout": 0.0,
            "--hidden-dropout": 0.0,
            "--vocab-size": self.vocab_size,
            "--padded-vocab-size": self.padded_vocab_size,
        }
        out = [text for flag, value in flags.items() for text in (flag, str(value))]
        out += ["--swiglu", "--disable-bias-linear"]
        if self.num_query_groups != self.num_attention_heads:
            out += ["--group-query-attention", "--num-query-groups", str(self.num_query_groups)]
        if not self.share_embeddings_and_output_weights:
            out.append("--untie-embeddings-and-output-weights")
        return out

    def to_megatron_args(self) -> Namespace:
        """The part of Megatron's parsed arguments that describes the model, for a checkpoint.

        A run that loads the checkpoint with --use-checkpoint-args gets this model.
        """
        grouped = self.num_query_groups != self.num_attention_heads
        args = Namespace(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            seq_length=self.max_position_embeddings,
            num_attention_heads=self.num_attention_heads,
            group_query_attention=grouped,
            num_query_groups=self.num_query_groups,
            kv_channels=self.kv_channels,
            max_position_embeddings=self.max_position_embeddings,
            position_embedding_type="rope",
            add_position_embedding=True,
            rotary_base=self.rotary_base,
            rotary_percent=1.0,
            rotary_interleaved=False,
            use_rope_scaling=False,
            normalization="RMSNorm",
            layernorm_epsilon=self.layernorm_epsilon,
            swiglu=True,
            add_bias_linear=False,
            add_qkv_bias=False,
            untie_embeddings_and_output_weights=not self.share_embeddings_and_output_weights,
            attention_dropout=0.0,
            hidden_dropout=0.0,
            init_method_std=self.init_method_std,
            vocab_size=self.vocab_size,
            padded_vocab_size=self.padded_vocab_size,
            make_vocab_size_divisible_by=VOCAB_MULTIPLE,
            params_dtype=self.dtype,
            bf16=self.dtype == torch.bfloat16,
            fp16=self.dtype == torch.float16,
            tensor_model_parallel_size=1,
            pipeline_model_parallel_size=1,
            world_size=1,
            data_parallel_size=1,
            ckpt_format="torch_dist",
            no_save_optim=True,
            no_save_rng=True,
            bos_token_id=self.bos_token_id,
            eos_token_id=self.eos_token_id,
            pad_token_id=self.pad_token_id,
        )
        for name, value in (self.dmc.to_dict() if self.dmc else {}).items():
            setattr(args, f"dmc_{name}", value)
        return args

    @classmethod
    def from_megatron_args(
        cls, args: Namespace, *, vocab_size: int | None = None
    ) -> "ModelDescription":
        """From the arguments saved in a Megatron checkpoint.

        Args:
            args: `common_state["args"]`; --dmc-* flags are in it as `dmc_stage` and so on.
            vocab_size: used where the run had no --vocab-size (it then counted the tokenizer's).

        Raises:
            UnsupportedConfig: names the flag that makes the model something else than a Llama.
            CheckpointError: a size is missing.
        """
        for name, expected, flag in [
            ("position_embedding_type", "rope", "--position-embedding-type"),
            ("normalization", "RMSNorm", "--normalization"),
            ("swiglu", True, "--swiglu"),
            ("add_bias_linear", False, "--disable-bias-linear"),
            ("add_qkv_bias", False, "--add-qkv-bias"),
            ("qk_layernorm", False, "--qk-layernorm"),
            ("qk_l2_norm", False, "--qk-l2-norm"),
            ("rotary_percent", 1.0, "--rotary-percent"),
            ("rotary_interleaved", False, "--rotary-interleaved"),
            ("rotary_seq_len_interpolation_factor", None, "--rotary-seq-len-interpolation-factor"),
            ("use_rope_scaling", False, "--use-rope-scaling"),
            ("num_experts", None, "--num-experts"),
            ("multi_latent_attention", False, "--multi-latent-attention"),
            ("window_size", None, "--window-size"),
            ("apply_layernorm_1p", False, "--apply-layernorm-1p"),
            ("layernorm_zero_centered_gamma", False, "--apply-layernorm-1p"),
            ("apply_query_key_layer_scaling", False, "--apply-query-key-layer-scaling"),
            ("attention_output_gate", False, "--attention-output-gate"),
            ("mtp_num_layers", None, "--mtp-num-layers"),
            ("hybrid_layer_pattern", None, "--hybrid-layer-pattern"),
        ]:
            value = getattr(args, name, expected)
            if value != expected and (value or expected):
                raise UnsupportedConfig(
                    f"the checkpoint was trained with {flag} ({name}={value!r}); only "
                    f"Llama-shaped models ({name}={expected!r}) are supported"
                )

        def size(name: str) -> int:
            value = getattr(args, name, None)
            if value is None:
                raise CheckpointError(f"the checkpoint's saved arguments have no {name}")
            return value

        heads = size("num_attention_heads")
        hidden = size("hidden_size")
        padded = size("padded_vocab_size")
        known = {f.name for f in fields(DMCConfig)}
        dmc_values = {
            name: value
            for name, value in ((n, getattr(args, f"dmc_{n}", None)) for n in known)
            if value is not None
        }
        dmc = DMCConfig.from_dict(dmc_values)
        return cls(
            num_layers=size("num_layers"),
            hidden_size=hidden,
            ffn_hidden_size=size("ffn_hidden_size"),
            num_attention_heads=heads,
            num_query_groups=(
                size("num_query_groups") if getattr(args, "group_query_attention", False) else heads
            ),
            kv_channels=getattr(args, "kv_channels", None) or hidden // heads,
            vocab_size=getattr(args, "vocab_size", None) or vocab_size or padded,
            max_position_embeddings=size("max_position_embeddings"),
            rotary_base=getattr(args, "rotary_base", 10000),
            layernorm_epsilon=getattr(args, "layernorm_epsilon", 1e-5),
            share_embeddings_and_output_weights=not getattr(
                args, "untie_embeddings_and_output_weights", False
            ),
            dtype=parse_dtype(getattr(args, "params_dtype", None) or torch.float32),
            dmc=dmc if dmc.stage != "off" else None,
            padded_vocab_size=padded,
            init_method_std=getattr(args, "init_method_std", 0.02),
            bos_token_id=getattr(args, "bos_token_id", None),
            eos_token_id=getattr(args, "eos_token_id", None),
            pad_token_id=getattr(args, "pad_token_id", None),
        )
