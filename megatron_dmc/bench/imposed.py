"""Merge decisions imposed on a model that has none of its own (random weights, `--simulate-cr`).

The borrowed channels of keys and queries are overwritten before attention sees them, so that whatever comes
after (gates, append, attention, fused or not) takes its ordinary path. A decision is a pure function of
(layer, KV head, position, request): a counter-based hash against the head's merge rate. Batch, chunks and
preemption do not change it.

How the heads' rates spread: as a report measured it (`measured_cr_per_layer_head`), or, without one, the part
of the tokens that a head appends is log-normal, exp(0.6 x) with x standard normal, the same draw in every
run. Either is scaled, and cut off at 1, so that total tokens / total entries is the CR asked for.

Dimension letters: L layers, G key/value heads, T packed tokens of a step, N query heads, D head dim.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.engine.chunks import PackedChunk
from megatron_dmc.engine.context import PagedContext
from megatron_dmc.errors import DMCError
from megatron_dmc.ops.gates import DECISION_CHANNEL, IMPORTANCE_CHANNEL
from megatron_dmc.ops.tensors import to_device

SPREAD = 0.6
MARGIN = 8.0
"""How far a decision's logit is from the threshold: exact in every dtype."""
_MASK = 0xFFFFFFFF
_ELEMENTS_AT_ONCE = 1 << 20


def spread_weights(num_layers: int, num_kv_heads: int) -> Tensor:
    """The default spread over heads, up to a factor: float64 (L, G)."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_layers, num_kv_heads)
    return (SPREAD * torch.randn(shape, generator=generator, dtype=torch.float64)).exp()


def profile_weights(path: str | Path, num_layers: int, num_kv_heads: int) -> Tensor:
    """The spread that `megatron-dmc report` measured, up to a factor: float64 (L, G).

    A profile of another shape is resampled: a layer takes after the one at its relative depth, its heads
    after the quantiles of that layer's heads.

    Raises:
        DMCError: no such file, or nothing in it that `report` writes.
    """
    try:
        content = json.loads(Path(path).read_text())
        rows = content["measured_cr_per_layer_head"]
        crs = torch.tensor(rows, dtype=torch.float64)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise DMCError(
            f"--simulate-cr-profile {path}: no JSON with measured_cr_per_layer_head, which "
            f"megatron-dmc report writes ({type(e).__name__}: {e})"
        ) from e
    if crs.ndim != 2 or not crs.numel() or not (crs >= 1).all():
        raise DMCError(
            f"--simulate-cr-profile {path}: measured_cr_per_layer_head must be rows of one length with "
            "numbers of at least 1"
        )
    layers = ((torch.arange(num_layers) + 0.5) * crs.shape[0] / num_layers).long()
    weights = 1 / crs[layers]
    if crs.shape[1] != num_kv_heads:
        at = (torch.arange(num_kv_heads, dtype=torch.float64) + 0.5) / num_kv_heads
        weights = torch.quantile(weights, at, dim=1).T.contiguous()
    return weights


def _scaled(weights_LG: Tensor, mean: float) -> Tensor:
    """`min(1, s weights)` with the factor s for which it has this mean."""
    low, high = 0.0, 1 / weights_LG.min().item()
    for _ in range(100):
        middle = (low + high) / 2
        if (middle * weights_LG).clamp_max(1).mean().item() < mean:
            low = middle
        else:
            high = middle
    return (high * weights_LG).clamp_max(1)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers (held in int64) that looks random."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ (x >> shift)) * factor) & _MASK
    return x ^ (x >> 16)


@dataclass(frozen=True)
class ImposedDecisions:
    """Which tokens each head appends.

    Attributes:
        rate_LG: part of the tokens after the first that a head appends, float64, over all ranks' heads.
        cr: total tokens / total entries that this gives on average for `num_tokens` tokens.
        shared: the heads of a layer decide together (DMC-C).
    """

    rate_LG: Tensor
    cr: float
    num_tokens: int
    shared: bool = False

    @classmethod
    def of(
        cls, weights_LG: Tensor, cr: float, *, num_tokens: int, shared: bool = False
    ) -> "ImposedDecisions":
        """Decisions with this spread over heads and this CR for sequences of `num_tokens` tokens.

        Raises:
            DMCError: a CR below 1 or one that so few tokens cannot have.
        """
        if not 1 <= cr <= num_tokens:
            raise DMCError(
                f"--simulate-cr {cr:g}: use 1 to the number of tokens of a sequence ({num_tokens})"
            )
        if shared:
            weights_LG = weights_LG.mean(1, keepdim=True).expand_as(weights_LG)
        # the first token never merges
        mean = (num_tokens / cr - 1) / (num_tokens - 1) if num_tokens > 1 else 1.0
        return cls(_scaled(weights_LG, mean), cr, num_tokens, shared)

    def expected_entries(self, num_tokens: float) -> Tensor:
        """Entries of each head after so many tokens, on average: float64 (L, G)."""
        return 1 + (num_tokens - 1) * self.rate_LG

    def tolerance(self, num_sequences: int) -> float:
        """How far a run's CR may be from `cr`, relatively: five standard deviations of what the hash
        draws, at least 1 %."""
        num_draws = float(num_sequences * (self.num_tokens - 1))
        if self.shared:
            num_draws *= self.rate_LG.shape[1]
        deviation = math.sqrt((self.rate_LG * (1 - self.rate_LG)).sum().item() * num_draws)
        mean = num_sequences * self.expected_entries(self.num_tokens).sum().item()
        return max(0.01, 5 * deviation / mean)

    def thresholds(self, device: torch.device, heads: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Of some heads on a device, int64 (L, 1, G): hash below which a token is appended, and salt."""
        num_layers, num_heads = self.rate_LG.shape
        salt = torch.arange(num_layers * num_heads).view(num_layers, num_heads)
        if self.shared:
            salt = salt[:, :1].expand_as(salt)
        limit = (self.rate_LG * 2.0**32).round().long()
        return tuple(x[:, None, heads].contiguous().to(device) for x in (limit, _mix(salt + 1)))  # type: ignore[return-value]


