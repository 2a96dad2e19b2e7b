"""From logits to tokens, for all requests of a step together.

Dimension letters: B requests, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_dmc.engine.request import Logprob, Request
from megatron_dmc.engine.sampling_params import SamplingParams
from megatron_dmc.ops.gates import mix_seed


@dataclass
class SampledToken:
    """The next token of one request."""

    token_id: int
    logprob: float | None
    """Of the model itself: before temperature and truncation. None if not asked for."""
    logprobs: dict[int, Logprob] | None


def token_logprobs(
    logits_BV: Tensor, token_ids: Sequence[int], counts: Sequence[int]
) -> list[dict[int, Logprob]]:
    """Log-probabilities of the given tokens and of the `counts[b]` most likely ones."""
    logprobs_BV = torch.log_softmax(logits_BV.double(), dim=-1)
    chosen = torch.as_tensor(token_ids, device=logits_BV.device)[:, None]
    chosen_B1 = logprobs_BV.gather(1, chosen)
    ranks = ((logprobs_BV > chosen_B1).sum(1) + 1).tolist()
    values, ids = logprobs_BV.topk(min(max(counts), logits_BV.shape[1]), dim=-1)
    rows = []
    for b, count in enumerate(counts):
        row = {int(token_ids[b]): Logprob(float(chosen_B1[b, 0]), ranks[b])}
        top = zip(ids[b, :count].tolist(), values[b, :count].tolist(), strict=True)
        for rank, (token_id, value) in enumerate(top, start=1):
            row.setdefault(token_id, Logprob(value, rank))
        rows.append(row)
    return rows


def warp(scores_BV: Tensor, params: SamplingParams) -> Tensor:
    """Temperature and truncation: scores whose softmax is sampled from; -inf where cut off."""
    warpers: list = [TemperatureLogitsWarper(float(params.temperature))]
    if params.top_k > 0:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(float(params.top_p)))
    if params.min_p > 0:
        warpers.append(MinPLogitsWarper(float(params.min_p)))
    for warper in warpers:
        # none of them looks at the tokens so far
        scores_BV = warper(None, scores_BV)
    return scores_BV


class Sampler:
    """Each request draws from its own generator: its tokens do not depend on the batch.

    Args:
        seed: the engine's; requests without a seed of their own derive theirs from it and from
            their number.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        self._generators: dict[int, torch.Generator] = {}

    def sample(self, logits_BV: Tensor, requests: Sequence[Request]) -> list[SampledToken]:
        """One token for each request.

        Args:
            logits_BV: any floating dtype; the vocabulary without padding. Not changed.
        """
        acc = torch.float64 if logits_BV.dtype == torch.float64 else torch.float32
        logits_BV = logits_BV.to(acc)
        chosen_B = logits_BV.argmax(-1)
        groups: dict[tuple, list[int]] = defaultdict(list)
        for b, request in enumerate(requests):
            p = request.params
            if not p.greedy:
                groups[p.temperature, p.top_k, p.top_p, p.min_p].append(b)
        for members in groups.values():
            index = torch.as_tensor(members, device=logits_BV.device)
            scores = warp(logits_BV[index], requests[members[0]].params)
            mass = scores.double().softmax(-1).cumsum(-1)
            draws = torch.stack([self._draw(requests[b]) for b in members]).to(mass.device)
            picked = torch.searchsorted(mass, draws[:, None] * mass[:, -1:], right=True)
            chosen_B[index] = picked[:, 0].clamp_max(logits_BV.shape[1] - 1)
        token_ids = chosen_B.tolist()
        sampled = [SampledToken(token_id, None, None) for token_id in token_ids]
        asked = [b for b, request in enumerate(requests) if request.params.logprobs is not None]
        if asked:
            rows = token_logprobs(
                logits_BV[asked],
                [token_ids[b] for b in asked],
                [requests[b].params.logprobs or 0 for b in asked],
            )
            for b, row in zip(asked, rows, strict=True):
                sampled[b] = SampledToken(token_ids[b], row[token_ids[b]].logprob, row)
        return sampled

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self._generators.pop(request.number, None)

    def _draw(self, request: Request) -> Tensor:
        generator = self._generators.get(request.number)
        if generator is None:
            seed = request.params.seed
            generator = torch.Generator().manual_seed(
                mix_seed(self.seed, request.number) if seed is None else mix_seed(seed)
            )
            self._generators[request.number] = generator
        return torch.rand((), generator=generator, dtype=torch.float64)
