"""Choice of the RoPE pair whose channel DMC borrows, and its rotation, by a sample of text.

DMC borrows the last channel, D - 1. RoPE turns it as one plane with channel D/2 - 1, and neither the order of the planes nor
a rotation within one, the same for a KV head's keys and for all queries of its group, changes an attention score. Both change
what zero-out takes away. So every pair gets in every KV head the angle that leaves the least in its second channel, and
the pair that the model misses least takes the last place. docs/method.md, section 10.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from megatron_dmc.checkpoint.convert import read_weights
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.load import build_model, full_forward, rotary_embedding
from megatron_dmc.checkpoint.rope_pairs import (
    ExchangedPair,
    RotatedLastPair,
    heads_by_pair,
    in_usual_order,
    is_qkv,
)
from megatron_dmc.checkpoint.weights import WeightSource, megatron_shapes
from megatron_dmc.config import DMCConfig
from megatron_dmc.errors import DMCError, UnsupportedConfig

WINDOWS, LENGTH = 8, 512
"""Sample that the choice is made on: windows, spread over the text, and tokens of each."""
MOST_TOKENS = 1_000_000
"""Of a dataset, the first that a caller reads for it."""
ANGLES = 360
"""Angles that are tried, in half a turn; the other half changes signs only."""
REACH = 1024
"""Positions over which the score averages how a pair turns."""
TRIED = 3
"""Pairs of the lowest scores whose loss is measured, besides the last pair."""


@dataclass
class PairMoments:
    """Moments of every RoPE pair over a sample, before RoPE: (L, G, D/2, 2, 2) and (L, G, D/2, 2), float64."""

    q_LGP22: Tensor
    """E[q q^T], over the queries of a group too."""
    k_LGP22: Tensor
    """E[k k^T]."""
    k_mean_LGP2: Tensor
    """E[k]."""


class Sample:
    """A model with windows of text, in float32 at least; the text's loss, and moments on it.

    Args:
        tokens: [num_tokens] int64, at least two.
    """

    def __init__(self, description: ModelDescription, source: WeightSource, tokens: Tensor):
        self.description = description
        dtype = torch.promote_types(torch.float32, description.dtype)
        self.model: GPTModel = build_model(description, dtype=dtype)
        state = self.model.state_dict()
        read_weights(source, {name: state[name] for name in megatron_shapes(description)})
        length = min(LENGTH, len(tokens))
        starts = torch.linspace(0, len(tokens) - length, WINDOWS).long().unique()
        self.windows = [tokens[start : start + length] for start in starts.tolist()]

    @torch.no_grad()
    def loss(self, title: str) -> float:
        """Mean cross entropy of the windows, in nats; the progress bar has the title."""
        total = 0.0
        for window in tqdm(self.windows, desc=title, unit="window", disable=None, leave=False):
            logits = full_forward(self.model, window[None])[0, :-1, : self.description.vocab_size]
            total += float(cross_entropy(logits, window[1:]))
        return total / len(self.windows)

    @torch.no_grad()
    def moments(self) -> tuple[PairMoments, float]:
        """Moments of every pair, and the loss."""
        d = self.description
        shape = (d.num_layers, d.num_query_groups, d.kv_channels // 2)
        q = torch.zeros(*shape, 2, 2, dtype=torch.float64)
        k, k_mean = torch.zeros_like(q), torch.zeros(*shape, 2, dtype=torch.float64)

        def collect(layer: int, qkv: Tensor) -> None:
            channels = qkv.double().flatten(0, 1).T.contiguous()
            heads = heads_by_pair(channels, d)
            q_GR2PX, k_G2PX = heads[:, :-2], heads[:, -2]
            q[layer] += torch.einsum("grapx,grbpx->gpab", q_GR2PX, q_GR2PX)
            k[layer] += torch.einsum("gapx,gbpx->gpab", k_G2PX, k_G2PX)
            k_mean[layer] += k_G2PX.sum(-1).mT

        hooks = [
            layer.self_attention.linear_qkv.register_forward_hook(
                lambda _module, _args, output, index=index: collect(index, output[0])
            )
            for index, layer in enumerate(self.model.decoder.layers)
        ]
        loss = self.loss("calibrating")
        for hook in hooks:
            hook.remove()
        count = sum(map(len, self.windows))
        per_group = d.num_attention_heads // d.num_query_groups
        return PairMoments(q / (count * per_group), k / count, k_mean / count), loss

    @torch.no_grad()
    def loss_after_zero_out(self, description: ModelDescription, source: WeightSource) -> float:
        """The loss with the borrowed channels zero before and after RoPE, as the zero-out stage leaves them.

        Args:
            description, source: the same model with other pairs; the sample's model becomes that one.
        """
        state = self.model.state_dict()
        qkv = filter(is_qkv, megatron_shapes(description))
        read_weights(source, {name: state[name] for name in qkv})
        self.model.rotary_pos_emb = rotary_embedding(description, "cpu")
        self.model.config.dmc = DMCConfig(stage="zero-out")
        pair = description.borrowed_rope_pair
        return self.loss("trying the last pair" if pair is None else f"trying pair {pair}")


def least_scores(moments: PairMoments, theta_P: Tensor) -> tuple[Tensor, Tensor]:
    """Score of every pair: the part of attention's scores that goes with its second channel, at each head's best angle.

    Where RoPE turns the pair, a constant key is not the same for all tokens, so its mean counts too; and compression
    drops what RoPE turns from the first channel into the second.

    Args:
        theta_P: angles between neighbouring positions, in radians.

    Returns:
        score_P, summed over layers and heads, and angle_LGP, in [0, pi): float64 each.
    """
    phi = torch.arange(ANGLES, dtype=torch.float64) * math.pi / ANGLES
    first = torch.stack([phi.cos(), phi.sin()], dim=-1)
    second = torch.stack([-phi.sin(), phi.cos()], dim=-1)

    def along(direction: Tensor, moment_LG22: Tensor) -> Tensor:
        return torch.einsum("xa,lgab,xb->lgx", direction, moment_LG22, direction)

    turns_XP = torch.arange(REACH, dtype=torch.float64)[:, None] * theta_P.double()
    varies_P = 1 - torch.polar(torch.ones_like(turns_XP), turns_XP).mean(0).abs() ** 2
    dropped_P = turns_XP.sin().square().mean(0).square()
    scores, angles = [], []
    for pair, (varies, dropped) in enumerate(zip(varies_P, dropped_P, strict=True)):
        q, k = moments.q_LGP22[:, :, pair], moments.k_LGP22[:, :, pair]
        mean = moments.k_mean_LGP2[:, :, pair]
        spread = k + (varies - 1) * mean[..., None] * mean[..., None, :]
        left_LGX = along(second, q) * along(second, spread)
        left_LGX += dropped * along(first, q) * along(first, k)
        least = left_LGX.min(-1)
        scores.append(least.values.sum())
        angles.append(phi[least.indices])
    return torch.stack(scores), torch.stack(angles, dim=-1)


def rotate_borrowed_pair(
    description: ModelDescription,
    source: WeightSource,
    *,
    tokens: Tensor,
    keep_order: bool = False,
    report: Callable[[str], object] | None = None,
) -> tuple[ModelDescription, WeightSource]:
    """The same model with the least in its borrowed channels; neither argument changes.

    Memory: the whole model, in float32 at least.

    Args:
        tokens: [num_tokens] int64 of text that resembles the training data.
        keep_order: rotate the last pair, whatever another would cost: the result is a stock model.
        report: called with a line about the pair that was chosen.

    Raises:
        UnsupportedConfig: the model has DMC, whose borrowed channels are in use, or QK-norm, whose weights
            differ between the channels.
        DMCError: less than two tokens, or tokens of a larger vocabulary.
    """
    _check(description, tokens)
    description, source = in_usual_order(description, source)
    sample = Sample(description, source, tokens)
    moments, loss = sample.moments()
    scale = description.rope_linear_factor or 1
    theta_P = rotary_embedding(description, "cpu").inv_freq / scale
    score_P, angles_LGP = least_scores(moments, theta_P)
    last = len(score_P) - 1

    def with_pair(pair: int) -> tuple[ModelDescription, WeightSource]:
        exchanged = ExchangedPair(source, description, pair)
        rotated = RotatedLastPair(exchanged, description, angles_LGP[..., pair])
        return replace(description, borrowed_rope_pair=pair), rotated

    added = {
        pair: sample.loss_after_zero_out(*with_pair(pair)) - loss
        for pair in (last, *score_P[:last].argsort()[: 0 if keep_order else TRIED].tolist())
    }
    pair = min(added, key=added.__getitem__)  # of equal ones the last pair, which comes first
    if report is not None:
        report(
            f"borrowed RoPE pair {pair} of {len(score_P)}: zeroing its channel adds {added[pair]:.3f} nats on "
            f"the sample (last pair: {added[last]:.3f})"
        )
    return with_pair(pair)


def _check(description: ModelDescription, tokens: Tensor) -> None:
    if description.dmc is not None:
        raise UnsupportedConfig(
            f"this is a DMC model (stage {description.dmc.stage}): its borrowed channels are in use; "
            "rotate the base model, then retrofit it"
        )
    if description.qk_layernorm:
        raise UnsupportedConfig(
            "the model normalises queries and keys (QK-norm), and a rotation would have to pass the "
            "norm's weights; convert it without --calibration-data"
        )
    if len(tokens) < 2:
        raise DMCError(f"{len(tokens)} tokens of calibration data; give some thousands")
    if int(tokens.max()) >= description.vocab_size:
        raise DMCError(
            f"calibration data: token {int(tokens.max())}, but the model's vocabulary has "
            f"{description.vocab_size}; tokenise the text with this model's tokenizer"
        )
