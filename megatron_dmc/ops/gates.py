"""Gates: the decision (append or merge) and the importance of every token. docs/method.md, section 1.

These few elementwise functions are the only place where a gate is computed: training, evaluation
and the engine call the same ones, so that the same logit gives the same decision everywhere.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BORROWED_CHANNEL = -1
"""The component of each query and key head that holds a gate's logit instead of content. It is one
component of both: training attention carries its bias in the product of the two."""
DECISION_CHANNEL = BORROWED_CHANNEL
"""Component of the unrotated key that holds the decision logit."""
IMPORTANCE_CHANNEL = BORROWED_CHANNEL
"""Component of the unrotated query that holds the importance logit."""

_MASK64 = (1 << 64) - 1


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def borrowed(x: Tensor) -> Tensor:
    """A view of the borrowed channel of queries or keys (..., D)."""
    return x[..., BORROWED_CHANNEL]


def zero_borrowed_channel(x: Tensor) -> Tensor:
    """A copy of queries or keys (..., D) whose borrowed channel is 0."""
    channel = BORROWED_CHANNEL % x.shape[-1]
    zero = torch.zeros_like(x[..., :1])
    return torch.cat([x[..., :channel], zero, x[..., channel + 1 :]], dim=-1)


def scale_borrowed_channel(x: Tensor, factor: float) -> Tensor:
    """Queries or keys (..., D) whose borrowed channel is multiplied by `factor`. Differentiable."""
    scale = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    scale[BORROWED_CHANNEL] = factor
    return x * scale


def content_channels(x: Tensor) -> Tensor:
    """The other D - 1 channels of queries or keys (..., D): a view where they are contiguous."""
    channel = BORROWED_CHANNEL % x.shape[-1]
    if channel == x.shape[-1] - 1:
        return x[..., :channel]
    return torch.cat([x[..., :channel], x[..., channel + 1 :]], dim=-1)


def exchange_borrowed_pair(x: Tensor, pair: int | None) -> Tensor:
    """A copy of (..., D / 2), one value of each RoPE pair, in which those of `pair` and of the last pair, which
    holds the borrowed channel, are exchanged. Its own inverse. None: `x` itself."""
    if pair is None:
        return x
    order = torch.arange(x.shape[-1], device=x.device)
    order[pair], order[-1] = x.shape[-1] - 1, pair
    return x[..., order]


def decision_logit(k_TBGD: Tensor, *, alpha_offset: float) -> Tensor:
    """`alpha_logit_t = k_t[d] - alpha_offset`.

    Args:
        k_TBGD: unrotated keys (after QK-norm where the model has one), any floating dtype.
        alpha_offset: positive; a freshly zeroed channel then means "append".

    Returns:
        alpha_logit_TBG, float32 (float64 for float64 keys).
    """
    return _at_least_float32(k_TBGD[..., DECISION_CHANNEL]) - alpha_offset


def share_decisions(
    alpha_logit_TBG: Tensor,
    num_kv_heads_total: int,
    reduce: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """DMC-C: every head of a layer decides by the mean of their logits.

    Args:
        alpha_logit_TBG: logits of this rank's heads (or with any leading dimensions before G).
        num_kv_heads_total: KV heads of the layer over all tensor-parallel ranks.
        reduce: differentiable sum over these ranks.

    Returns:
        the shared logit, in the shape of `alpha_logit_TBG`.
    """
    total = reduce(alpha_logit_TBG.sum(-1, keepdim=True))
    return (total / num_kv_heads_total).expand_as(alpha_logit_TBG)


def importance(q_TBND: Tensor, num_kv_heads: int, *, alpha_offset: float) -> Tensor:
    """`omega_t = sigmoid(mean over the group of q_t[d] + alpha_offset) + eps`.

    Args:
        q_TBND: unrotated queries; the N heads are ordered by group.
        num_kv_heads: G; N must be a multiple of it.
        alpha_offset: see `decision_logit`.

    Returns:
        omega_TBG, float32 (float64 for float64 queries), in (0, 1].
    """
    logit = _at_least_float32(q_TBND[..., IMPORTANCE_CHANNEL])
    logit = logit.unflatten(-1, (num_kv_heads, -1)).mean(-1)
    return torch.sigmoid(logit + alpha_offset) + torch.finfo(q_TBND.dtype).eps


def hard_decisions(alpha_logit: Tensor) -> Tensor:
    """`is_merge = alpha_logit > 0`, compared in float32. Bool, the shape of `alpha_logit`."""
    return alpha_logit.float() > 0


def decide(
    q_TND: Tensor,
    k_TGD: Tensor,
    *,
    alpha_offset: float,
    share: Callable[[Tensor], Tensor] | None = None,
    may_merge: bool = True,
) -> tuple[Tensor, Tensor]:
    """Inference's gates: every token's hard decision and importance.

    A sequence's first token has nothing to merge into; the ops on the cache ignore its decision.

    Args:
        q_TND, k_TGD: unrotated (after QK-norm where the model has one), with any leading dimensions.
        alpha_offset: see `decision_logit`.
        share: `share_decisions` of the layer, for DMC-C; None: each head decides by itself.
        may_merge: False: every token is appended.

    Returns:
        is_merge_TG, bool; omega_TG as `importance` returns it.
    """
    logit_TG = decision_logit(k_TGD, alpha_offset=alpha_offset)
    is_merge_TG = hard_decisions(logit_TG if share is None else share(logit_TG)) & may_merge
    return is_merge_TG, importance(q_TND, k_TGD.shape[-2], alpha_offset=alpha_offset)


def mix_seed(*parts: int) -> int:
    """Hash whole numbers into one 63-bit seed (splitmix64 finaliser per part)."""
    state = 0
    for part in parts:
        state = (state + (part & _MASK64) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state >> 1


def logistic_noise(
    num_tokens: int,
    num_kv_heads_total: int,
    *,
    seed: int,
    step: int,
    samples: Sequence[int],
    layer: int,
    heads: slice = slice(None),
    device: torch.device | str = "cpu",
) -> Tensor:
    """The difference of two Gumbel(0, 1) draws for every token and head of a layer.

    A sequence's noise depends on (seed, step, sample, layer, global head, position) alone: it is
    drawn for all heads of the layer and sliced, so it is the same for every tensor, pipeline and
    data-parallel layout and micro-batch size, and under activation recompute.

    Args:
        num_tokens: T.
        num_kv_heads_total: key/value heads of the layer over all tensor-parallel ranks.
        seed: the run's seed.
        step: training step.
        samples: index of each of the B sequences within the step's global batch.
        layer: global layer index.
        heads: which of the heads this rank holds.
        device: where the noise is drawn; a CPU's and a GPU's generators differ.

    Returns:
        noise_TBG, float32, logistic(0, 1).
    """
    generator = torch.Generator(device=device)
    rows = []
    for sample in samples:
        generator.manual_seed(mix_seed(seed, step, int(sample), layer))
        uniform = torch.rand(
            num_tokens, num_kv_heads_total, generator=generator, device=device, dtype=torch.float32
        )
        rows.append(uniform[:, heads])
    return logistic(torch.stack(rows, dim=1))


def logistic(uniform: Tensor) -> Tensor:
    """Logistic(0, 1) noise, the difference of two Gumbel(0, 1) draws, from uniform float32 in [0, 1)."""
    eps = torch.finfo(torch.float32).tiny
    return torch.log(uniform.clamp_min(eps)) - torch.log1p(-uniform.clamp_max(1 - 2**-24))


def first_token_mask(
    alpha_logit_TBG: Tensor, starts_TB: Tensor | None = None, *, continues: bool = False
) -> Tensor:
    """Bool (T, B or 1, 1), true where a merge is impossible because nothing stands before the token.

    Args:
        starts_TB: bool, true at the first token of every document of a packed sequence; None: a
            sequence is one document.
        continues: the tokens continue a cached sequence; False: the first token is a document's first.
    """
    if starts_TB is None:
        mask = torch.zeros(alpha_logit_TBG.shape[0], 1, 1, dtype=torch.bool)
    else:
        mask = starts_TB[..., None].clone()
    if not continues:
        mask[:1] = True
    return mask.to(alpha_logit_TBG.device)


def soft_gate(
    alpha_logit_TBG: Tensor,
    noise_TBG: Tensor | None,
    *,
    temperature: float,
    starts_TB: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Training's gate: relaxed decision, its log-complement, and its straight-through decision.

    Args:
        alpha_logit_TBG: float32 or float64.
        noise_TBG: `logistic_noise`, or None for none.
        temperature: tau, positive.
        starts_TB: see `first_token_mask`.

    Returns:
        alpha_TBG: `sigmoid((alpha_logit + noise) / tau)`; 0 for the first token.
        log_keep_TBG: `log(1 - alpha)`, computed as a log-sigmoid; 0 for the first token.
        alpha_hat_TBG: hard decision of the noisy gate with the gradient of `alpha`
            (straight-through); 0 for the first token.
    """
    noisy = alpha_logit_TBG if noise_TBG is None else alpha_logit_TBG + noise_TBG
    first = first_token_mask(alpha_logit_TBG, starts_TB)
    scaled = noisy / temperature
    alpha = torch.sigmoid(scaled).masked_fill(first, 0.0)
    log_keep = F.logsigmoid(-scaled).masked_fill(first, 0.0)
    hard = (hard_decisions(noisy) & ~first).to(alpha.dtype)
    return alpha, log_keep, hard + (alpha - alpha.detach())


