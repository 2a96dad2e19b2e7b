"""`/v1/completions` and `/v1/chat/completions`: from a checked request to an answer or a stream."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from megatron_dmc.engine import RequestStream, SamplingParams
from megatron_dmc.server import text
from megatron_dmc.server.errors import ApiError, JsonResponse, as_api_error, chunk_json, to_json
from megatron_dmc.server.limits import DIRECT_SEND
from megatron_dmc.server.protocol import ChatCompletionRequest, CompletionRequest
from megatron_dmc.server.service import Changes, Service, disconnected, new_id

DEFAULT_MAX_TOKENS = 16
"""Default `max_tokens` of a text completion, OpenAI's."""


class _Answer(ABC):
    """The answer to one request. Choice i is completion i % n of prompt i // n."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(
        self, service: Service, body: CompletionRequest | ChatCompletionRequest, num_prompts: int
    ):
        self.service = service
        self.id, self.created = new_id(self.prefix), int(time.time())
        self.per_prompt = body.num_completions
        self.num_choices = num_prompts * self.per_prompt
        self.includes_usage = body.includes_usage
        self.continuous_usage = body.continuous_usage
        self.has_logprobs = body.logprobs is not None and body.logprobs is not False
        self.priority = body.priority or 0
        self.keeps_new = True
        self.num_prompt_tokens = 0

    @abstractmethod
    async def jobs(self) -> list[tuple[dict, SamplingParams]]:
        """Engine requests, one per choice; sets `num_prompt_tokens`."""

    @abstractmethod
    def choice(self, index: int, stream: RequestStream) -> dict[str, Any]:
        """A choice of a complete answer."""

    @abstractmethod
    def deltas(self, index: int, stream: RequestStream) -> list[dict[str, Any]]:
        """The choices to send for the new part of `stream`: one for new tokens even if they have no text
        yet, since clients time the first one."""

    def document(self, choices: list[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        """The document around the choices."""
        return {
            "id": self.id,
            "object": self.chunk_object if chunk else self.whole_object,
            "created": self.created,
            "model": self.service.model_names[0],
            "choices": choices,
        }

    def usage(self, last: dict[int, RequestStream]) -> dict[str, Any]:
        """Token counts, and the measured CR of the caches: tokens / entries, total over total.

        Args:
            last: by choice.
        """
        num_new = num_tokens = num_entries = num_cached = 0
        for index, stream in last.items():
            metrics = stream.metrics
            assert metrics is not None
            if index % self.per_prompt == 0:  # a prompt counts once for all of its choices
                num_cached += metrics.num_cached_prompt_tokens
            num_new += len(stream.token_ids) if self.keeps_new else 0
            num_tokens += metrics.num_cached_tokens
            num_entries += metrics.num_entries
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_new,
            "total_tokens": self.num_prompt_tokens + num_new,
            "prompt_tokens_details": {"cached_tokens": num_cached},
            "measured_cr": num_tokens / num_entries if num_entries else None,
        }

    async def start(self) -> list[RequestStream]:
        """Queue the engine's requests."""
        return await self.service.start(self.id, await self.jobs(), priority=self.priority)

    async def whole(self, streams: Sequence[RequestStream]) -> Response:
        """Wait for all choices."""
        with Changes(self.service, streams, only_last=True) as changes:
            while await changes.next():
                pass

        def response() -> Response:
            choices = [self.choice(index, stream) for index, stream in enumerate(streams)]
            usage = self.usage(dict(enumerate(streams)))
            return JsonResponse(self.document(choices, chunk=False) | {"usage": usage})

        # serialising log-probabilities of many tokens takes seconds
        return await asyncio.to_thread(response) if self.has_logprobs else response()

    async def write_events(
        self, changes: Changes, write: Callable[[bytes], Awaitable[None]]
    ) -> None:
        """Write server-sent events: chunks, and the usage if requested."""
        last: dict[int, RequestStream] = {}
        # only the choice differs from chunk to chunk
        head = b"data: " + to_json(self.document([], chunk=True)).encode().removesuffix(b"]}")
        tail = b'],"usage":null}' if self.includes_usage else b"]}"
        try:
            while changed := await changes.next():
                last.update(changed)
                events = b""
                for index, stream in changed:
                    if self.continuous_usage:
                        tail = b'],"usage":%b}' % chunk_json(self.usage({index: stream}))
                    for choice in self.deltas(index, stream):
                        events += head + chunk_json(choice) + tail + b"\n\n"
                if events:
                    await write(events)
            if self.includes_usage:
                figures = {"usage": self.usage(last)}
                await write(_event(self.document([], chunk=True) | figures))
        except Exception as e:  # noqa: BLE001 - the answer has started: the error is sent in the stream
            await write(_event(as_api_error(e).body()))


