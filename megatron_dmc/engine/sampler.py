"""From logits to tokens, for all requests of a step together.

Dimension letters: B requests, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
from megatron_dmc.ops.backends import TRUNCATE
from megatron_dmc.ops.gates import mix_seed
from megatron_dmc.ops.tensors import accumulator_dtype, take_rows, to_device
from megatron_dmc.ops.truncate import truncate

_NO_TOKEN = -1
"""On the device, in place of a token: the row has no distribution to choose from."""
_FEW = 1024
"""Up to this top-k the likely tokens are selected instead of sorting the vocabulary."""


@dataclass(slots=True)
class SampledToken:
    """The next token of a request that asks for log-probabilities."""

    token_id: int
    logprob: float
    """Of the model itself: before biases, penalties, temperature and truncation."""
    logprobs: dict[int, Logprob]


type Sampled = int | SampledToken | RequestFailed
"""The next token of a request, its id alone where no log-probabilities are asked for, or the failure."""


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


def _by_widths(
    params: Sequence[SamplingParams], vocab_size: int, *, in_order: bool, may_wait: bool
) -> Iterator[tuple[list[int], list[int]]]:
    """Requests whose unlikely tokens are cut off, those of a small top-k apart: numbers of tokens to put in order for
    them, the next one where the one before did not suffice, and which requests they are.

    Args:
        in_order: False: a kernel cuts them off, which puts none in order; all are one group.
        may_wait: whether the host may ask if they did; on a GPU it would wait.
    """
    cut = [b for b, p in enumerate(params) if p.top_k > 0 or p.top_p < 1 or p.min_p > 0]
    if not in_order:
        if cut:
            yield [], cut
        return
    few = [b for b in cut if 0 < params[b].top_k <= _FEW]
    if few:
        yield [min(max(params[b].top_k for b in few), vocab_size)], few
    if len(few) < len(cut):
        widths = [_FEW, vocab_size] if may_wait and vocab_size > _FEW else [vocab_size]
        yield widths, [b for b in cut if b not in set(few)]


def truncate_in_order(scores_BV: Tensor, draws: "_Draws") -> None:
    """`truncate` in place, of the rows that ask for it: by a kernel, or with as few tokens in order as suffice."""
    if draws.kernels is not None:
        for _, index in draws.by_widths:
            draws.kernels.truncate(
                scores_BV, index, draws.top_k_B[index], draws.top_p_B[index], draws.min_p_B[index]
            )
        return
    for widths, index in draws.by_widths:
        for most in widths:
            kept_BV, is_done_B = truncate(
                scores_BV[index], draws.top_k_B[index], draws.top_p_B[index], draws.min_p_B[index],
                most=most,
            )  # fmt: skip
            if most == widths[-1]:
                scores_BV[index] = kept_BV
            else:
                scores_BV[index[is_done_B]] = kept_BV[is_done_B]
                index = index[~is_done_B]
            if not len(index):
                break


class Sampling:
    """Sampled tokens on their way to the host.

    Attributes:
        requests: whose tokens they are.
    """

    def __init__(self, plan: "_Plan", chosen_B: Tensor, logits_BV: Tensor):
        """Start to copy them, with the log-probabilities that are asked for.

        Args:
            chosen_B: token ids, or `_NO_TOKEN`.
            logits_BV: the model's.
        """
        self.requests, self._asked, self._counts = plan.requests, plan.asked, plan.counts
        self._chosen_B = chosen_B
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

    def read(self) -> list[Sampled]:
        """One token for each request; an error for one whose logits have NaN or +inf, or nothing above -inf.
        The host's one wait of a step."""
        token_ids_B, *found = self._late.read()
        token_ids = token_ids_B.tolist()
        sampled: list[Sampled] = list(token_ids)
        for b in np.flatnonzero(token_ids_B == _NO_TOKEN).tolist():
            sampled[b] = _not_finite(self.requests[b])
        for i, b in enumerate(self._asked):
            if token_ids[b] != _NO_TOKEN:
                sampled[b] = self._with_logprobs(b, token_ids[b], i, found)
        return sampled

    def _with_logprobs(self, b: int, token_id: int, i: int, found: list[np.ndarray]) -> Sampled:
        own = [x[i : i + 1] for x in found]
        try:
            with own_work(self.requests[b].request_id):
                (row,) = _rows_of_logprobs([token_id], [self._counts[i]], *own)
        except RequestFailed as error:
            return error
        return SampledToken(token_id, row[token_id].logprob, row)


