"""Check a prompt and its parameters, and make a request of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from megatron_dmc.checkpoint.tokenizer import Tokenizer
from megatron_dmc.engine.logit_rules import bad_words_token_ids, check_token_ids
from megatron_dmc.engine.prompts import read_cache_salt, read_prompt
from megatron_dmc.engine.request import Request, RequestDecisions
from megatron_dmc.engine.sampling_params import SamplingParams
from megatron_dmc.errors import InvalidRequest


class InputProcessor:
    """Makes requests.

    Args:
        tokenizer: None: prompts are token ids.
        default_sampling_params: arguments of the `SamplingParams` of requests that bring none.
        records_decisions: keep each request's merge decisions, to compare with after a preemption.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        max_model_len: int,
        default_sampling_params: dict[str, Any],
        records_decisions: bool,
    ):
        self.tokenizer, self._vocab_size = tokenizer, vocab_size
        self._max_model_len = max_model_len
        self._default_sampling_params = default_sampling_params
        self._records_decisions = records_decisions

    def request(
        self,
        request_id: str,
        number: int,
        prompt: str | Sequence[int] | dict,
        params: SamplingParams | None,
        priority: int,
    ) -> Request:
        """A checked request.

        Args:
            number: in order of arrival.

        Raises:
            InvalidRequest: it can never run.
        """
        if params is None:
            params = SamplingParams(**self._default_sampling_params)
        else:
            params = dataclasses.replace(params)
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise InvalidRequest(f"request {request_id}: priority={priority!r}: use a whole number")
        text, token_ids = read_prompt(request_id, prompt, self.tokenizer, self._vocab_size)
        if params.stop and self.tokenizer is None:
            raise InvalidRequest(
                f"request {request_id}: stop={params.stop!r} needs a tokenizer; use stop_token_ids"
            )
        check_token_ids(request_id, params, self._vocab_size)
        room = self._max_model_len - len(token_ids)
        new = room if params.max_tokens is None else min(params.max_tokens, room)
        return Request(
            request_id=request_id,
            number=number,
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            max_total_tokens=len(token_ids) + new,
            priority=priority,
            cache_salt=read_cache_salt(request_id, prompt),
            bad_words_token_ids=bad_words_token_ids(request_id, params, self.tokenizer),
            decisions=RequestDecisions() if self._records_decisions else None,
            prompt_logprobs=[None] * min(params.prompt_logprobs_start, len(token_ids)),
        )