class _TextAnswer(_Answer):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, service: Service, body: CompletionRequest):
        super().__init__(service, body, len(body.prompts))
        self.body = body
        self.echo = bool(body.echo)
        # for 0 tokens the engine generates one, which is omitted
        self.keeps_new = body.max_tokens != 0
        self._sent = [(0, 0)] * self.num_choices
        self._prompt_texts: list[str] = []
        self._pieces: dict[int, text.TokenPieces] = {}

    async def jobs(self) -> list[tuple[dict, SamplingParams]]:
        jobs = []
        body, llm = self.body, self.service.llm
        defaults = llm.info.default_sampling_params
        max_tokens = body.max_tokens if body.max_tokens is not None else DEFAULT_MAX_TOKENS
        max_tokens = min(max_tokens, defaults.get("max_tokens", max_tokens))
        for prompt in body.prompts:
            given: Any = prompt
            if isinstance(prompt, str):
                self.service.check_text(prompt)
                given = {"prompt": prompt, "add_special_tokens": body.add_special_tokens}
            else:
                self.service.check_room(len(prompt), body.max_tokens)
            token_ids = await llm.tokenize(given, self.id)
            self.service.check_room(len(token_ids), body.max_tokens)
            self.num_prompt_tokens += len(token_ids)
            tokenizer = llm.info.tokenizer
            if self.echo:
                if isinstance(prompt, str):
                    shown = prompt
                else:
                    skip = body.skip_special_tokens
                    shown = ""
                    if tokenizer is not None:
                        shown = tokenizer.decode(token_ids, skip_special_tokens=skip)
                self._prompt_texts.append(shown)
            every = body.sampling_params(
                defaults=defaults,
                max_tokens=max(max_tokens, 1),
                logprobs=body.logprobs,
                prompt_logprobs=body.logprobs if self.echo else None,
            )
            asked = {"prompt_token_ids": token_ids, "cache_salt": body.cache_salt}
            jobs += [(asked, params) for params in every]
        return jobs

    def choice(self, index: int, stream: RequestStream) -> dict[str, Any]:
        return self._choice(index, stream, stream.text, 0)

    def deltas(self, index: int, stream: RequestStream) -> list[dict[str, Any]]:
        num_chars, num_tokens = self._sent[index]
        so_far, num_known = stream.text, len(stream.token_ids)
        if num_known == num_tokens and not stream.finished:
            return []
        choice = self._choice(index, stream, so_far[num_chars:], num_tokens)
        self._sent[index] = (len(so_far), num_known)
        return [choice]

    def _choice(
        self, index: int, stream: RequestStream, new: str, num_tokens: int
    ) -> dict[str, Any]:
        """The completion from token `num_tokens` on, whose text is `new`; at 0 with the prompt, if it is
        echoed."""
        begins = self.echo and num_tokens == 0
        prompt = self._prompt_texts[index // self.per_prompt] if begins else ""
        return {
            "index": index,
            "text": prompt + new if self.keeps_new else prompt,
            "logprobs": self._logprobs(index, stream, num_tokens, prompt),
            "finish_reason": stream.finish_reason,
            "stop_reason": stream.stop_reason,
        }

    def _logprobs(
        self, index: int, stream: RequestStream, num_tokens: int, prompt: str
    ) -> dict[str, Any] | None:
        """Log-probabilities of the tokens from `num_tokens` on; at offset 0, with echo, of the prompt too."""
        count = self.body.logprobs
        if count is None or stream.logprobs is None:
            return None
        skip, texts = self.body.skip_special_tokens, self.service.texts
        if num_tokens == 0:
            self._pieces[index] = text.TokenPieces(
                texts, skip_special_tokens=skip, prompt_token_ids=stream.prompt_token_ids,
                num_chars=len(prompt),
            )  # fmt: skip
        kept = slice(num_tokens, None if self.keeps_new else 0)
        found = text.for_completions(
            self._pieces[index], stream.token_ids[kept], stream.logprobs[kept], count
        )
        if self.echo and num_tokens == 0:
            pieces = text.TokenPieces(texts, skip_special_tokens=skip, known=prompt)
            rows = stream.prompt_logprobs or []
            of_prompt = text.for_completions(pieces, stream.prompt_token_ids, rows, count)
            found = {name: of_prompt[name] + found[name] for name in found}
        return found


class _ChatAnswer(_Answer):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, service: Service, body: ChatCompletionRequest):
        super().__init__(service, body, 1)
        self.body = body
        self._sent: list[tuple[int, int] | None] = [None] * self.num_choices
        self._pieces: dict[int, text.TokenPieces] = {}

    async def jobs(self) -> list[tuple[dict, SamplingParams]]:
        body, template = self.body, self.service.chat_template
        if template is None or not template.exists:
            remedy = "start the server with --chat-template, or " if template is not None else ""
            raise ApiError(
                400,
                f"this model has no chat template; {remedy}use /v1/completions",
                code="no_chat_template",
            )
        messages = [message.as_dict() for message in body.messages]
        self.service.check_text(*(message["content"] for message in messages))
        token_ids = await asyncio.to_thread(
            template.token_ids,
            messages,
            add_generation_prompt=body.add_generation_prompt,
            arguments=body.chat_template_kwargs,
            add_special_tokens=body.add_special_tokens,
        )
        self.service.check_room(len(token_ids), body.most_tokens)
        defaults = self.service.llm.info.default_sampling_params
        limits = [body.most_tokens, defaults.get("max_tokens")]
        max_tokens = min((limit for limit in limits if limit is not None), default=None)
        self.num_prompt_tokens = len(token_ids)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        every = body.sampling_params(defaults=defaults, max_tokens=max_tokens, logprobs=logprobs)
        asked = {"prompt_token_ids": token_ids, "cache_salt": body.cache_salt}
        return [(asked, params) for params in every]

    def choice(self, index: int, stream: RequestStream) -> dict[str, Any]:
        message = {"role": "assistant", "content": stream.text, "refusal": None}
        return self._choice(index, stream, "message", message, 0)

    def deltas(self, index: int, stream: RequestStream) -> list[dict[str, Any]]:
        so_far, num_known = stream.text, len(stream.token_ids)
        choices = []
        if self._sent[index] is None:
            first = {"role": "assistant", "content": ""}
            choices.append(
                {"index": index, "delta": first, "logprobs": None, "finish_reason": None}
            )
        num_chars, num_tokens = self._sent[index] or (0, 0)
        new = so_far[num_chars:]
        if num_known > num_tokens or stream.finished:
            delta = {"content": new} if new or num_known > num_tokens else {}
            choices.append(self._choice(index, stream, "delta", delta, num_tokens))
        self._sent[index] = (len(so_far), num_known)
        return choices

    def _choice(
        self, index: int, stream: RequestStream, name: str, content: dict, num_tokens: int
    ) -> dict[str, Any]:
        return {
            "index": index,
            name: content,
            "logprobs": self._logprobs(index, stream, num_tokens),
            "finish_reason": stream.finish_reason,
            "stop_reason": stream.stop_reason,
        }

    def _logprobs(
        self, index: int, stream: RequestStream, num_tokens: int
    ) -> dict[str, Any] | None:
        """Log-probabilities of the tokens from `num_tokens` on."""
        if stream.logprobs is None:
            return None
        texts = self.service.texts
        if num_tokens == 0:
            self._pieces[index] = text.TokenPieces(
                texts, skip_special_tokens=self.body.skip_special_tokens,
                prompt_token_ids=stream.prompt_token_ids,
            )  # fmt: skip
        rows, token_ids = stream.logprobs[num_tokens:], stream.token_ids[num_tokens:]
        count = self.body.top_logprobs or 0
        return text.for_chat(texts, self._pieces[index], token_ids, rows, count)


