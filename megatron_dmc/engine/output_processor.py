"""Append sampled tokens to their requests, find the ends of completions, and build outputs."""

import math
import time
from collections.abc import Callable, Collection
from typing import NamedTuple

from torch import Tensor

from megatron_dmc.checkpoint.tokenizer import Tokenizer
from megatron_dmc.engine.detokenizer import CompletionText
from megatron_dmc.engine.request import CompletionOutput, Logprob, Request, RequestOutput
from megatron_dmc.engine.sampler import SampledToken, token_logprobs
from megatron_dmc.errors import RequestFailed


class Ending(NamedTuple):
    """The end of a completion, in the terms of `CompletionOutput`."""

    finish_reason: str
    stop_reason: str | int | None


class OutputProcessor:
    """Work on the host for each request after its token is sampled.

    Args:
        tokenizer: None: outputs have no text.
        eos_id: end-of-text token, whose stop reason is None.
        eos_ids: all tokens that end a completion, `eos_id` included.
    """

    def __init__(self, tokenizer: Tokenizer | None, eos_id: int | None, eos_ids: Collection[int]):
        self._tokenizer, self._eos_id, self._eos_ids = tokenizer, eos_id, eos_ids
        self._texts: dict[str, CompletionText] = {}

    def add(self, request: Request) -> None:
        """Prepare for a new request."""
        params = request.params
        ends = () if params.ignore_eos else self._eos_ids
        request.ending_token_ids = frozenset((*ends, *params.stop_token_ids))
        if self._tokenizer is not None and request.params.detokenize:
            self._texts[request.request_id] = CompletionText(
                self._tokenizer, request.prompt_token_ids, request.params
            )

    def forget(self, request: Request) -> None:
        """Drop the state of a request that has ended."""
        self._texts.pop(request.request_id, None)

    def append(self, request: Request, token: int | SampledToken) -> Ending | None:
        """Append a token to its request; the ending if it is the last one."""
        if isinstance(token, int):
            token_id = token
        else:
            request.logprobs.append(token.logprobs)
            request.cumulative_logprob += token.logprob
            token_id = token.token_id
        output = request.output_token_ids
        output.append(token_id)
        number = len(output)
        if number == 1 and request.metrics.first_token_time is None:
            request.metrics.first_token_time = time.monotonic()
        ends = token_id in request.ending_token_ids
        is_full = number + len(request.prompt_token_ids) >= request.max_total_tokens
        if not (ends or is_full or self._texts):
            return None
        text = self._texts.get(request.request_id)
        if text is not None:
            stop_text = text.append(token_id, number, ends=ends, is_last=is_full)
            if stop_text is not None:
                return Ending("stop", stop_text)
        if ends:
            is_plain = token_id == self._eos_id and not request.params.ignore_eos
            return Ending("stop", None if is_plain else token_id)
        return Ending("length", None) if is_full else None

    def begin_prompt_logprobs(
        self, request: Request, start: int, logits_XV: Tensor
    ) -> Callable[[], None]:
        """Start to copy the log-probabilities of prompt tokens; row x of the logits predicts token
        `start + x + 1`.

        Returns:
            a function that waits for them and records them.
        """
        count = request.params.prompt_logprobs
        assert count is not None
        following = request.prompt_token_ids[start + 1 : start + 1 + len(logits_XV)]
        read = token_logprobs(logits_XV, following, [count] * len(following))
        return lambda: self._add_prompt_logprobs(request, start, read())

    def _add_prompt_logprobs(
        self, request: Request, start: int, rows: list[dict[int, Logprob]]
    ) -> None:
        if any(math.isnan(p.logprob) for row in rows for p in row.values()):
            raise RequestFailed(
                f"request {request.request_id}: the model's logits of the prompt are not finite (NaN or "
                "infinity); a larger dtype may help"
            )
        # after a preemption the first ones are there already
        request.prompt_logprobs += rows[len(request.prompt_logprobs) - start - 1 :]

    def text(self, request: Request) -> str:
        """The text so far, without what may yet turn out to begin a stop text."""
        text = self._texts.get(request.request_id)
        return "" if text is None else text.visible(is_finished=request.is_finished)


def output_of(request: Request, text: str) -> RequestOutput:
    """The state of a request as its caller sees it; lists are shared, not copied."""
    wants_logprobs = request.params.logprobs is not None
    wants_prompt = request.params.prompt_logprobs is not None
    completion = CompletionOutput(
        index=0,
        text=text,
        num_tokens=len(request.output_token_ids),
        request_token_ids=request.output_token_ids,
        cumulative_logprob=request.cumulative_logprob if wants_logprobs else None,
        request_logprobs=request.logprobs if wants_logprobs else None,
        finish_reason=request.finish_reason,
        stop_reason=request.stop_reason,
    )
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        prompt_logprobs=request.prompt_logprobs if wants_prompt else None,
        outputs=[completion],
        finished=request.is_finished,
        metrics=request.metrics,
        cr=request.metrics.measured_cr,
        error=request.error,
    )
