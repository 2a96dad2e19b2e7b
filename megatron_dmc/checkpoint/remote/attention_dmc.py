"""Attention with Dynamic Memory Compression (DMC), before a family's attention class.

Dimension letters: T tokens, B batch, N query heads, G key/value heads, D head dim.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dmc.ops.gates import (
    decision_logit,
    hard_gate,
    importance,
    logistic,
    scale_borrowed_channel,
    share_decisions,
    soft_gate,
    zero_borrowed_channel,
)

from .cache_dmc import DMCCache
from .ops_dmc import attend, keeps_next, means, merge, rotate


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
        """A layer's straight-through decisions. A recomputed layer reports the same again."""
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
    """Module like `megatron_dmc.ops` that computes merge and attention in training. None: `ops_dmc.py`."""

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
            scale = scale_borrowed_channel(torch.ones_like(q[0, 0, 0]), state.zero_out_scale)
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
        without = zero_borrowed_channel(torch.ones_like(q[0, 0, 0]))
        if dmc["importance"] == "constant":
            q = q * without
        omega = importance(q, k.shape[2], alpha_offset=offset)
        logit = decision_logit(k, alpha_offset=offset)
        if dmc["shared_decisions"]:
            logit = share_decisions(logit, logit.shape[-1])
        if self.training:
            noise = None
            if dmc["noise_scale"]:
                heads = 1 if dmc["shared_decisions"] else logit.shape[-1]
                noise = logistic(torch.rand(*logit.shape[:-1], heads, device=logit.device))
                noise = noise * dmc["noise_scale"]
            alpha, log_keep, alpha_hat = soft_gate(
                logit, noise, temperature=dmc["temperature"], starts_TB=first
            )
        else:
            alpha, log_keep, alpha_hat = hard_gate(logit, starts_TB=first, continues=True)
        state.report(self.layer_idx, alpha_hat)
        q, k = rotate(q * without, angles) * without, k * without
        evicts = dmc["policy"] == "evict"
        n = dmc["eviction_delay"] + 1 if evicts else dmc["merge_delay"]
        if n and cache is None:
            return self._delayed(q, k, v, alpha, log_keep, omega, n, angles, state)
        if n:
            return self._delayed_in_cache(q, k, v, alpha, omega, n, angles, cache, state)
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

    def _delayed(self, q, k, v, alpha, log_keep, omega, n, angles, state):
        """Decisions that take effect n tokens later, of whole sequences."""
        dmc = self.config.dmc
        evicts = dmc["policy"] == "evict"
        ops = self.ops if self.training and state.document_TB is None else None
        near = rotate(k, angles), v
        if evicts and ops:
            delay, scale = dmc["eviction_delay"], self.scaling
            return ops.eviction_attention(
                q, *near, log_keep, delay=delay, softmax_scale=scale
            ), None
        far = near
        if not evicts:
            merged_k, merged_v = (ops.merge if ops else merge)(
                k, v, alpha, omega, merge_window=dmc["merge_window"]
            )
            far = rotate(merged_k, angles), merged_v
            if ops:
                out = ops.delayed_attention(
                    q, *near, *far, log_keep, merge_delay=n, softmax_scale=self.scaling
                )
                return out, None
        return attend(
            q, far, log_keep, near=near, n=n, evicts=evicts, softmax_scale=self.scaling,
            document_TB=state.document_TB, implementation=self.config._attn_implementation,
        )  # fmt: skip

    def _delayed_in_cache(self, q, k, v, alpha, omega, n, angles, cache, state):
        """The same behind a cache: tokens that leave its ring merge, are appended, or are gone."""
        dmc = self.config.dmc
        evicts, layer = dmc["policy"] == "evict", cache.layer(self.layer_idx)
        new = [k, v, alpha, omega, *(x.transpose(0, 1).expand(-1, k.shape[1], -1) for x in angles)]
        line = layer.pass_ring(n, new, state.real_TB)
        k, v, alpha, omega, *turns = line.values
        turns = turns[0].transpose(0, 1), turns[1].transpose(0, 1)
        log_keep = torch.zeros_like(alpha).masked_fill(alpha > 0, float("-inf"))
        near, late = (rotate(k, turns), v), slice(q.shape[0])
        if evicts:
            stays = line.late_TB[..., None] & (keeps_next(log_keep, q.shape[0]) == 0)
            never = torch.zeros_like(stays)
            *far, visible = layer.update(near[0][late], v[late], never, stays)
        else:
            sums = layer.continue_segment(
                k[late], v[late], alpha[late], omega[late], dmc["merge_window"], line.late_TB
            )
            merged_k, merged_v = means(sums, k)
            merged_k = rotate(merged_k, tuple(x[:, late] for x in turns))
            *far, visible = layer.update(merged_k, merged_v, alpha[late] > 0, line.late_TB)
        return attend(
            q, tuple(far), log_keep, near=near, n=n, evicts=evicts, softmax_scale=self.scaling,
            before_B=line.before_B, cached_BGP=visible,
            implementation=self.config._attn_implementation,
        )  # fmt: skip

    def _attend(self, q, k, v, log_keep, visible, state):
        if self.training and self.ops and state.document_TB is None and log_keep is not None:
            out = self.ops.training_attention(q, k, v, log_keep, softmax_scale=self.scaling)
            return out, None
        return attend(
            q, (k, v), log_keep, softmax_scale=self.scaling, cached_BGP=visible,
            document_TB=state.document_TB, implementation=self.config._attn_implementation,
        )  # fmt: skip