async def answer(
    service: Service,
    request: Request,
    reading: Awaitable[CompletionRequest | ChatCompletionRequest],
) -> Response:
    """Answer a request. When the client disconnects, its engine requests end.

    Args:
        reading: returns the checked body.

    Raises:
        ApiError, InvalidRequest, EngineDead: before anything has been sent.
    """
    try:
        body = await service.until_closing(reading)
    except ClientDisconnect:
        return _nobody()
    assert body is not None
    service.check_model(body.model)
    num_prompts = 1 if isinstance(body, ChatCompletionRequest) else len(body.prompts)
    with ExitStack() as places:
        places.enter_context(service.concurrency.admit(num_prompts * body.num_completions))
        make: Callable[..., _Answer] = (
            _ChatAnswer if isinstance(body, ChatCompletionRequest) else _TextAnswer
        )
        pending = make(service, body)
        leaving = asyncio.ensure_future(disconnected(request.receive))
        try:
            if not body.stream:
                return await service.until_closing(_whole(pending), leaving) or _nobody()
            streams = await service.until_closing(pending.start(), leaving)
        finally:
            leaving.cancel()
        if streams is None:
            return _nobody()
        return _EventStream(pending, streams, places.pop_all())


async def _whole(pending: _Answer) -> Response:
    return await pending.whole(await pending.start())


def _nobody() -> Response:
    """Response to a client that has disconnected."""
    return Response(status_code=499)


class _EventStream(Response):
    """Ends the engine's requests in any case, even if the response never started."""

    def __init__(self, pending: _Answer, streams: list[RequestStream], places: ExitStack):
        self.status_code, self.background = 200, None
        self.raw_headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        self._pending, self._streams, self._places = pending, streams, places

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        direct = scope.get(DIRECT_SEND, send)

        async def write(data: bytes) -> None:
            await direct({"type": "http.response.body", "body": data, "more_body": True})

        leaving = asyncio.ensure_future(disconnected(receive))
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            with Changes(self._pending.service, self._streams, end=leaving) as changes:
                await send(start)
                await self._pending.write_events(changes, write)
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        finally:
            leaving.cancel()
            self._places.close()


def _event(document: dict[str, Any]) -> bytes:
    return f"data: {to_json(document)}\n\n".encode()
