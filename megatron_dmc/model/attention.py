"""Megatron's self-attention with Dynamic Memory Compression."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.rope_utils import (
    _apply_rotary_pos_emb_bshd,
    apply_rotary_pos_emb,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_dmc.config import Stage
from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.model.config import DMCTransformerConfig
from megatron_dmc.model.decisions import DecisionRecorder, GateKey
from megatron_dmc.model.sequence_layout import SequenceLayout
from megatron_dmc.ops import (
    causal_attention,
    delayed_attention,
    eviction_attention,
    gates,
    merge,
    training_attention,
)
from megatron_dmc.schedule import zero_out_scale


class PagedAttentionContext(Protocol):
    """The paged inference context: the only object of the engine that attention uses."""

    def run_layers(
        self, compute: Callable[[Tensor], Tensor], x_TH: Tensor, freqs_SF: Tensor | None
    ) -> Tensor:
        """compute(x_TH), which calls `attend` once for each layer, or a replay of it.

        Args:
            compute: reads x_TH and what stays where it is from step to step.
            freqs_SF: what it hands to `attend`.
        """
        ...

    def attend(
        self,
        layer_index: int,
        q_TND: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        freqs_SF: Tensor | None,
        *,
        softmax_scale: float,
    ) -> Tensor:
        """Cache the new tokens of all scheduled requests and attend over the caches.

        Args:
            layer_index: 0-based, over all layers of the model.
            q_TND, k_TGD, v_TGD: projections of the packed tokens, unrotated, with the borrowed
                channel in place.
            freqs_SF: RoPE angles of positions 0 to S-1, or None for a model without RoPE.
            softmax_scale: factor on the scores.

        Returns:
            out_TND.
        """
        ...


class NoCoreAttention(torch.nn.Module):
    """Placeholder for a layer spec's core attention: DMC's attention calls its own ops."""

    def __init__(self, **kwargs):
        super().__init__()


class Angles(NamedTuple):
    """RoPE's angles, (T, 1 or B, 1, F); None for a model without RoPE."""

    own: Tensor | None
    """Of this context-parallel rank's tokens."""
    whole: Tensor | None
    """Of all tokens of the sequence."""


