"""Description of a model (sizes, dtype, DMC settings), and its three spellings.

The spellings are a Hugging Face `config.json`, Megatron's parsed arguments as saved in a
checkpoint, and Megatron's command-line flags.
"""

from argparse import Namespace
from dataclasses import dataclass, fields
from pathlib import Path, PurePath
from typing import Any

import torch

from megatron_dmc.checkpoint.families import check_names, family_with
from megatron_dmc.checkpoint.field_checks import field_problems, read_json_object, shown
from megatron_dmc.checkpoint.hf_config import description_fields, hf_config
from megatron_dmc.checkpoint.remote_code import plain_config
from megatron_dmc.config import DMCConfig
from megatron_dmc.errors import CheckpointError, UnsupportedConfig

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


_PLAIN = (str, bool, int, float, list, tuple, torch.dtype, PurePath, type(None))


def saved_args(args: Any, folder: Path) -> Namespace:
    """The plain values among a checkpoint's saved arguments; enums, tensors and the rest are left out.

    Raises:
        CheckpointError: it holds none.
    """
    if not isinstance(args, Namespace):
        raise CheckpointError(
            f"{folder}: holds no saved arguments, so the model's sizes are unknown"
        )
    plain = {name: value for name, value in vars(args).items() if isinstance(value, _PLAIN)}
    return Namespace(**plain)


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

    # Hugging Face

    @classmethod
    def from_hf_config(cls, config: dict[str, Any]) -> "ModelDescription":
        """From the contents of a `config.json`.

        Raises:
            UnsupportedConfig: lists every setting that is missing, of a wrong type, out of bounds or
                without a counterpart here, with its value.
        """
        check_names(config)
        values, problems = description_fields(plain_config(config))
        problems += field_problems(values)
        try:
            values["dtype"] = parse_dtype(values["dtype"])
        except UnsupportedConfig as e:
            problems.append(str(e))
        if problems:
            raise UnsupportedConfig(f"config.json: {'; '.join(dict.fromkeys(problems))}")
        return cls(**values)

    @classmethod
    def from_hf_folder(cls, path: str | Path) -> "ModelDescription":
        """From a folder with a `config.json`.

        Raises:
            CheckpointError: the file is missing or is not JSON.
            UnsupportedConfig: see `from_hf_config`.
        """
        return cls.from_hf_config(read_json_object(Path(path) / "config.json"))

    def to_hf_config(self) -> dict[str, Any]:
        """The contents of a `config.json`, readable by transformers 4 and 5."""
        return hf_config(self)

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
        if self.add_qkv_bias:
            out.append("--add-qkv-bias")
        if self.qk_layernorm:
            out.append("--qk-layernorm")
        if self.rope_scaling_factor is not None:
            out += ["--use-rope-scaling", "--rope-scaling-factor", str(self.rope_scaling_factor)]
        if self.rope_linear_factor is not None:
            out += ["--rotary-seq-len-interpolation-factor", str(self.rope_linear_factor)]
        if self.num_experts is not None:
            out += [
                "--num-experts", str(self.num_experts),
                "--moe-router-topk", str(self.moe_router_topk),
                "--moe-ffn-hidden-size", str(self.moe_ffn_hidden_size),
                *(["--moe-router-pre-softmax"] if self.moe_router_pre_softmax else []),
            ]  # fmt: skip
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
            rotary_seq_len_interpolation_factor=self.rope_linear_factor,
            use_rope_scaling=self.rope_scaling_factor is not None,
            rope_scaling_factor=self.rope_scaling_factor or 8.0,
            normalization="RMSNorm",
            layernorm_epsilon=self.layernorm_epsilon,
            swiglu=True,
            add_bias_linear=False,
            add_qkv_bias=self.add_qkv_bias,
            qk_layernorm=self.qk_layernorm,
            num_experts=self.num_experts,
            moe_router_topk=self.moe_router_topk,
            moe_ffn_hidden_size=self.moe_ffn_hidden_size if self.num_experts else None,
            moe_router_pre_softmax=self.moe_router_pre_softmax,
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
            hf_model_type=self.model_type,
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
            vocab_size: used if the run was started without --vocab-size (it then counted the tokenizer's).

        Raises:
            UnsupportedConfig: names the flag that gives the model a part with no counterpart.
            CheckpointError: a size is missing.
        """
        for name, expected, flag in [
            ("position_embedding_type", "rope", "--position-embedding-type"),
            ("normalization", "RMSNorm", "--normalization"),
            ("swiglu", True, "--swiglu"),
            ("add_bias_linear", False, "--disable-bias-linear"),
            ("qk_l2_norm", False, "--qk-l2-norm"),
            ("rotary_percent", 1.0, "--rotary-percent"),
            ("rotary_interleaved", False, "--rotary-interleaved"),
            ("multi_latent_attention", False, "--multi-latent-attention"),
            ("window_size", None, "--window-size"),
            ("apply_layernorm_1p", False, "--apply-layernorm-1p"),
            ("layernorm_zero_centered_gamma", False, "--apply-layernorm-1p"),
            ("apply_query_key_layer_scaling", False, "--apply-query-key-layer-scaling"),
            ("attention_output_gate", False, "--attention-output-gate"),
            ("softmax_type", "vanilla", "--softmax-type"),
            ("no_rope_freq", None, "--no-rope-freq"),
            ("experimental_attention_variant", None, "--experimental-attention-variant"),
            ("heterogeneous_layers_config_path", None, "--heterogeneous-layers-config-path"),
            ("spec", None, "--spec"),
            ("use_mup", False, "--use-mup"),
            ("glu_linear_offset", 0.0, "--glu-linear-offset"),
            ("activation_func_clamp_value", None, "--activation-func-clamp-value"),
            ("mtp_num_layers", None, "--mtp-num-layers"),
            ("hybrid_layer_pattern", None, "--hybrid-layer-pattern"),
            ("moe_layer_freq", 1, "--moe-layer-freq"),
            ("moe_shared_expert_intermediate_size", None, "--moe-shared-expert-intermediate-size"),
            ("moe_router_score_function", "softmax", "--moe-router-score-function"),
            ("moe_router_topk_scaling_factor", None, "--moe-router-topk-scaling-factor"),
            ("moe_router_enable_expert_bias", False, "--moe-router-enable-expert-bias"),
            ("moe_router_num_groups", None, "--moe-router-num-groups"),
            ("moe_apply_probs_on_input", False, "--moe-apply-probs-on-input"),
            ("moe_latent_size", None, "--moe-latent-size"),
        ]:
            value = getattr(args, name, expected)
            if value != expected and (value or expected):
                raise UnsupportedConfig(
                    f"the checkpoint was trained with {flag} ({name}={shown(value)}); only models with "
                    f"{name}={expected!r} are supported"
                )

        def size(name: str) -> int:
            value = getattr(args, name, None)
            if value is None:
                raise CheckpointError(f"the checkpoint's saved arguments have no {name}")
            return value

        def flag_of(name: str) -> bool:
            value = getattr(args, name, False)
            if not isinstance(value, bool | None):
                raise UnsupportedConfig(
                    f"the checkpoint's saved arguments have {name}={shown(value)}; it must be a flag"
                )
            return bool(value)

        heads = size("num_attention_heads")
        hidden = size("hidden_size")
        channels = getattr(args, "kv_channels", None)
        if channels is None:
            sizes = (hidden, heads)
            whole = all(type(n) is int and n > 0 for n in sizes)
            channels = hidden // heads if whole else 2  # of what is wrong already
        padded = size("padded_vocab_size")
        known = {f.name for f in fields(DMCConfig)}
        dmc_values = {
            name: value
            for name, value in ((n, getattr(args, f"dmc_{n}", None)) for n in known)
            if value is not None
        }
        dmc = DMCConfig.from_dict(dmc_values)
        experts = getattr(args, "num_experts", None) or None
        family = family_with(
            model_type=getattr(args, "hf_model_type", None),
            add_qkv_bias=flag_of("add_qkv_bias"),
            qk_layernorm=flag_of("qk_layernorm"),
            experts=experts is not None,
        )
        moe = {}
        if experts is not None:
            moe = {
                "num_experts": experts,
                "moe_router_topk": getattr(args, "moe_router_topk", 2),
                "moe_ffn_hidden_size": getattr(args, "moe_ffn_hidden_size", None),
                "moe_router_pre_softmax": flag_of("moe_router_pre_softmax"),
            }
        scaled = flag_of("use_rope_scaling")
        return cls(
            **moe,
            model_type=family.model_type,
            add_qkv_bias=family.add_qkv_bias,
            qk_layernorm=family.qk_layernorm,
            rope_scaling_factor=getattr(args, "rope_scaling_factor", 8.0) if scaled else None,
            rope_linear_factor=getattr(args, "rotary_seq_len_interpolation_factor", None),
            num_layers=size("num_layers"),
            hidden_size=hidden,
            ffn_hidden_size=size("ffn_hidden_size"),
            num_attention_heads=heads,
            num_query_groups=size("num_query_groups")
            if flag_of("group_query_attention")
            else heads,
            kv_channels=channels,
            vocab_size=getattr(args, "vocab_size", None) or min(vocab_size or padded, padded),
            max_position_embeddings=size("max_position_embeddings"),
            rotary_base=getattr(args, "rotary_base", 10000),
            layernorm_epsilon=getattr(args, "layernorm_epsilon", 1e-5),
            share_embeddings_and_output_weights=not flag_of("untie_embeddings_and_output_weights"),
            dtype=parse_dtype(getattr(args, "params_dtype", None) or torch.float32),
            dmc=dmc if dmc.stage != "off" else None,
            padded_vocab_size=padded,
            init_method_std=getattr(args, "init_method_std", 0.02),
            bos_token_id=getattr(args, "bos_token_id", None),
            eos_token_id=getattr(args, "eos_token_id", None),
            pad_token_id=getattr(args, "pad_token_id", None),
        )
