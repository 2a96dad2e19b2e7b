"""Start, merge and stop engine requests for both kinds of completions."""

import asyncio
import functools
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Iterable, Sequence
from dataclasses import dataclass, field

from fastapi import Request

from megatron_dmc.checkpoint.chat_template import ChatTemplate
from megatron_dmc.engine import AsyncLLM, RequestOutput, RequestStream, SamplingParams
from megatron_dmc.server.errors import ApiError
from megatron_dmc.server.limits import Concurrency
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

    async def outputs(
        self, streams: Sequence[RequestStream], *, only_last: bool = False
    ) -> AsyncGenerator[list[tuple[int, RequestOutput]], None]:
        """(index of the stream, output) of all that have come; leaving early aborts all.

        Args:
            only_last: leave out the outputs before the last of a stream.
        """
        has_come = asyncio.Event()
        for stream in streams:
            stream.on_output = functools.partial(_wake, has_come, stream, only_last)

        def wake(_: asyncio.Future) -> None:
            has_come.set()

        closing = self.closing
        closing.add_done_callback(wake)
        has_come.set()
        left = dict(enumerate(streams))
        try:
            while left:
                await has_come.wait()
                has_come.clear()
                if closing.done():
                    raise _shut_down()
                found = []
                for index, stream in list(left.items()):
                    if only_last and not stream.finished:
                        continue
                    output = stream.read()
                    if output is not None:
                        found.append((index, output))
                        if output.finished:
                            del left[index]
                        elif stream.finished:
                            has_come.set()  # an error follows
                if found:
                    yield found
        finally:
            closing.remove_done_callback(wake)
            self.stop(streams)


def _wake(has_come: asyncio.Event, stream: RequestStream, only_last: bool) -> None:
    if stream.finished or not only_last:
        has_come.set()


def new_id(prefix: str) -> str:
    """An id for an answer."""
    return f"{prefix}-{uuid.uuid4().hex}"


async def disconnected(request: Request) -> None:
    """Return when the client has disconnected. Its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _shut_down() -> ApiError:
    return ApiError(
        503, "the server is shutting down and the request's time has expired (--shutdown-timeout); send it "
        "again", code="shutting_down",
    )  # fmt: skip
