"""Start, merge and stop engine requests for both kinds of completions."""

import asyncio
import functools
import time
import uuid
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from megatron_dmc.checkpoint.chat_template import ChatTemplate
from megatron_dmc.engine import AsyncLLM, RequestStream, SamplingParams
from megatron_dmc.server.errors import ApiError
from megatron_dmc.server.limits import Concurrency, Receive
from megatron_dmc.server.text import TokenTexts


@dataclass
class Service:
    """State shared by the routes."""

    llm: AsyncLLM
    model_names: Sequence[str]
    """Names that clients may use; answers carry the first."""
    concurrency: Concurrency
    chat_template: ChatTemplate | None = None
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.texts = TokenTexts(self.llm.info.tokenizer)
        self._longest_token = getattr(self.llm.info.tokenizer, "longest_token_bytes", None)
        self._closing: asyncio.Future | None = None

    @property
    def max_model_len(self) -> int:
        return self.llm.info.max_model_len

    # Shutdown.

    @property
    def closing(self) -> asyncio.Future:
        """Set when the time of requests in progress has expired."""
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_future()
        return self._closing

    def close(self) -> None:
        """End every request in progress: answers get 503, streams an error event. In the event loop."""
        if not self.closing.done():
            self.closing.set_result(None)

    async def until_closing[Anything](
        self, work: Awaitable[Anything], *ends: asyncio.Future
    ) -> Anything | None:
        """The result of the work; None if one of `ends` comes first. The work is cancelled then.

        Raises:
            ApiError: 503, the server closed first.
        """
        working = asyncio.ensure_future(work)
        try:
            everything = {working, self.closing, *ends}
            await asyncio.wait(everything, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            if self.closing.done():
                raise _shut_down()
            return None
        finally:
            if not working.done():
                working.cancel()
                await asyncio.wait({working})

    # Requests.

    def check_model(self, name: str | None) -> None:
        """Raises:
        ApiError: 404, a model that is not served here.
        """
        if name is not None and name not in self.model_names:
            raise ApiError(
                404,
                f"the model {name!r} is not served here; served: {', '.join(self.model_names)}",
                param="model",
                code="model_not_found",
            )

    def check_room(self, num_prompt: int, max_tokens: int | None) -> None:
        """Raises:
        ApiError: 400, prompt and completion do not fit into the context.
        """
        num_new = max_tokens or 1
        if num_prompt + num_new > self.max_model_len:
            raise self._overflow(
                f"you requested {num_prompt + num_new} tokens ({num_prompt} in the prompt, {num_new} in "
                "the completion). Please reduce the length of the prompt or of the completion."
            )

    def check_text(self, *texts: str) -> None:
        """Before tokenization, reject texts that cannot fit even at the fewest possible tokens.

        Raises:
            ApiError: 400, as `check_room`.
        """
        if self._longest_token is None:
            return
        num_bytes = sum(len(text.encode()) for text in texts)
        least = num_bytes // self._longest_token
        if least >= self.max_model_len:
            raise self._overflow(
                f"your prompt of {num_bytes} bytes has at least {least} tokens. Please reduce its length."
            )

    def _overflow(self, what: str) -> ApiError:
        """The error in OpenAI's words, which clients look for."""
        return ApiError(
            400,
            f"This model's maximum context length is {self.max_model_len} tokens. However, {what}",
            param="max_tokens",
            code="context_length_exceeded",
        )

    async def start(
        self,
        completion_id: str,
        jobs: Iterable[tuple[str | dict, SamplingParams]],
        *,
        priority: int = 0,
    ) -> list[RequestStream]:
        """Queue engine requests: all of them, or none.

        Raises:
            InvalidRequest, RequestFailed, EngineDead: as `AsyncLLM.add_request`.
        """
        streams: list[RequestStream] = []
        try:
            for number, (prompt, params) in enumerate(jobs):
                request_id = f"{completion_id}-{number}"
                stream = await self.llm.add_request(prompt, params, request_id, priority=priority)
                streams.append(stream)
        except BaseException:
            self.stop(streams)
            raise
        return streams

    def stop(self, streams: Iterable[RequestStream]) -> None:
        """Abort the requests that still run."""
        for stream in streams:
            if not stream.finished:
                self.llm.abort_soon(stream.request_id)


class Changes:
    """The changes of an answer's streams, in batches, until all have ended. Leaving the context aborts those
    that still run.

    Args:
        end: set when the client has left.
        only_last: leave out changes before the last of a stream.
    """

    def __init__(
        self,
        service: Service,
        streams: Sequence[RequestStream],
        *,
        end: asyncio.Future | None = None,
        only_last: bool = False,
    ):
        self._service, self._streams = service, streams
        self._left = dict(enumerate(streams))
        self._only_last = only_last
        self._loop = asyncio.get_running_loop()
        self._closing = service.closing
        self._end = self._loop.create_future() if end is None else end
        self._has_come = self._loop.create_future()

    def __enter__(self) -> Self:
        for stream in self._streams:
            stream.on_output = self._wake
            if self._only_last:
                stream.on_output = functools.partial(self._wake_if_finished, stream)
        for end in (self._closing, self._end):
            end.add_done_callback(self._wake)
        self._wake()
        return self

    def __exit__(self, *_: object) -> None:
        for end in (self._closing, self._end):
            end.remove_done_callback(self._wake)
        self._service.stop(self._streams)

    async def next(self) -> list[tuple[int, RequestStream]]:
        """The streams that have changed, with their indices; empty at the end.

        Raises:
            ApiError: 503, the server closes.
            RequestFailed, EngineDead: of a stream.
        """
        while self._left:
            await self._has_come
            self._has_come = self._loop.create_future()
            if self._closing.done():
                raise _shut_down()
            if self._end.done():
                break
            changed = [(i, stream) for i, stream in self._left.items() if self._take(stream)]
            for index, stream in changed:
                if stream.finish_reason is not None:
                    del self._left[index]
            if changed:
                return changed
        return []

    def _take(self, stream: RequestStream) -> bool:
        if (self._only_last and not stream.finished) or not stream.take():
            return False
        if stream.finished and stream.finish_reason is None:
            self._wake()  # an error follows
        return True

    def _wake_if_finished(self, stream: RequestStream) -> None:
        if stream.finished:
            self._wake()

    def _wake(self, _: Any = None) -> None:
        if not self._has_come.done():
            self._has_come.set_result(None)


def new_id(prefix: str) -> str:
    """An id for an answer."""
    return f"{prefix}-{uuid.uuid4().hex}"


async def disconnected(receive: Receive) -> None:
    """Return when the client has disconnected. Its body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _shut_down() -> ApiError:
    return ApiError(
        503, "the server is shutting down and the request's time has expired (--shutdown-timeout); send it "
        "again", code="shutting_down",
    )  # fmt: skip
