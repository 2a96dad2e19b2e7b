"""Rules of requests beyond temperature and truncation: biases, penalties, forbidden tokens.

In vLLM's order and with its meanings. A row depends on its own request only.

Dimension letters: B requests (rows), V vocabulary.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.engine.request import Request
from megatron_dmc.engine.sampling_params import SamplingParams
from megatron_dmc.errors import InvalidRequest
from megatron_dmc.ops.tensors import to_device


@dataclass
class _State:
    """State of one running request."""

    bias_V: Tensor | None
    """Added to the logits; -inf where a token is not allowed."""
    counts_V: Tensor | None
    """Count of each token in the completion."""
    is_known_V: Tensor | None
    """Tokens that prompt or completion has."""


class LogitRules:
    """Applies the rules of many requests to their logits.

    Args:
        eos_ids: forbidden while fewer than `min_tokens` were made, unless the request ignores them.
    """

    def __init__(self, eos_ids: Collection[int]):
        self._eos_ids = eos_ids
        self._states: dict[int, _State] = {}

    def apply(self, logits_BV: Tensor, requests: Sequence[Request]) -> Tensor:
        """Logits to sample from; the given tensor itself where no request has a rule.

        Args:
            logits_BV: float32 or float64; not changed.
        """
        ruled = [b for b, request in enumerate(requests) if request.params.has_logit_rules]
        if not ruled:
            return logits_BV
        scores_BV = logits_BV.clone()
        device, dtype = scores_BV.device, scores_BV.dtype
        states = {b: self._state(requests[b], logits_BV[b]) for b in ruled}
        biased = [b for b in ruled if states[b].bias_V is not None]
        if biased:
            scores_BV[to_device(biased, device)] += torch.stack(
                [_given(states[b].bias_V) for b in biased]
            )
        counted = [b for b in ruled if states[b].counts_V is not None]
        if counted:
            params = [requests[b].params for b in counted]
            penalties_B3 = to_device(
                [[p.repetition_penalty, p.frequency_penalty, p.presence_penalty] for p in params],
                device, dtype=dtype,
            )  # fmt: skip
            index = to_device(counted, device)
            scores_BV[index] = penalised(
                scores_BV[index],
                torch.stack([_given(states[b].counts_V) for b in counted]),
                torch.stack([_given(states[b].is_known_V) for b in counted]),
                *penalties_B3.split(1, dim=1),
            )
        # a token that the model lacks, as an end token of a tokenizer given separately, is never made
        forbidden = [
            (b, token) for b in ruled for token in self._forbidden(requests[b])
            if token < scores_BV.shape[1]
        ]  # fmt: skip
        if forbidden:
            allowed_BV = scores_BV.clone()
            # a number in place of the tensor would be copied to the device, and waited for
            lowest = scores_BV.new_full((), float("-inf"))
            scores_BV.index_put_(tuple(to_device(forbidden, device).unbind(1)), lowest)
            # where nothing would be left, the forbidden tokens are taken after all
            is_empty_B1 = scores_BV.isneginf().all(-1, keepdim=True)
            scores_BV = torch.where(is_empty_B1, allowed_BV, scores_BV)
        return scores_BV

    def forget(self, request: Request) -> None:
        """Drop the state of a finished request."""
        self._states.pop(request.number, None)

    def count(self, token_ids_B: Tensor, requests: Sequence[Request]) -> None:
        """Count each request's new token, on the device."""
        for b, request in enumerate(requests):
            state = self._states.get(request.number)
            if state is not None and state.counts_V is not None:
                ids = token_ids_B[b : b + 1]
                ones = torch.ones_like(ids, dtype=state.counts_V.dtype)
                state.counts_V.index_add_(0, ids, ones)
                _given(state.is_known_V).index_fill_(0, ids, True)

    def _state(self, request: Request, like_V: Tensor) -> _State:
        """The request's state, with the completion so far counted."""
        state = self._states.get(request.number)
        if state is None:
            state = self._states[request.number] = _begin(request, like_V)
        return state

    def _forbidden(self, request: Request) -> set[int]:
        """Tokens that may not come next."""
        params, output = request.params, request.output_token_ids
        tokens: set[int] = set()
        if request.num_output_tokens < params.min_tokens:
            tokens.update(params.stop_token_ids)
            if not params.ignore_eos:
                tokens.update(self._eos_ids)
        for *first, last in request.bad_words_token_ids:
            if not first or output[-len(first) :] == first:
                tokens.add(last)
        return tokens