@dataclass
class _Draws:
    """Requests whose tokens are drawn.

    Attributes:
        rows_B: rows of the logits, int64, on the device.
        temperature_B, top_k_B, top_p_B, min_p_B: on the device.
        by_widths: see `_by_widths`, with the requests' places on the device.
        kernels: what cuts off their unlikely tokens; None: `truncate`.
    """

    requests: list[Request]
    seeds: list[int]
    rows_B: Tensor
    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor
    min_p_B: Tensor
    by_widths: list[tuple[list[int], Tensor]]
    kernels: Any


class _Plan:
    """The parameters of a step's requests; those of the next step of the same requests too.

    Attributes:
        asked, counts: rows that want log-probabilities, and of how many tokens.
        drawn: rows that are not greedy.
        draws: how their tokens are drawn.
        has_rules, has_penalties: whether a row has some.
    """

    def __init__(self, requests: Sequence[Request]):
        self.requests = requests
        params = [request.params for request in requests]
        self.asked = [b for b, p in enumerate(params) if p.logprobs is not None]
        self.counts = [params[b].logprobs or 0 for b in self.asked]
        self.drawn = [b for b, p in enumerate(params) if not p.greedy]
        self.draws: _Draws | None = None
        self.has_rules = any(p.has_logit_rules for p in params)
        self.has_penalties = any(p.has_penalties for p in params)


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
        self._plan = _Plan([])

    def sample(self, logits_BV: Tensor, requests: Sequence[Request]) -> Sampling:
        """One token for each request. Waits for nothing.

        Args:
            logits_BV: any floating dtype; the vocabulary without padding. Not changed.
            requests: the same list as in the last call, if they are the same: then it is not read again.
        """
        if self._plan.requests is not requests:
            self._plan = _Plan(requests)
        plan = self._plan
        logits_BV = logits_BV.to(accumulator_dtype(logits_BV.dtype))
        scores_BV = self._rules.apply(logits_BV, requests) if plan.has_rules else logits_BV
        most_B, chosen_B = scores_BV.max(-1)
        if plan.drawn:
            if plan.draws is None:
                plan.draws = self._draws([requests[b] for b in plan.drawn], plan.drawn, scores_BV)
            rows_B = plan.draws.rows_B
            chosen_B[rows_B] = self._draw(scores_BV[rows_B], plan.draws)
        # NaN is the largest of a row that has one, and not below infinity
        chosen_B = chosen_B.masked_fill(~(most_B.abs() < math.inf), _NO_TOKEN)
        sampling = Sampling(plan, chosen_B, logits_BV)
        if plan.has_penalties:
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

    def _draws(self, requests: list[Request], rows: list[int], scores_BV: Tensor) -> _Draws:
        device, params = scores_BV.device, [request.params for request in requests]
        values_B4 = to_device(
            [[p.temperature, p.top_k, p.top_p, p.min_p] for p in params],
            device, dtype=torch.float64,
        )  # fmt: skip
        temperature_B, top_k_B, top_p_B, min_p_B = values_B4.unbind(1)
        kernels = TRUNCATE.kernels(TRUNCATE.choose(scores_BV))
        groups = _by_widths(
            params, scores_BV.shape[1], in_order=kernels is None, may_wait=device.type == "cpu"
        )
        return _Draws(
            requests, [self._seed_of(request) for request in requests], to_device(rows, device),
            temperature_B.to(scores_BV.dtype), top_k_B.long(), top_p_B, min_p_B,
            [(widths, to_device(of, device)) for widths, of in groups], kernels,
        )  # fmt: skip

    def _draw(self, scores_BV: Tensor, draws: _Draws) -> Tensor:
        """Token ids by inverse transform sampling, all rows at once."""
        positions = [request.num_output_tokens for request in draws.requests]
        numbers_2B = to_device([draws.seeds, positions], scores_BV.device)
        scores_BV = scores_BV / draws.temperature_B[:, None]
        truncate_in_order(scores_BV, draws)
        mass_BV = scores_BV.double().softmax(-1).cumsum(-1)
        total_B1 = mass_BV[:, -1:]
        wanted_B1 = uniforms(*numbers_2B.unbind(0))[:, None] * total_B1
        # below the total: a token of no mass at the end is never chosen
        wanted_B1 = torch.minimum(wanted_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
        chosen_B1 = torch.searchsorted(mass_BV, wanted_B1, right=True)
        return chosen_B1.masked_fill(~total_B1.isfinite(), _NO_TOKEN)[:, 0]

    def _seed_of(self, request: Request) -> int:
        seed = request.params.seed
        return mix_seed(self.seed, request.number) if seed is None else mix_seed(seed)
