"""What both kinds of completions have in common: starting, merging and stopping engine requests."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Iterable, Sequence
from dataclasses import dataclass, field

from fastapi import Request
from starlette.responses import Response

from megatron_dmc.engine import AsyncLLM, RequestOutput, RequestStream, SamplingParams
from megatron_dmc.server.chat_template import ChatTemplate
from megatron_dmc.server.errors import ApiError
from megatron_dmc.server.limits import Concurrency
from megatron_dmc.server.text import TokenTexts


@dataclass
class Service:
    """What the routes need."""

    llm: AsyncLLM
    model_names: Sequence[str]
    """Names that clients may use; the first is the one that answers carry."""
    concurrency: Concurrency
    chat_template: ChatTemplate | None = None
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.texts = TokenTexts(self.llm.engine.tokenizer)

    @property
    def max_model_len(self) -> int:
        return self.llm.engine.config.max_model_len

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
        if num_prompt + (max_tokens or 1) > self.max_model_len:
            raise ApiError(
                400,
                f"this model's context is {self.max_model_len} tokens; the prompt has {num_prompt} "
                f"and max_tokens is {max_tokens or 1}; shorten the prompt or lower max_tokens",
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
            InvalidRequest, EngineDead: as `AsyncLLM.add_request`.
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
        """Abort those that go on."""
        for stream in streams:
            if not stream.finished:
                self.llm.abort_soon(stream.request_id)

    async def outputs(
        self, streams: Sequence[RequestStream]
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """(index of the stream, output) as they come; leaving early aborts all."""
        waiting: dict[asyncio.Future, int] = {}

        def read(index: int) -> None:
            waiting[asyncio.ensure_future(anext(streams[index]))] = index

        try:
            for index in range(len(streams)):
                read(index)
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    index = waiting.pop(task)
                    output = task.result()
                    if not output.finished:
                        read(index)
                    yield index, output
        finally:
            for task in waiting:
                task.cancel()
            self.stop(streams)


def new_id(prefix: str) -> str:
    """An id for an answer."""
    return f"{prefix}-{uuid.uuid4().hex}"


async def unless_disconnected(request: Request, work: Awaitable[Response]) -> Response:
    """The answer, or the end of the work once nobody waits for it any more."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return Response(status_code=499)  # nobody reads it
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait({working})


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