def hashes(positions_T: Tensor, seeds_T: Tensor, salt_L1G: Tensor) -> Tensor:
    """A 32-bit number for each layer, token and head: int64 (L, T, G).

    Args:
        positions_T, seeds_T: int64, of the tokens and of their requests.
        salt_L1G: of the layers' heads.
    """
    token_T = _mix((positions_T + 0x9E3779B9 * _mix(seeds_T & _MASK)) & _MASK)
    return _mix(token_T[None, :, None] ^ salt_L1G)


class ImposingContext(PagedContext):
    """`PagedContext` for models whose decisions are imposed.

    What a step's tokens decide is computed for all layers in `begin_step`, outside of the model (and of a
    CUDA graph of it), into buffers that stay where they are; `attend` makes two copies. No host
    synchronisation.

    Args:
        decisions: for all heads of the model.
        max_num_batched_tokens: most tokens of a step.
        others: as `PagedContext`; the rule must compress.
    """

    def __init__(
        self, *, decisions: ImposedDecisions, max_num_batched_tokens: int, **others: Any
    ) -> None:
        super().__init__(**others)
        assert self.rule is not None and self.rule.may_merge, "a plain model cannot merge"
        device, num_heads = torch.device(others.get("device", "cpu")), others["num_kv_heads"]
        first = others.get("rank", 0) * num_heads
        self._limit_L1G, self._salt_L1G = decisions.thresholds(
            device, slice(first, first + num_heads)
        )
        shape = (others["num_layers"], max_num_batched_tokens, num_heads)
        # decision logits, then importance logits, as the channels hold them
        self._channels = [torch.zeros(shape, dtype=others["dtype"], device=device) for _ in "kq"]

    def begin_step(self, chunks: Sequence[PackedChunk]) -> None:
        """As `PagedContext.begin_step`; also decides about the step's tokens."""
        super().begin_step(chunks)
        rows = [
            [x for c in chunks for x in range(c.start, c.end)],
            [c.request.number for c in chunks for _ in range(c.num_tokens)],
        ]
        positions_T, seeds_T = to_device(rows, self._salt_L1G.device)
        self._decide(positions_T, seeds_T)

    def _decide(self, positions_T: Tensor, seeds_T: Tensor) -> None:
        assert self.rule is not None
        num_tokens, (num_layers, _, num_heads) = len(positions_T), self._salt_L1G.shape
        step = max(1, _ELEMENTS_AT_ONCE // (num_tokens * num_heads))
        k_logits, q_logits = self._channels
        for first in range(0, num_layers, step):
            layers = slice(first, first + step)
            drawn = hashes(positions_T, seeds_T, self._salt_L1G[layers])
            margin = torch.where(drawn < self._limit_L1G[layers], -MARGIN, MARGIN)
            k_logits[layers, :num_tokens] = margin + self.rule.alpha_offset
            # an importance logit in [-2, 2)
            spread = (_mix(drawn) & 0xFFFF) / 2.0**14 - 2.0
            q_logits[layers, :num_tokens] = spread - self.rule.alpha_offset

    def attend(
        self, layer_index: int, q_TND: Tensor, k_TGD: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """As `PagedContext.attend`. Mutates the borrowed channels of `q_TND` and `k_TGD`."""
        k_logits, q_logits = (x[layer_index, : len(k_TGD)] for x in self._channels)
        k_TGD[..., DECISION_CHANNEL] = k_logits
        grouped = q_TND.unflatten(1, (k_TGD.shape[1], -1))
        grouped[..., IMPORTANCE_CHANNEL] = q_logits[..., None]
        return super().attend(layer_index, q_TND, k_TGD, *args, **kwargs)
