"""Dynamic Memory Compression (DMC) for models of transformers: decoder, loss, padding, generation.

The gates are in `gates_dmc.py`, merge and attention in `ops_dmc.py`, the layer around them in
`attention_dmc.py`, the compressed cache in `cache_dmc.py`, the settings in `configuration_dmc.py`.
They need torch and transformers alone; the families (`modeling_dmc_llama.py` and so on) are thin
classes on top.

Dimension letters: T tokens, B batch.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from megatron_dmc.config import DMCConfig
from megatron_dmc.ops.gates import BORROWED_CHANNEL, exchange_borrowed_pair

from .attention_dmc import ForwardState
from .cache_dmc import DMCCache


def complete_settings(dmc: dict[str, Any] | None) -> dict[str, Any]:
    """The `dmc` of a config.json with defaults filled in.

    Raises:
        ValueError: a setting or its value is unknown, or not supported by this code.
    """
    settings = DMCConfig.from_dict(dmc or {})
    if settings.pool_after_rope:
        raise ValueError("dmc pool_after_rope: not supported in transformers; use megatron-dmc")
    return settings.to_dict()


def exchange_angles(
    pair: int, _module: nn.Module, _args: Any, angles: tuple[Tensor, Tensor]
) -> tuple[Tensor, ...]:
    """Forward hook of a rotary embedding: cos and sin (B, T, D) with a RoPE pair and the last one exchanged.

    Not its buffer of frequencies, which `from_pretrained` computes again.
    """
    return tuple(exchange_borrowed_pair(x.unflatten(-1, (2, -1)), pair).flatten(-2) for x in angles)


@dataclass
class DMCOutput(CausalLMOutputWithPast):
    """transformers' output, where `loss` in training holds the compression loss too."""

    compression_loss: Tensor | None = None
    """In training: loss_weight x mean over rows of max(0, (1 - 1 / target CR) - merge rate)."""
    measured_cr: Tensor | None = None
    """Tokens / cache entries of the tokens of this call; in training with the noisy decisions."""


class DMCModel(nn.Module):
    """Before a family's model class: DMC attention, DMC cache, padding moved behind the tokens."""

    config: Any
    embed_tokens: Any
    rotary_emb: Any
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
        if (pair := config.borrowed_rope_pair) is not None:
            head_dim = self.layers[0].self_attn.head_dim
            if not 0 <= pair < head_dim // 2:
                raise ValueError(
                    f"config.json: borrowed_rope_pair={pair}: a head of {head_dim} has the RoPE pairs 0 to "
                    f"{head_dim // 2 - 1}"
                )
            self.rotary_emb.register_forward_hook(partial(exchange_angles, pair))
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
        module `megatron_dmc.ops`: linear memory); None: with `ops_dmc.py`."""
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
