"""Merge decisions imposed on a model that has none of its own (random weights, `--simulate-cr`).

All that a step's tokens decide, in all layers, is computed in one launch, and the append kernel gets it in
place of what it reads in the borrowed channels. Where the engine computes gates outside of that kernel
(prompts, heads that decide together), it does so here too, and the outcome is replaced. A decision is a pure
function of (layer, KV head, position, request): a counter-based hash against the head's merge rate. Batch,
chunks and preemption do not change it.

How the heads' rates spread: as a report measured it (`measured_cr_per_layer_head`), or, without one, the part
of the tokens that a head appends is log-normal, exp(0.6 x) with x standard normal, the same draw in every
run. Either is scaled, and cut off at 1, so that total tokens / total entries is the CR asked for.

Dimension letters: L layers, G key/value heads, T packed tokens of a step, B those of them that are decoded,
R rows of running requests.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.engine.chunk import Chunk
from megatron_dmc.engine.context import PagedContext
from megatron_dmc.engine.request import Request
from megatron_dmc.errors import DMCError
from megatron_dmc.ops.paged.decode import Gates
from megatron_dmc.ops.tensors import accumulator_dtype, to_device

SPREAD = 0.6
EVEN_SPREAD = 0.5
_MASK = 0xFFFFFFFF
_ELEMENTS_AT_ONCE = 1 << 20


def spread_weights(num_layers: int, num_kv_heads: int) -> Tensor:
    """The default spread over heads, up to a factor: float64 (L, G)."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_layers, num_kv_heads)
    return (SPREAD * torch.randn(shape, generator=generator, dtype=torch.float64)).exp()


def even_weights(num_layers: int, num_kv_heads: int) -> Tensor:
    """A spread over heads that is even around the mean, up to a factor: float64 (L, G)."""
    heads = torch.linspace(
        1 - EVEN_SPREAD, 1 + EVEN_SPREAD, num_layers * num_kv_heads, dtype=torch.float64
    )
    return heads.view(num_layers, -1)


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
    """The tokens that each head appends.

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
        """Expected entries of each head after `num_tokens` tokens: float64 (L, G)."""
        return 1 + (num_tokens - 1) * self.rate_LG

    def tolerance(self, num_sequences: int) -> float:
        """Largest relative deviation of a run's CR from `cr`: five standard deviations of what the hash
        draws, at least 1 %."""
        num_draws = float(num_sequences * (self.num_tokens - 1))
        if self.shared:
            num_draws *= self.rate_LG.shape[1]
        deviation = math.sqrt((self.rate_LG * (1 - self.rate_LG)).sum().item() * num_draws)
        mean = num_sequences * self.expected_entries(self.num_tokens).sum().item()
        return max(0.01, 5 * deviation / mean)

    def check(self, measured_cr: float, num_sequences: int, *, more: float = 0.0) -> None:
        """Check that the engine followed the decisions.

        Args:
            more: relative deviation that is allowed besides `tolerance`.

        Raises:
            DMCError: it did not.
        """
        allowed = self.tolerance(num_sequences) + more
        if abs(measured_cr / self.cr - 1) > allowed:
            raise DMCError(
                f"CR {measured_cr:.3f} was measured where {self.cr:g} was imposed, more than "
                f"{100 * allowed:.1f} % off: the engine did not follow the imposed decisions"
            )

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


def decide(
    positions_T: Tensor,
    rows_T: Tensor,
    seeds_R: Tensor,
    limit_L1G: Tensor,
    salt_L1G: Tensor,
    is_merge_LTG: Tensor,
    omega_LTG: Tensor,
    eps: float,
) -> None:
    """Decide the tokens of a step in all layers. Mutates `is_merge_LTG` and `omega_LTG`.

    Args:
        positions_T, rows_T: int64; row -1 is padding, about which anything is decided.
        seeds_R: int64, of the rows' requests.
        limit_L1G, salt_L1G: `ImposedDecisions.thresholds`.
        is_merge_LTG, omega_LTG: bool and floating, views of any stride between layers.
        eps: added to importances, as `ops.gates.importance` does.
    """
    num_tokens, (num_layers, _, num_heads) = len(positions_T), salt_L1G.shape
    seeds_T = seeds_R[rows_T.clamp_min(0)]
    step = max(1, _ELEMENTS_AT_ONCE // (num_tokens * num_heads))
    for first in range(0, num_layers, step):
        layers = slice(first, first + step)
        drawn = hashes(positions_T, seeds_T, salt_L1G[layers])
        is_merge_LTG[layers] = drawn >= limit_L1G[layers]
        # an importance logit in [-2, 2)
        logits = (_mix(drawn) & 0xFFFF).to(omega_LTG.dtype) / 2.0**14 - 2.0
        omega_LTG[layers] = torch.sigmoid(logits) + eps


class ImposingContext(PagedContext):
    """`PagedContext` for models whose decisions are imposed.

    Decoded tokens are decided about within the model's run (and its CUDA graph), before the first layer;
    prompts' tokens in `begin_step`. No host synchronisation.

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
        self.store.impose = self._impose
        device, num_heads = torch.device(others.get("device", "cpu")), others["num_kv_heads"]
        first = others.get("rank", 0) * num_heads
        self._thresholds = decisions.thresholds(device, slice(first, first + num_heads))
        # a captured step of few requests is padded
        most = max(max_num_batched_tokens, others["max_num_seqs"])
        shape = (others["num_layers"], most, num_heads)
        dtype = others["dtype"]
        self._eps = torch.finfo(dtype).eps
        self._is_merge_LTG = torch.zeros(shape, dtype=torch.bool, device=device)
        self._omega_LTG = torch.ones(shape, dtype=accumulator_dtype(dtype), device=device)
        self._seeds_R = torch.zeros(others["max_num_seqs"], dtype=torch.int64, device=device)
        self._decide_on_device = decide
        if device.type == "cuda" and find_spec("triton"):
            from megatron_dmc.engine import imposed_kernel

            self._decide_on_device = imposed_kernel.decide

    def start(self, request: Request, *, use_prefix: bool = False) -> None:
        """As `PagedContext.start`."""
        super().start(request, use_prefix=use_prefix)
        self._seeds_R[request.row] = request.number

    def begin_step(self, chunks: Sequence[Chunk]) -> None:
        """As `PagedContext.begin_step`; also decides about the prompts' tokens."""
        super().begin_step(chunks)
        prompts = [c for c in chunks if c.num_tokens > 1]
        if prompts:
            positions_T, rows_T = to_device(
                [
                    [x for c in prompts for x in range(c.start, c.end)],
                    [c.row for c in prompts for _ in range(c.num_tokens)],
                ],
                self._seeds_R.device,
            )
            self._decide(len(chunks) - len(prompts), positions_T, rows_T)

    def set_decode(self, rows_B: Tensor, positions_B: Tensor) -> None:
        """As `PagedContext.set_decode`; also decides about these tokens."""
        super().set_decode(rows_B, positions_B)
        if len(rows_B):
            self._decide(0, positions_B, rows_B)

    def _decide(self, first: int, positions_T: Tensor, rows_T: Tensor) -> None:
        tokens = slice(first, first + len(positions_T))
        self._decide_on_device(
            positions_T, rows_T, self._seeds_R, *self._thresholds,
            self._is_merge_LTG[:, tokens], self._omega_LTG[:, tokens], self._eps,
        )  # fmt: skip

    def _impose(self, layer_index: int, first: int, count: int) -> Gates:
        tokens = slice(first, first + count)
        return self._is_merge_LTG[layer_index, tokens], self._omega_LTG[layer_index, tokens]