def penalised(
    scores_BV: Tensor,
    counts_BV: Tensor,
    is_known_BV: Tensor,
    repetition_B1: Tensor,
    frequency_B1: Tensor,
    presence_B1: Tensor,
) -> Tensor:
    """The three penalties.

    Args:
        counts_BV: of each token in the completion, the scores' dtype.
        is_known_BV: bool, tokens of prompt or completion.
        repetition_B1: known tokens' scores are divided by it where positive and multiplied where
            negative (Keskar et al. 2019, CTRL, section 4.1).
        frequency_B1, presence_B1: subtracted for every time that the completion has the token, and once
            if it has it at all (OpenAI's definition).

    Returns:
        new scores.
    """
    repeated_BV = torch.where(scores_BV > 0, scores_BV / repetition_B1, scores_BV * repetition_B1)
    scores_BV = torch.where(is_known_BV, repeated_BV, scores_BV)
    return scores_BV - frequency_B1 * counts_BV - presence_B1 * (counts_BV > 0)


def bad_words_token_ids(
    request_id: str, params: SamplingParams, tokenizer: Any | None
) -> list[list[int]]:
    """Token sequences of `params.bad_words`: as they begin a text, and as they follow a space.

    Raises:
        InvalidRequest: there is no tokenizer, or a word has no tokens.
    """
    found: list[list[int]] = []
    for word in params.bad_words:
        if tokenizer is None:
            raise InvalidRequest(
                f"request {request_id}: bad_words={params.bad_words!r} needs a tokenizer; leave it out"
            )
        bare = word.lstrip()
        for text in dict.fromkeys((bare, f" {bare}")):
            ids = list(tokenizer.encode(text))
            if not ids:
                raise InvalidRequest(
                    f"request {request_id}: bad_words: {word!r} has no tokens; leave it out"
                )
            if ids not in found:
                found.append(ids)
    return found


def reads_last_token(request: Request) -> bool:
    """Whether the host has to know all of the completion to apply the request's rules."""
    words = request.bad_words_token_ids
    return bool(words) and any(len(ids) > 1 for ids in words)


def check_token_ids(request_id: str, params: SamplingParams, vocab_size: int) -> None:
    """Raises:
    InvalidRequest: a parameter names a token that the model lacks.
    """
    for name in ("stop_token_ids", "logit_bias", "allowed_token_ids"):
        for token_id in getattr(params, name) or ():
            if token_id >= vocab_size:
                raise InvalidRequest(
                    f"request {request_id}: {name}: token id {token_id} is not in the model's "
                    f"vocabulary of {vocab_size}; leave it out"
                )


def _begin(request: Request, like_V: Tensor) -> _State:
    params = request.params
    bias_V = counts_V = is_known_V = None
    if params.logit_bias or params.allowed_token_ids is not None:
        bias_V = torch.zeros_like(like_V)
        if params.logit_bias:
            ids = to_device(list(params.logit_bias), like_V.device)
            bias_V[ids] = to_device(
                list(params.logit_bias.values()), like_V.device, dtype=like_V.dtype
            )
        if params.allowed_token_ids is not None:
            is_allowed_V = torch.zeros_like(like_V, dtype=torch.bool)
            allowed = to_device(params.allowed_token_ids, like_V.device)
            is_allowed_V.index_fill_(0, allowed, True)
            bias_V.masked_fill_(~is_allowed_V, float("-inf"))
    if params.has_penalties:
        counts_V = torch.zeros_like(like_V)
        is_known_V = torch.zeros_like(like_V, dtype=torch.bool)
        is_known_V.index_fill_(0, to_device(request.prompt_token_ids, like_V.device), True)
    return _State(bias_V, counts_V, is_known_V)


def _given(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor
