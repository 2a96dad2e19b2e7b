"""The front's side of a request: its text, and its outputs for one reader."""

import asyncio
import time
from collections.abc import Callable

from megatron_dmc.engine.detokenizer import CompletionText
from megatron_dmc.engine.isolation import failure_of
from megatron_dmc.engine.loop import Change, More
from megatron_dmc.engine.request import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from megatron_dmc.engine.sampling_params import SamplingParams
from megatron_dmc.errors import RequestFailed


class RequestStream:
    """The outputs of one request, to be read with `async for` in the loop that made it.

    An output holds the whole completion so far, and is made when it is read: a slow reader gets fewer of them.

    Args:
        text: None: outputs have no text.
        loop: of its reader.

    Attributes:
        key: the request's name in messages.
        token_ids, logprobs, prompt_logprobs: so far.
        metrics: None before the first output.
        finish_reason, stop_reason: see `CompletionOutput`.
        arrival_time: `time.monotonic()` seconds.
        on_output: called in the loop when there is an output, or an error, to read.
    """

    def __init__(
        self,
        request_id: str,
        key: int,
        *,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        text: CompletionText | None,
        loop: asyncio.AbstractEventLoop,
    ):
        self.request_id, self.key, self.params = request_id, key, params
        self.prompt, self.prompt_token_ids = prompt, prompt_token_ids
        self.metrics: RequestMetrics | None = None
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.arrival_time = time.monotonic()
        self.loop = loop
        self._ready = asyncio.Event()
        self.on_output: Callable[[], None] = self._ready.set
        self._text = text
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, Logprob]] | None = None if params.logprobs is None else []
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        self._cumulative_logprob: float | None = None
        self._error: Exception | None = None
        self._has_unread = self._ended = False

    @property
    def text(self) -> str:
        """The text so far that can no longer change."""
        if self._text is None:
            return ""
        return self._text.visible(is_finished=self.finish_reason is not None)

    @property
    def finished(self) -> bool:
        """True once the last output, or the engine's failure, has arrived."""
        return self._error is not None or self.finish_reason is not None

    # The reader.

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> RequestOutput:
        if self._ended:
            raise StopAsyncIteration
        while (output := self.read()) is None:
            await self._ready.wait()
            self._ready.clear()
        return output

    def read(self) -> RequestOutput | None:
        """The newest output; None if it has been read. Raises like `take`."""
        return self.output() if self.take() else None

    def take(self) -> bool:
        """Whether there is something that has not been read; then it counts as read.

        Raises:
            RequestFailed, EngineDead: the request has ended so, and everything before has been read.
        """
        if self._has_unread:
            self._has_unread = False
            self._ended = self.finish_reason is not None
            return True
        if self._error is not None and not self._ended:
            self._ended = True
            raise self._error
        return False

    def output(self) -> RequestOutput:
        """The state of the request."""
        assert self.metrics is not None
        completion = CompletionOutput(
            index=0,
            text=self.text,
            num_tokens=len(self.token_ids),
            request_token_ids=self.token_ids,
            cumulative_logprob=self._cumulative_logprob,
            request_logprobs=self.logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            prompt_logprobs=self.prompt_logprobs,
            outputs=[completion],
            finished=self.finish_reason is not None,
            metrics=self.metrics,
            cr=self.metrics.measured_cr,
        )

    # The engine, in the stream's loop.

    def add(self, change: Change) -> bool:
        """Add what a step has changed.

        Returns:
            whether the request has to be aborted: it has ended here, by a stop text or a failure.
        """
        token_ids, more = change.token_ids, change.more
        finish_reason = None
        if more is not None:
            self._add_more(more)
            finish_reason = more.finish_reason
        metrics = self.metrics
        assert metrics is not None, "the first change has metrics"
        metrics.num_cached_tokens = change.num_cached_tokens
        metrics.num_entries, metrics.num_pages = change.num_entries, change.num_pages
        try:
            stop_text = self._add_tokens(token_ids, finish_reason)
        except BaseException as error:  # noqa: BLE001 - it ends this request alone
            self.fail(failure_of(self.request_id, error))
            return finish_reason is None
        if finish_reason == "error":
            assert more is not None
            self.fail(RequestFailed(more.error or "the request failed"))
            return False
        if stop_text is not None:
            self.finish_reason, self.stop_reason = "stop", stop_text
        elif more is not None:
            self.finish_reason, self.stop_reason = finish_reason, more.stop_reason
        self._has_unread = True
        self.on_output()
        return stop_text is not None and finish_reason is None

    def fail(self, error: Exception) -> None:
        """End it with an error, behind the outputs that have not been read."""
        self._error = error
        if isinstance(error, RequestFailed):
            self.finish_reason, self._has_unread = "error", False
        self.on_output()

    def _add_more(self, more: More) -> None:
        self.metrics = more.metrics
        self._cumulative_logprob = more.cumulative_logprob
        if self.logprobs is not None:
            self.logprobs += more.logprobs or []
        if more.prompt_logprobs is not None:
            self.prompt_logprobs = more.prompt_logprobs

    def _add_tokens(self, token_ids: list[int], finish_reason: str | None) -> str | None:
        """Returns the stop text, if one ends the completion."""
        last = len(token_ids) - 1
        for i, token_id in enumerate(token_ids):
            self.token_ids.append(token_id)
            if self._text is None:
                continue
            stop_text = self._text.append(
                token_id,
                len(self.token_ids),
                ends=i == last and finish_reason == "stop",
                is_last=i == last and finish_reason == "length",
            )
            if stop_text is not None:
                return stop_text
        return None
