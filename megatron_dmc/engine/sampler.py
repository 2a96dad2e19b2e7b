"""From logits to tokens, for all requests of a step together.

Dimension letters: B requests, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_dmc.cache import AsyncCopy
from megatron_dmc.engine.counter_rng import uniforms
from megatron_dmc.engine.isolation import ends_engine, own_work
from megatron_dmc.engine.logit_rules import LogitRules
from megatron_dmc.engine.request import Logprob, Request
from megatron_dmc.engine.sampling_params import SamplingParams
from megatron_dmc.errors import RequestFailed
from megatron_dmc.ops.gates import mix_seed
from megatron_dmc.ops.tensors import accumulator_dtype, take_rows, to_device

_NO_TOKEN = -1
"""On the device, in place of a token: the row has no distribution to choose from."""
_FEW = 1024
"""Up to this top-k the likely tokens are selected instead of sorting the vocabulary."""


@dataclass(slots=True)
class SampledToken:
    """The next token of one request."""

    token_id: int
    logprob: float | None
    """Of the model itself: before biases, penalties, temperature and truncation. None if not asked for."""
    logprobs: dict[int, Logprob] | None


def _not_finite(request: Request) -> RequestFailed:
    return RequestFailed(
        f"request {request.request_id}: the model's logits after {request.num_known_tokens} tokens are not "
        "finite (NaN or infinity); a larger dtype may help"
    )


def token_logprobs(
    logits_BV: Tensor, token_ids: Sequence[int], counts: Sequence[int]
) -> Callable[[], list[dict[int, Logprob]]]:
    """Start to copy the log-probabilities of the given tokens and of the `counts[b]` most likely ones.

    Returns:
        a function that waits for them.
    """
    ids_B = to_device(token_ids, logits_BV.device)
    late = AsyncCopy(_likeliest(logits_BV, ids_B, max(counts)))
    return lambda: _rows_of_logprobs(token_ids, counts, *late.read())


def _likeliest(logits_BV: Tensor, token_ids_B: Tensor, most: int) -> tuple[Tensor, ...]:
    """On the device: the given tokens' log-probabilities and ranks (B,), and log-probabilities and ids of
    the `most` likely tokens, (B, most)."""
    logprobs_BV = torch.log_softmax(logits_BV.double(), dim=-1)
    chosen_B1 = logprobs_BV.gather(1, token_ids_B[:, None])
    ranks_B = (logprobs_BV > chosen_B1).sum(1) + 1
    return chosen_B1[:, 0], ranks_B, *logprobs_BV.topk(min(most, logits_BV.shape[1]), dim=-1)


def _rows_of_logprobs(
    token_ids: Sequence[int],
    counts: Sequence[int],
    chosen_B: np.ndarray,
    ranks_B: np.ndarray,
    values_BK: np.ndarray,
    ids_BK: np.ndarray,
) -> list[dict[int, Logprob]]:
    """Results of `_likeliest` in the form that requests get."""
    rows = []
    for b, count in enumerate(counts):
        row = {int(token_ids[b]): Logprob(float(chosen_B[b]), int(ranks_B[b]))}
        top = zip(ids_BK[b, :count].tolist(), values_BK[b, :count].tolist(), strict=True)
        for rank, (token_id, value) in enumerate(top, start=1):
            row.setdefault(token_id, Logprob(value, rank))
        rows.append(row)
    return rows


def _by_width(params: Sequence[SamplingParams], vocab_size: int) -> Iterator[tuple[int, list[int]]]:
    """Requests whose unlikely tokens are cut off, those of a small top-k apart: the number of tokens to put
    in order for them, and which they are."""
    cut = [b for b, p in enumerate(params) if p.top_k > 0 or p.top_p < 1 or p.min_p > 0]
    few = [b for b in cut if 0 < params[b].top_k <= _FEW]
    if few:
        yield min(max(params[b].top_k for b in few), vocab_size), few
    if len(few) < len(cut):
        yield vocab_size, [b for b in cut if b not in set(few)]


def truncate(
    scores_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor, *, most: int
) -> Tensor:
    """Cut off the unlikely tokens: top-k, of what is left top-p, of that min-p, as transformers' warpers
    do one after the other. A token that is as likely as the last one kept stays.

    Only the `most` likely tokens are put in order; what others are as likely as the k-th adds to the mass.

    Args:
        scores_BV: after temperature.
        top_k_B: int64; 0 or less: no limit.
        top_p_B: in (0, 1].
        min_p_B: in [0, 1], relative to the most likely token.
        most: at least each row's limit; the vocabulary's size where a row has none.

    Returns:
        scores with -inf where cut off; at least one is left.
    """
    lowest = float("-inf")
    k_B = torch.where(top_k_B > 0, top_k_B, most).clamp(max=most)
    top_BK = scores_BV.topk(most, -1).values
    last_B1 = top_BK.gather(1, k_B[:, None] - 1)
    is_cut_BK = top_BK < last_B1
    mass_BK = (top_BK - top_BK[:, :1]).exp().masked_fill(is_cut_BK, 0)
    num_more_B1 = (scores_BV >= last_B1).sum(-1, keepdim=True) - (~is_cut_BK).sum(-1, keepdim=True)
    more_B1 = num_more_B1 * (last_B1 - top_BK[:, :1]).exp()
    # a token goes if it and all that are less likely come to no more than 1 - top_p
    tail_BK = mass_BK.flip(-1).cumsum(-1).flip(-1) + more_B1
    is_cut_BK |= tail_BK <= (1 - top_p_B[:, None]) * tail_BK[:, :1]
    is_cut_BK |= mass_BK < min_p_B[:, None]
    is_cut_BK[:, 0] = False
    threshold_B1 = top_BK.masked_fill(is_cut_BK, float("inf")).amin(-1, keepdim=True)
    return scores_BV.masked_fill(scores_BV < threshold_B1, lowest)


class Sampling:
    """Sampled tokens on their way to the host.

    Attributes:
        requests: whose tokens they are.
    """

    def __init__(self, requests: Sequence[Request], chosen_B: Tensor, logits_BV: Tensor):
        """Start to copy them, with the log-probabilities that are asked for.

        Args:
            chosen_B: token ids, or `_NO_TOKEN`.
            logits_BV: the model's.
        """
        self.requests = list(requests)
        self._chosen_B = chosen_B
        self._asked = [b for b, r in enumerate(requests) if r.params.logprobs is not None]
        self._counts = [requests[b].params.logprobs or 0 for b in self._asked]
        late = [chosen_B]
        if self._asked:
            late += _likeliest(
                take_rows(logits_BV, self._asked), take_rows(self.token_ids_B, self._asked),
                max(self._counts),
            )  # fmt: skip
        self._late = AsyncCopy(late)

    @functools.cached_property
    def token_ids_B(self) -> Tensor:
        """The tokens on the device, int64; 0 for a request that has none."""
        return self._chosen_B.clamp(min=0)

    def read(self) -> list[SampledToken | RequestFailed]:
        """One token for each request; an error for one whose logits have NaN or +inf, or nothing above -inf.
        The host's one wait of a step."""
        token_ids_B, *found = self._late.read()
        token_ids = token_ids_B.tolist()
        sampled: list[SampledToken | RequestFailed] = [
            SampledToken(token_id, None, None) if token_id != _NO_TOKEN else _not_finite(request)
            for token_id, request in zip(token_ids, self.requests, strict=True)
        ]
        for i, b in enumerate(self._asked):
            if token_ids[b] != _NO_TOKEN:
                sampled[b] = self._with_logprobs(b, token_ids[b], i, found)
        return sampled

    def _with_logprobs(
        self, b: int, token_id: int, i: int, found: list[np.ndarray]
    ) -> SampledToken | RequestFailed:
        own = [x[i : i + 1] for x in found]
        try:
            with own_work(self.requests[b].request_id):
                (row,) = _rows_of_logprobs([token_id], [self._counts[i]], *own)
        except RequestFailed as error:
            return error
        return SampledToken(token_id, row[token_id].logprob, row)