class DMCSelfAttention(SelfAttention):
    """Self-attention that decides, per token and KV head, to append to or merge into the cache.

    It has exactly the parameters of Megatron's `SelfAttention`, so that checkpoints of either
    load into the other. In training it runs the parallel form (docs/method.md, sections 1 to 3), in
    evaluation the same with hard decisions, and in inference it hands the projections to the
    context (`PagedAttentionContext`).

    Args (in addition to Megatron's):
        recorder: where the training loop reads the decisions; None reports nothing.

    In training and evaluation the attention mask must be None or a `GateKey` tensor.

    Attributes:
        relaxed_gates: True for training's relaxed gates (with noise, where there is a `GateKey`),
            False for hard decisions; None, the default: as the mode is, `train()` or `eval()`.
            Without effect in the engine, whose decisions are hard.
    """

    config: DMCTransformerConfig

    def __init__(
        self,
        config: DMCTransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        *,
        recorder: DecisionRecorder | None = None,
        **kwargs,
    ):
        if attn_mask_type is not AttnMaskType.causal:
            raise UnsupportedConfig(f"DMC attention is causal; the spec asks for {attn_mask_type}")
        super().__init__(config, submodules, layer_number, attn_mask_type, **kwargs)
        self.recorder = recorder
        self.layer_index = layer_number - 1
        self.softmax_scale = config.softmax_scale or self.hidden_size_per_attention_head**-0.5
        self.relaxed_gates: bool | None = None
        self._faded = False
        self.linear_qkv.register_state_dict_pre_hook(self._zero_faded_rows)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        inference_context: PagedAttentionContext | None = None,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None = None,
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        rotary_pos_cos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params=None,
        sequence_len_offset=None,
        *,
        inference_params: PagedAttentionContext | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and result as Megatron's `Attention.forward`.

        Raises:
            UnsupportedConfig: for a bias or a dense mask, and for packed sequences (thd) under
                context parallelism.
        """
        if attention_bias is not None:
            raise UnsupportedConfig("DMC attention takes no attention bias: the kernel has none")
        context = inference_context if inference_context is not None else inference_params
        if context is not None:
            # Megatron's embedding leaves strides with which a product of the tokens becomes one for each
            hidden_states = hidden_states.flatten(0, 1).unsqueeze(1)
        q_TBND, k_TBGD, v_TBGD = self.get_query_key_value_tensors(hidden_states)
        if isinstance(rotary_pos_emb, tuple):
            rotary_pos_emb = rotary_pos_emb[0]
        if context is not None:
            freqs = None if rotary_pos_emb is None else rotary_pos_emb.flatten(0, 2)
            q, k, v = (x.squeeze(1) for x in (q_TBND, k_TBGD, v_TBGD))
            out = self.attend_cached(context, q, k, v, freqs).unsqueeze(1)
        else:
            q_TBND = self._with_importance(q_TBND)
            key, starts = self._gate_key(attention_mask)
            if packed_seq_params is not None:
                starts = self._packed_starts(packed_seq_params, k_TBGD)
            layout = SequenceLayout(self.pg_collection.cp, starts)
            num_tokens = k_TBGD.shape[0] * layout.size
            angles = Angles(None, None)
            if rotary_pos_emb is not None:
                angles = Angles(*layout.angles(rotary_pos_emb, num_tokens))

            def attend(q, k, v):
                return self._attend(q, k, v, angles, key, layout)

            if self.checkpoint_core_attention and self.training:
                out = tensor_parallel.checkpoint(attend, False, q_TBND, k_TBGD, v_TBGD)
            else:
                out = attend(q_TBND, k_TBGD, v_TBGD)
        return self.linear_proj(out.flatten(2))

    def attend_cached(
        self,
        context: PagedAttentionContext,
        q_TND: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        freqs_SF: Tensor | None,
    ) -> Tensor:
        """Inference between the projections; arguments and result as `PagedAttentionContext.attend`."""
        return context.attend(
            self.layer_index, self._with_importance(q_TND), k_TGD, v_TGD, freqs_SF,
            softmax_scale=self.softmax_scale,
        )  # fmt: skip

    def _with_importance(self, q: Tensor) -> Tensor:
        """Queries whose borrowed channel is the importance's logit: the model's own, or 0 for every token."""
        dmc = self.config.dmc
        if dmc.compresses and dmc.importance == "constant":
            # in the engine's kernels too; the rows get no gradient
            return gates.scale_borrowed_channel(q, 0.0)
        return q

    @staticmethod
    def _gate_key(
        attention_mask: Tensor | None,
    ) -> tuple[GateKey | None, list[list[int]] | None]:
        if attention_mask is None:
            return None, None
        try:
            return GateKey.from_tensor(attention_mask)
        except ValueError as error:
            raise UnsupportedConfig(
                "DMC attention is causal and builds no mask; pass attention_mask=None, or a GateKey "
                f"in training ({error})"
            ) from error

    def _packed_starts(self, params, k_TBGD: Tensor) -> list[list[int]]:
        """Starts of the documents of Megatron's packed format (thd: one row of tokens)."""
        if self.pg_collection.cp.size() > 1 or k_TBGD.shape[1] != 1:
            raise UnsupportedConfig(
                f"packed sequences with context parallel size {self.pg_collection.cp.size()} and "
                f"{k_TBGD.shape[1]} rows; DMC takes one row and no context parallelism (packed "
                "documents with it: --reset-attention-mask)"
            )
        return [[s for s in params.cu_seqlens_q.tolist()[1:-1] if s < k_TBGD.shape[0]]]

    def _attend(
        self, q, k, v, angles: Angles, key: GateKey | None, layout: SequenceLayout
    ) -> Tensor:
        """q, k and v are those of this context-parallel rank's tokens."""
        stage = Stage(self.config.dmc.stage)
        if stage.compresses:
            return self._attend_compressed(q, k, v, angles, key, layout)
        if stage is Stage.ZERO_OUT:
            factor = self._zero_out_scale(key)
            self._faded = factor == 0.0 and self.training
            q = gates.scale_borrowed_channel(q, factor)
            k = gates.scale_borrowed_channel(k, factor)
            q, k = self._rotate(q, angles.own), self._rotate(k, angles.own)
            q = gates.scale_borrowed_channel(q, factor)
            k = gates.scale_borrowed_channel(k, factor)
        else:
            q, k = self._rotate(q, angles.own), self._rotate(k, angles.own)
        k, v = layout.gather(k), layout.gather(v)
        return layout.attend(causal_attention, q, k, v, softmax_scale=self.softmax_scale)

    def _attend_compressed(
        self, q, k, v, angles: Angles, key: GateKey | None, layout: SequenceLayout
    ) -> Tensor:
        dmc = self.config.dmc
        merges = dmc.policy == "merge"
        if merges:
            omega_TBG = layout.gather(
                gates.importance(q, k.shape[2], alpha_offset=dmc.alpha_offset)
            )
        q = gates.scale_borrowed_channel(q, 0.0)
        q = self._rotate(q, angles.own)
        # Segments cross the ranks' boundaries: the merge runs over the whole sequence.
        k, v = layout.gather(k), layout.gather(v)
        logit_TBG = gates.decision_logit(k, alpha_offset=dmc.alpha_offset)
        if dmc.shared_decisions:
            assert self.config.num_query_groups is not None
            logit_TBG = gates.share_decisions(
                logit_TBG, self.config.num_query_groups, self._sum_over_ranks
            )
        starts_TB = layout.starts_TB(k.shape[0])
        relaxed = self.training if self.relaxed_gates is None else self.relaxed_gates
        if relaxed:
            noise = None if key is None or not dmc.noise_scale else self._noise(logit_TBG, key)
            alpha, log_keep, alpha_hat = gates.soft_gate(
                logit_TBG, noise, temperature=dmc.temperature, starts_TB=starts_TB
            )
        else:
            alpha, log_keep, alpha_hat = gates.hard_gate(logit_TBG, starts_TB=starts_TB)
        k = gates.scale_borrowed_channel(k, 0.0)
        # what RoPE mixes into the borrowed channel is ignored by attention
        attention: Callable[..., Tensor] = training_attention
        keys: tuple[Tensor, ...] = ()
        if not merges:
            attention = partial(eviction_attention, delay=dmc.eviction_delay)
        elif dmc.merge_delay:
            attention = partial(delayed_attention, merge_delay=dmc.merge_delay)
            keys = (self._rotate(k, angles.whole), v)
        if dmc.pool_after_rope:
            k = gates.scale_borrowed_channel(self._rotate(k, angles.whole), 0.0)
        if merges:
            k, v = merge(k, v, alpha, omega_TBG, merge_window=dmc.merge_window)
        if not dmc.pool_after_rope:
            k = self._rotate(k, angles.whole)
        keys = (*keys, k, v, log_keep)
        out = layout.attend(attention, q, *keys, softmax_scale=self.softmax_scale)
        if self.recorder is not None and key is not None:
            out = self.recorder.report(out, layout.own(alpha_hat), key, self.layer_index)
        return out

    def _sum_over_ranks(self, x: Tensor) -> Tensor:
        group = self.pg_collection.tp
        if group.size() == 1:
            return x
        # the sum goes to every rank's heads, so their gradients are summed too
        total = tensor_parallel.reduce_from_tensor_model_parallel_region(x, group=group)
        return tensor_parallel.copy_to_tensor_model_parallel_region(total, group=group)

    def _noise(self, logit_TBG: Tensor, key: GateKey) -> Tensor:
        num_tokens, batch, num_heads = logit_TBG.shape
        if self.config.dmc.shared_decisions:
            heads = slice(0, 1)
        else:
            first = self.pg_collection.tp.rank() * num_heads
            heads = slice(first, first + num_heads)
        assert self.config.num_query_groups is not None
        noise = gates.logistic_noise(
            num_tokens,
            self.config.num_query_groups,
            seed=key.seed,
            step=key.step,
            samples=range(key.first_sample, key.first_sample + batch),
            layer=self.layer_index,
            heads=heads,
            device=logit_TBG.device,
        )
        return noise * self.config.dmc.noise_scale

    def _zero_out_scale(self, key: GateKey | None) -> float:
        if key is None:
            return 0.0
        return zero_out_scale(
            key.done, steps=key.length, fraction=self.config.dmc.zero_out_fraction
        )

    def _zero_faded_rows(self, linear_qkv, prefix: str, keep_vars: bool) -> None:
        """Before a checkpoint: once zero-out has faded the borrowed channels, their rows are zero.

        The rows no longer have any effect then, so this changes no result; the next stage starts
        with `alpha_logit = -alpha_offset` everywhere.
        """
        if not self._faded:
            return
        for parameter in (linear_qkv.weight, getattr(linear_qkv, "bias", None)):
            if parameter is not None:
                gates.zero_channel_rows(
                    parameter,
                    num_kv_heads=self.num_query_groups_per_partition,
                    queries_per_group=self.num_attention_heads_per_partition
                    // self.num_query_groups_per_partition,
                    head_dim=self.hidden_size_per_attention_head,
                )

    def _rotate(self, x_TBHD: Tensor, rotary: Tensor | None) -> Tensor:
        if rotary is None:
            return x_TBHD
        if rotary.shape[1] > 1:  # other angles for every sequence; no fused kernel takes them
            return _apply_rotary_pos_emb_bshd(x_TBHD, rotary)
        return apply_rotary_pos_emb(
            x_TBHD, rotary, config=self.config, cp_group=self.pg_collection.cp
        )
