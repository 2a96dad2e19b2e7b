"""Megatron's TransformerConfig with DMC's settings, and the combinations that DMC refuses."""

from dataclasses import dataclass, field

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dmc.config import DMCConfig, Stage
from megatron_dmc.errors import UnsupportedConfig


@dataclass
class DMCTransformerConfig(TransformerConfig):
    """Megatron's TransformerConfig with DMC's settings in `dmc`, and the order of RoPE pairs."""

    dmc: DMCConfig = field(default_factory=DMCConfig)
    """DMC settings."""

    borrowed_rope_pair: int | None = None
    """RoPE pair that exchanges its frequency with the last one's; None: the usual order."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.validate_dmc()

    def validate_dmc(self) -> None:
        """Refuse what DMC cannot be combined with, before anything is allocated.

        Raises:
            UnsupportedConfig: names the setting, its value and the reason.
        """
        if Stage(self.dmc.stage) is not Stage.OFF:
            self.refuse_foreign_attention(f"DMC (--dmc-stage {self.dmc.stage})")

    def refuse_foreign_attention(self, name: str) -> None:
        """Refuse what DMC's attention does not do, whatever the stage.

        Raises:
            UnsupportedConfig: names what asks for this attention, the setting, its value and the reason.
        """
        assert self.kv_channels is not None and self.num_query_groups is not None
        refusals = [
            (self.kv_channels % 2 == 1, f"head dim {self.kv_channels} is odd: RoPE rotates pairs"),
            (self.multi_latent_attention,
             "multi-latent attention keeps one latent per token, not keys per head"),
            (self.window_size is not None,
             f"sliding-window attention (window_size={self.window_size}): an entry stands for many "
             "positions, so a window over positions is not defined"),
            (self.attention_dropout != 0,
             f"attention dropout {self.attention_dropout} cannot reach the stock flash kernel's "
             "merged softmax; use --attention-dropout 0"),
            (self.rotary_interleaved,
             "--rotary-interleaved pairs the borrowed channel differently; convert the weights to "
             "the half-split layout"),
            (self.attention_output_gate, "gated attention output is not supported"),
            (self.experimental_attention_variant is not None,
             f"experimental_attention_variant={self.experimental_attention_variant} replaces the "
             "attention that DMC compresses"),
            (bool(self.mtp_num_layers), "multi-token prediction layers are not supported"),
            (self.softmax_type != "vanilla",
             f"softmax_type={self.softmax_type!r}: attention sinks are not in DMC's softmax"),
            (bool(self.no_rope_freq and any(self.no_rope_freq)),
             f"--no-rope-freq (no_rope_freq={self.no_rope_freq}): the engine rotates in every layer"),
            (self.num_query_groups < self.tensor_model_parallel_size,
             f"{self.num_query_groups} KV heads over tensor_model_parallel_size="
             f"{self.tensor_model_parallel_size}: a KV head may not be split over ranks"),
            (self.fp8_param and self.dmc.stage == Stage.ZERO_OUT,
             "--fp8-param-gather keeps the weights in 8 bits with a scale for many rows, and the end of "
             "zero-out writes zeros into some of them; leave it out in this stage"),
            (self.fp4_param and self.dmc.stage == Stage.ZERO_OUT,
             "--fp4-param-gather keeps the weights in 4 bits with scales for many rows, and the end of "
             "zero-out writes zeros into some of them; leave it out in this stage"),
            (self.cuda_graph_impl != "none",
             f"cuda_graph_impl={self.cuda_graph_impl}: a graph would be captured with one microbatch's "
             "key and replayed with it: the same noise and the same count of merges at every step"),
            (self.overlap_moe_expert_parallel_comm,
             "--overlap-moe-expert-parallel-comm runs a layer's parts one by one, and DMC's attention is "
             "not divided that way"),
            (self.qk_clip or self.log_max_attention_logit,
             "--qk-clip and --log-max-attention-logit read the largest score from Transformer Engine's "
             "attention, which DMC replaces"),
            (self.hybrid_context_parallel,
             "--hybrid-context-parallel packs sequences of different context-parallel sizes; use "
             "--context-parallel-size alone"),
            (bool(set(self.offload_modules or ()) & {"qkv_linear", "core_attn", "attn_proj"}),
             f"--offload-modules {' '.join(self.offload_modules or ())}: the parts of attention are "
             "offloaded in Megatron's own attention, which DMC replaces; leave qkv_linear, core_attn and "
             "attn_proj out"),
            (self.apply_query_key_layer_scaling,
             "--apply-query-key-layer-scaling rescales scores outside the kernel"),
        ]  # fmt: skip
        for refused, why in refusals:
            if refused:
                raise UnsupportedConfig(f"{name}: {why}")