class Sampler:
    """A request's numbers depend on its seed and on the position in its completion: its tokens do not
    depend on the batch, nor on a preemption.

    Args:
        seed: the engine's; requests without a seed of their own derive theirs from it and from
            their number.
        eos_ids: end-of-text tokens, for `min_tokens`.
    """

    def __init__(self, seed: int = 0, eos_ids: Collection[int] = ()):
        self.seed = seed
        self._rules = LogitRules(eos_ids)

    def sample(self, logits_BV: Tensor, requests: Sequence[Request]) -> Sampling:
        """One token for each request. Waits for nothing.

        Args:
            logits_BV: any floating dtype; the vocabulary without padding. Not changed.
        """
        logits_BV = logits_BV.to(accumulator_dtype(logits_BV.dtype))
        scores_BV = self._rules.apply(logits_BV, requests)
        most_B, chosen_B = scores_BV.max(-1)
        drawn = [b for b, request in enumerate(requests) if not request.params.greedy]
        if drawn:
            index = to_device(drawn, logits_BV.device)
            chosen_B[index] = self._draw(scores_BV[index], [requests[b] for b in drawn])
        # NaN is the largest of a row that has one, and not below infinity
        chosen_B = chosen_B.masked_fill(~(most_B.abs() < math.inf), _NO_TOKEN)
        sampling = Sampling(requests, chosen_B, logits_BV)
        if self._rules.counts(requests):
            self._rules.count(sampling.token_ids_B, requests)
        return sampling

    def sample_all(
        self, logits_BV: Tensor, requests: list[Request]
    ) -> list[Sampling | RequestFailed]:
        """Sample for all requests together. If that raises, sample for each alone, to find the one at fault;
        a row's token does not depend on the others."""
        try:
            return [self.sample(logits_BV, requests)]
        except BaseException as error:
            if ends_engine(error):
                raise
        sampled: list[Sampling | RequestFailed] = []
        for b, request in enumerate(requests):
            try:
                with own_work(request.request_id):
                    sampled.append(self.sample(logits_BV[b : b + 1], [request]))
            except RequestFailed as error:
                sampled.append(error)
        return sampled

    def forget(self, request: Request) -> None:
        """The request has ended."""
        self._rules.forget(request)

    def _draw(self, scores_BV: Tensor, requests: Sequence[Request]) -> Tensor:
        """Token ids by inverse transform sampling, all rows at once."""
        device, params = scores_BV.device, [request.params for request in requests]
        numbers_B2 = to_device([[self._seed_of(r), r.num_output_tokens] for r in requests], device)
        values_B4 = to_device(
            [[p.temperature, p.top_k, p.top_p, p.min_p] for p in params],
            device, dtype=torch.float64,
        )  # fmt: skip
        temperature_B, top_k_B, top_p_B, min_p_B = values_B4.to(scores_BV.dtype).unbind(1)
        scores_BV = scores_BV / temperature_B[:, None]
        for most, cut in _by_width(params, scores_BV.shape[1]):
            index = to_device(cut, device)
            top_k_B = values_B4[:, 1].long()
            scores_BV[index] = truncate(
                scores_BV[index], top_k_B[index], top_p_B[index], min_p_B[index], most=most
            )
        mass_BV = scores_BV.double().softmax(-1).cumsum(-1)
        total_B1 = mass_BV[:, -1:]
        wanted_B1 = uniforms(*numbers_B2.unbind(1))[:, None] * total_B1
        # below the total: a token of no mass at the end is never chosen
        wanted_B1 = torch.minimum(wanted_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
        chosen_B1 = torch.searchsorted(mass_BV, wanted_B1, right=True)
        return chosen_B1.masked_fill(~total_B1.isfinite(), _NO_TOKEN)[:, 0]

    def _seed_of(self, request: Request) -> int:
        seed = request.params.seed
        return mix_seed(self.seed, request.number) if seed is None else mix_seed(seed)