def hard_gate(
    alpha_logit_TBG: Tensor, *, starts_TB: Tensor | None = None, continues: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluation's gate in the form of `soft_gate`: alpha is 0 or 1, log_keep 0 or -inf.

    Args:
        starts_TB, continues: see `first_token_mask`.
    """
    first = first_token_mask(alpha_logit_TBG, starts_TB, continues=continues)
    is_merge = hard_decisions(alpha_logit_TBG) & ~first
    alpha = is_merge.to(alpha_logit_TBG.dtype)
    log_keep = torch.zeros_like(alpha).masked_fill(is_merge, float("-inf"))
    return alpha, log_keep, alpha


def borrowed_rows(*, num_kv_heads: int, queries_per_group: int, head_dim: int) -> Tensor:
    """Rows of a fused QKV projection that feed the borrowed channels, int64.

    docs/method.md, section 7: the rows are interleaved per group as [query heads of the group, k, v].

    Args:
        num_kv_heads: G held by this rank.
    """
    rows = torch.arange(num_kv_heads * (queries_per_group + 2) * head_dim)
    heads = rows.view(num_kv_heads, queries_per_group + 2, head_dim)
    return borrowed(heads[:, :-1]).flatten()


@torch.no_grad()
def zero_channel_rows(
    weight: Tensor, *, num_kv_heads: int, queries_per_group: int, head_dim: int
) -> None:
    """Zero the `borrowed_rows` of a fused QKV projection or its bias.

    Args:
        weight: (G * (queries_per_group + 2) * D, ...), mutated.
    """
    rows = borrowed_rows(
        num_kv_heads=num_kv_heads, queries_per_group=queries_per_group, head_dim=head_dim
    )
    weight[rows.to(weight.device)] = 0
