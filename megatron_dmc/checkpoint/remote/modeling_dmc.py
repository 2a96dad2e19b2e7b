"""Dynamic Memory Compression (DMC) for models of transformers: attention, loss, padding, generation.

The method is in `ops_dmc.py`, the compressed cache in `cache_dmc.py`. The three need torch and
transformers alone; the families (`modeling_dmc_llama.py` and so on) are thin classes on top.

Dimension letters: T tokens, B batch, N query heads, G key/value heads, D head dim.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .cache_dmc import DMCCache
from .ops_dmc import (
    BORROWED_CHANNEL,
    attend,
    decision_logit,
    hard_gate,
    importance,
    logistic_noise,
    means,
    merge,
    rotate,
    soft_gate,
)

DEFAULTS: dict[str, Any] = {
    "stage": "off",  # off, zero-out, retrofit, finetune; tokens merge in the last two
    "target_cr": 4.0,  # tokens / cache entries to reach
    "ramp_steps": None,  # of the training run; not used here
    "cr_schedule": "linear",  # likewise
    "zero_out_steps": None,  # likewise
    "zero_out_fraction": 0.8,  # likewise
    "alpha_offset": 5.0,  # a zeroed channel means: append
    "temperature": 0.1,  # of the relaxed decisions in training
    "noise_scale": 1.0,  # factor on their noise
    "importance": "learned",  # constant: an entry is the plain mean of its tokens
    "shared_decisions": False,  # the heads of a layer decide together
    "merge_window": 0,  # only the latest tokens of a segment count; 0: all
    "hinge": "sequence",  # where the compression loss stops at 0: per row, by their mean, nowhere
    "loss_weight": 1.0,  # of the compression loss relative to the language-model loss
}
CHOICES = {
    "stage": ("off", "zero-out", "retrofit", "finetune"),
    "importance": ("learned", "constant"),
    "hinge": ("sequence", "batch", "none"),
}
NOT_HERE = {"policy": "merge", "pool_after_rope": False, "merge_delay": 0}
"""Settings that this code knows only one value of."""


def complete_settings(dmc: dict[str, Any] | None) -> dict[str, Any]:
    """The `dmc` of a config.json with defaults filled in.

    Raises:
        ValueError: a setting or its value is unknown, or this code has no form of it.
    """
    for name, only in NOT_HERE.items():
        value = (dmc or {}).get(name, only)
        if value != only:
            raise ValueError(
                f"dmc {name} {value!r}: this code knows only {only!r}; use megatron-dmc"
            )
    unknown = set(dmc or {}) - set(DEFAULTS) - set(NOT_HERE) - {"eviction_delay"}
    if unknown:
        raise ValueError(
            f"config.json: unknown dmc settings {sorted(unknown)}; known: {', '.join(DEFAULTS)}"
        )
    settings = DEFAULTS | (dmc or {})
    for name, choices in CHOICES.items():
        if settings[name] not in choices:
            raise ValueError(f"dmc {name} {settings[name]!r}: choose one of {', '.join(choices)}")
    return settings


# Loss


@dataclass
class ForwardState:
    """State shared by the layers of one forward, and the merges that they report."""

    first_TB: Tensor | None = None
    """Bool: nothing stands before the token, so it cannot merge."""
    real_TB: Tensor | None = None
    """Bool: False for padding, which stands behind a row's tokens. None: no padding."""
    document_TB: Tensor | None = None
    """Number of the token's document in its row. None: a row is one document."""
    zero_out_scale: float = 0.0
    """Factor on the borrowed channels in the zero-out stage."""
    with_gradient: bool = False
    merges_B: dict[int, Tensor] = field(default_factory=dict)
    """By layer: merged tokens, summed over tokens and KV heads, with the gates' gradient."""

    def on(self, device: torch.device) -> "ForwardState":
        """The same with its tensors on a layer's device; reports go to one place."""
        if self.first_TB is None or self.first_TB.device == device:
            return self
        moved: dict[str, Any] = {
            name: None if (tensor := getattr(self, name)) is None else tensor.to(device)
            for name in ("first_TB", "real_TB", "document_TB")
        }
        return replace(self, **moved)

    def report(self, layer: int, alpha_hat_TBG: Tensor) -> None:
        """A layer's straight-through state. A recomputed layer reports the same again."""
        if self.with_gradient and not torch.is_grad_enabled():
            raise ValueError(
                "DMC: re-entrant gradient checkpointing hides the decisions from the compression "
                "loss; use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if self.real_TB is not None:
            alpha_hat_TBG = alpha_hat_TBG * self.real_TB[..., None]
        self.merges_B[layer] = alpha_hat_TBG.sum(dim=(0, 2))

    def summary(self, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """merge_rate_B (over all layers, heads and tokens but the first), tokens, entries."""
        assert self.first_TB is not None
        real = torch.ones_like(self.first_TB) if self.real_TB is None else self.real_TB
        heads = len(self.merges_B) * num_kv_heads
        merges_B = torch.stack([m.to(self.first_TB.device) for m in self.merges_B.values()]).sum(0)
        could_B = (real & ~self.first_TB).sum(0) * heads
        tokens = real.sum() * heads
        return merges_B / could_B.clamp_min(1), tokens, tokens - merges_B.detach().sum()


@dataclass
class DMCOutput(CausalLMOutputWithPast):
    """transformers' output, where `loss` in training holds the compression loss too."""

    compression_loss: Tensor | None = None
    """In training: loss_weight x mean over rows of max(0, (1 - 1 / target CR) - merge rate)."""
    measured_cr: Tensor | None = None
    """Tokens / cache entries of the tokens of this call; in training with the noisy state."""


# Model


class DMCAttention(nn.Module):
    """Forward of a DMC attention; before a family's attention class, which makes the projections."""

    config: Any
    q_proj: Any
    k_proj: Any
    v_proj: Any
    o_proj: Any
    q_norm: Any
    k_norm: Any
    layer_idx: int
    head_dim: int
    scaling: float
    ops: Any = None
    """Module like `megatron_dmc.ops` that computes merge and attention in training. None: this file."""

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q_TBND, k_TBGD, v_TBGD of (B, T, H) hidden states, unrotated."""
        q, k, v = (
            p(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(0, 1)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):  # Qwen3
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: DMCCache | None = None,
        dmc_state: ForwardState | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """As the family's attention. `attention_mask` is not looked at: see `DMCModel.forward`."""
        if dmc_state is None:
            raise ValueError("DMC attention is called by its own model class only")
        dmc_state = dmc_state.on(hidden_states.device)
        q, k, v = self.project(hidden_states)
        dmc = self.config.dmc
        if dmc["stage"] in ("retrofit", "finetune"):
            attended = self._compressed(
                q, k, v, dmc, position_embeddings, past_key_values, dmc_state
            )
        else:
            attended = self._plain(q, k, v, dmc, position_embeddings, past_key_values, dmc_state)
        out, weights = attended
        return self.o_proj(out.transpose(0, 1).flatten(2)), weights

    def _plain(self, q, k, v, dmc, angles, cache, state):
        if dmc["stage"] == "zero-out":
            scale = q.new_ones(self.head_dim)
            scale[BORROWED_CHANNEL] = state.zero_out_scale
            q, k = rotate(q * scale, angles) * scale, rotate(k * scale, angles) * scale
        else:
            q, k = rotate(q, angles), rotate(k, angles)
        visible = None
        if cache is not None:
            never = torch.zeros(k.shape[:3], dtype=torch.bool, device=k.device)
            k, v, visible = cache.layer(self.layer_idx).update(k, v, never, state.real_TB)
        return self._attend(q, k, v, None, visible, state)

    def _compressed(self, q, k, v, dmc, angles, cache, state):
        first, offset = state.first_TB, dmc["alpha_offset"]
        without = torch.ones_like(q[0, 0, 0])
        without[BORROWED_CHANNEL] = 0
        if dmc["importance"] == "constant":
            q = q * without
        omega = importance(q, k.shape[2], alpha_offset=offset)
        logit = decision_logit(k, alpha_offset=offset)
        if dmc["shared_decisions"]:
            logit = logit.mean(-1, keepdim=True).expand_as(logit)
        if self.training:
            noise = None
            if dmc["noise_scale"]:
                heads = 1 if dmc["shared_decisions"] else logit.shape[-1]
                noise = logistic_noise((*logit.shape[:-1], heads), logit.device)
                noise = noise * dmc["noise_scale"]
            alpha, log_keep, alpha_hat = soft_gate(
                logit, noise, first, temperature=dmc["temperature"]
            )
        else:
            alpha, log_keep, alpha_hat = hard_gate(logit, first)
        state.report(self.layer_idx, alpha_hat)
        q, k = rotate(q * without, angles) * without, k * without
        if cache is None:
            k, v = (self.ops.merge if self.training and self.ops else merge)(
                k, v, alpha, omega, merge_window=dmc["merge_window"]
            )
            return self._attend(q, rotate(k, angles), v, log_keep, None, state)
        layer = cache.layer(self.layer_idx)
        sums = layer.continue_segment(k, v, alpha, omega, dmc["merge_window"], state.real_TB)
        k, v = means(sums, k)
        k, v, visible = layer.update(rotate(k, angles), v, alpha > 0, state.real_TB)
        return self._attend(q, k, v, log_keep, visible, state)

    def _attend(self, q, k, v, log_keep, visible, state):
        if self.training and self.ops and state.document_TB is None and log_keep is not None:
            out = self.ops.training_attention(q, k, v, log_keep, softmax_scale=self.scaling)
            return out, None
        return attend(
            q, k, v, log_keep, softmax_scale=self.scaling, cached_BGP=visible,
            document_TB=state.document_TB, implementation=self.config._attn_implementation,
        )  # fmt: skip


class DMCModel(nn.Module):
    """Before a family's model class: DMC attention, DMC cache, padding moved behind the tokens."""

    config: Any
    embed_tokens: Any
    layers: Any
    attention_class: type[nn.Module]
    zero_out_scale: float = 0.0

    def __init__(self, config):
        super().__init__(config)
        sliding = getattr(config, "sliding_window", None)
        if sliding is not None:
            raise ValueError(
                f"config.json: sliding_window={sliding}: an entry of DMC stands for many positions; "
                "export the model with full attention"
            )
        for index, layer in enumerate(self.layers):
            layer.self_attn = self.attention_class(config, index)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DMCCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        dmc_state: ForwardState | None = None,
        **kwargs,
    ):
        """As the family's. Padding may stand left, right or between; a row's tokens are moved together
        for the layers, so that its padding takes part in nothing and is cached nowhere.

        Raises:
            ValueError: for a cache that is not a `DMCCache`, a cache in training, or a mask that is
                not (B, tokens seen + T).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch, num_tokens = inputs_embeds.shape[:2]
        if past_key_values is not None and not isinstance(past_key_values, DMCCache):
            raise ValueError(
                f"past_key_values is a {type(past_key_values).__name__}; this model compresses its "
                "own cache: pass a DMCCache, or nothing"
            )
        if self.training:
            if past_key_values is not None:
                raise ValueError("relaxed decisions cannot be cached: call model.eval() first")
            use_cache = False
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        real = None
        if attention_mask is not None:
            if attention_mask.shape != (batch, past + num_tokens):
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}; DMC takes "
                    f"{(batch, past + num_tokens)}, 0 where a token is padding"
                )
            counted = attention_mask.long().cumsum(-1)
            real = attention_mask[:, past:].bool()
            if real.all():
                real = None
        given = position_ids is not None
        if position_ids is None and attention_mask is not None:
            position_ids = (counted[:, past:] - 1).clamp_min(0)
        elif position_ids is None:
            position_ids = past + torch.arange(num_tokens, device=inputs_embeds.device)[None]
        position_ids = position_ids.expand(batch, -1)
        order = None
        if real is not None and (real[:, 1:] & ~real[:, :-1]).any():
            order = (~real).long().argsort(dim=1, stable=True)
            inputs_embeds = inputs_embeds.gather(1, order[..., None].expand_as(inputs_embeds))
            position_ids, real = position_ids.gather(1, order), real.gather(1, order)

        state = ForwardState() if dmc_state is None else dmc_state
        first = torch.zeros(batch, num_tokens, dtype=torch.bool, device=inputs_embeds.device)
        if past == 0:
            first[:, 0] = True
        elif past_key_values is not None:  # a row may have been padding until now
            first[:, 0] = past_key_values.real_tokens(first.device) == 0
        if given and attention_mask is None and past_key_values is None:
            restarts = position_ids[:, 1:] != position_ids[:, :-1] + 1
            if restarts.any():  # documents packed into one row
                use_cache = False
                first[:, 1:] |= restarts
                state.document_TB = first.long().cumsum(1).T
        if use_cache if use_cache is not None else self.config.use_cache:
            past_key_values = DMCCache() if past_key_values is None else past_key_values
        state.first_TB = first.T
        state.real_TB = None if real is None else real.T
        state.zero_out_scale = self.zero_out_scale
        state.with_gradient = self.training and torch.is_grad_enabled()
        outputs = super().forward(
            inputs_embeds=inputs_embeds,
            # passed on as it is, instead of a dense causal mask that is never read
            attention_mask=inputs_embeds.new_ones(1, 1, 1, 1),
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            dmc_state=state,
            **kwargs,
        )
        if past_key_values is not None:
            past_key_values.count(batch, num_tokens, real)
        if order is not None:
            back = order.argsort(dim=1)

            def restore(x: Tensor) -> Tensor:
                return x.gather(1, back[..., None].expand_as(x))

            outputs.last_hidden_state = restore(outputs.last_hidden_state)
            if outputs.hidden_states is not None:
                outputs.hidden_states = tuple(restore(h) for h in outputs.hidden_states)
        return outputs


class DMCForCausalLM(nn.Module):
    """Before a family's causal language model: the compression loss, and what generation may use."""

    config: Any
    model: Any
    model_class: type[nn.Module]
    _is_stateful = True  # a merged token cannot be taken back: no assisted generation
    _supports_flash_attn = False
    _supports_flex_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = False

    def __init__(self, config):
        super().__init__(config)
        self.model = self.model_class(config)
        self.current_target_cr: float | None = None
        self.post_init()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Always: transformers would else guess from a module's source file, ignore a kernel that it
        cannot set with a warning, and not refuse one that does not exist here."""
        return True

    # Training: settings that change between steps

    def set_dmc(self, **settings) -> None:
        """Change settings of `config.dmc` (`stage`, `target_cr`, `noise_scale`, ...); saved with it."""
        self.config.dmc = complete_settings(self.config.dmc | settings)

    def set_dmc_step(
        self, *, target_cr: float | None = None, zero_out_scale: float | None = None
    ) -> None:
        """Settings that a schedule changes at every step; not saved.

        Args:
            target_cr: in place of the configured one, for instance while it rises from 1.
            zero_out_scale: factor on the borrowed channels in the zero-out stage, from 1 to 0.
        """
        if target_cr is not None:
            self.current_target_cr = target_cr
        if zero_out_scale is not None:
            self.model.zero_out_scale = zero_out_scale

    def set_dmc_ops(self, ops: Any) -> None:
        """Compute merge and attention in training with `ops.merge` and `ops.training_attention` (the
        module `megatron_dmc.ops`: linear memory); None: with this file's."""
        for layer in self.model.layers:
            layer.self_attn.ops = ops

    @torch.no_grad()
    def zero_borrowed_channels(self) -> None:
        """End of the zero-out stage: zero what the borrowed channels are projected with, adapters
        included, so that a retrofit starts with `alpha_logit = -alpha_offset`."""
        for layer in self.model.layers:
            attention = layer.self_attn
            for projection in (attention.q_proj, attention.k_proj):
                rows = projection.out_features
                for (
                    parameter
                ) in projection.parameters():  # (rows, ...), except for LoRA's (rank, in)
                    if parameter.shape[0] == rows:
                        parameter[BORROWED_CHANNEL % attention.head_dim :: attention.head_dim] = 0

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DMCCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> DMCOutput:
        """As the family's; in training (`model.train()`) `loss` is the language model's plus the
        compression loss, weighted by the share of the batch's labels that this call has."""
        state = ForwardState()
        outputs = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, labels=labels,
            use_cache=use_cache, logits_to_keep=logits_to_keep, dmc_state=state, **kwargs,
        )  # fmt: skip
        outputs = DMCOutput(**outputs)
        if not state.merges_B:
            return outputs
        dmc = self.config.dmc
        rate_B, tokens, entries = state.summary(self.config.num_key_value_heads)
        outputs.measured_cr = tokens / entries
        if not self.training:
            return outputs
        target = self.current_target_cr or dmc["target_cr"]
        short_B = (1 - 1 / target) - (rate_B.mean() if dmc["hinge"] == "batch" else rate_B)
        hinge = short_B if dmc["hinge"] == "none" else short_B.clamp_min(0)
        outputs.compression_loss = dmc["loss_weight"] * hinge.mean()
        if outputs.loss is not None:
            share = 1.0
            if (total := kwargs.get("num_items_in_batch")) is not None:
                shifted = kwargs.get("shift_labels")
                if shifted is None:
                    assert labels is not None
                    shifted = labels[:, 1:]
                share = (shifted != -100).sum() / total
            outputs.loss = outputs.loss + outputs.compression_loss.to(outputs.loss.device) * share
        return outputs

    # Generation

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        implementation = generation_config.cache_implementation
        if implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={implementation!r}: this model compresses its own cache; "
                "leave the setting out"
            )
        if model_kwargs.get("past_key_values") is not None:
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, *args, **kwargs
            )
        if generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = DMCCache()
        return None
