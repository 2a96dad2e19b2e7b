"""`/v1/completions` and `/v1/chat/completions`: from a checked request to an answer or a stream."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import ExitStack
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response, StreamingResponse

from megatron_dmc.engine import RequestOutput, RequestStream, SamplingParams
from megatron_dmc.server import text
from megatron_dmc.server.errors import ApiError, JsonResponse, as_api_error, chunk_json, to_json
from megatron_dmc.server.protocol import ChatCompletionRequest, CompletionRequest
from megatron_dmc.server.service import Service, disconnected, new_id

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
    def choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """A choice of a complete answer."""

    @abstractmethod
    def deltas(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        """The choices to send for the new part of `output`: one for new tokens even if they have no text
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

    def usage(self, last: dict[int, RequestOutput]) -> dict[str, Any]:
        """Token counts, and the measured CR of the caches: tokens / entries, total over total.

        Args:
            last: the newest output of each choice.
        """
        num_new = num_tokens = num_entries = num_cached = 0
        for index, output in last.items():
            if index % self.per_prompt == 0:  # a prompt counts once for all of its choices
                num_cached += output.metrics.num_cached_prompt_tokens
            num_new += output.outputs[0].num_tokens if self.keeps_new else 0
            num_tokens += output.metrics.num_cached_tokens
            num_entries += output.metrics.num_entries
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
        last: dict[int, RequestOutput] = {}
        async for outputs in self.service.outputs(streams, only_last=True):
            last.update(outputs)

        def response() -> Response:
            choices = [self.choice(index, last[index]) for index in range(len(streams))]
            return JsonResponse(self.document(choices, chunk=False) | {"usage": self.usage(last)})

        # serialising log-probabilities of many tokens takes seconds
        return await asyncio.to_thread(response) if self.has_logprobs else response()

    async def events(self, streams: Sequence[RequestStream]) -> AsyncGenerator[bytes, None]:
        """Server-sent events: chunks, the usage if requested, and [DONE]."""
        last: dict[int, RequestOutput] = {}
        # only the choice differs from chunk to chunk
        head = b"data: " + to_json(self.document([], chunk=True)).encode().removesuffix(b"]}")
        tail = b'],"usage":null}' if self.includes_usage else b"]}"
        outputs = self.service.outputs(streams)
        try:
            async for found in outputs:
                last.update(found)
                events = b""
                for index, output in found:
                    if self.continuous_usage:
                        usage = chunk_json(self.usage({index: output}))
                        tail = b'],"usage":%b}' % usage
                    for choice in self.deltas(index, output):
                        events += head + chunk_json(choice) + tail + b"\n\n"
                if events:
                    yield events
            if self.includes_usage:
                figures = {"usage": self.usage(last)}
                yield _event(self.document([], chunk=True) | figures)
        except Exception as e:  # noqa: BLE001 - the answer has started: the error is sent in the stream
            yield _event(as_api_error(e).body())
        finally:
            await outputs.aclose()
        yield b"data: [DONE]\n\n"


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

    def choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        return self._choice(index, output, 0, 0)

    def deltas(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        num_chars, num_tokens = self._sent[index]
        completion = output.outputs[0]
        if completion.num_tokens == num_tokens and not output.finished:
            return []
        choice = self._choice(index, output, num_chars, num_tokens)
        self._sent[index] = (len(completion.text), completion.num_tokens)
        return [choice]

    def _choice(
        self, index: int, output: RequestOutput, num_chars: int, num_tokens: int
    ) -> dict[str, Any]:
        """The completion from character and token offsets on; at offset 0 with the prompt, if it is
        echoed."""
        completion = output.outputs[0]
        begins = num_chars == num_tokens == 0
        prompt = self._prompt_texts[index // self.per_prompt] if self.echo else ""
        new = completion.text[num_chars:] if self.keeps_new else ""
        return {
            "index": index,
            "text": prompt + new if begins else new,
            "logprobs": self._logprobs(index, output, num_tokens, prompt if begins else ""),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }

    def _logprobs(
        self, index: int, output: RequestOutput, num_tokens: int, prompt: str
    ) -> dict[str, Any] | None:
        """Log-probabilities of the tokens from `num_tokens` on; at offset 0, with echo, of the prompt too."""
        count = self.body.logprobs
        completion = output.outputs[0]
        if count is None or completion.logprobs is None:
            return None
        skip, texts = self.body.skip_special_tokens, self.service.texts
        if num_tokens == 0:
            self._pieces[index] = text.TokenPieces(
                texts, skip_special_tokens=skip, prompt_token_ids=output.prompt_token_ids,
                num_chars=len(prompt),
            )  # fmt: skip
        kept = slice(num_tokens, None if self.keeps_new else 0)
        found = text.for_completions(
            self._pieces[index], completion.token_ids[kept], completion.logprobs[kept], count
        )
        if self.echo and num_tokens == 0:
            pieces = text.TokenPieces(texts, skip_special_tokens=skip, known=prompt)
            rows = output.prompt_logprobs or []
            of_prompt = text.for_completions(pieces, output.prompt_token_ids, rows, count)
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

    def choice(self, index: int, output: RequestOutput) -> dict[str, Any]:
        message = {"role": "assistant", "content": output.outputs[0].text, "refusal": None}
        return self._choice(index, output, "message", message, 0)

    def deltas(self, index: int, output: RequestOutput) -> list[dict[str, Any]]:
        completion = output.outputs[0]
        choices = []
        if self._sent[index] is None:
            first = {"role": "assistant", "content": ""}
            choices.append(
                {"index": index, "delta": first, "logprobs": None, "finish_reason": None}
            )
        num_chars, num_tokens = self._sent[index] or (0, 0)
        new = completion.text[num_chars:]
        if completion.num_tokens > num_tokens or output.finished:
            delta = {"content": new} if new or completion.num_tokens > num_tokens else {}
            choices.append(self._choice(index, output, "delta", delta, num_tokens))
        self._sent[index] = (len(completion.text), completion.num_tokens)
        return choices

    def _choice(
        self, index: int, output: RequestOutput, name: str, content: dict, num_tokens: int
    ) -> dict[str, Any]:
        completion = output.outputs[0]
        rows = completion.logprobs
        if num_tokens == 0:
            self._pieces[index] = text.TokenPieces(
                self.service.texts,
                skip_special_tokens=self.body.skip_special_tokens,
                prompt_token_ids=output.prompt_token_ids,
            )
        return {
            "index": index,
            name: content,
            "logprobs": None
            if rows is None
            else text.for_chat(
                self.service.texts,
                self._pieces[index],
                completion.token_ids[num_tokens:],
                rows[num_tokens:],
                self.body.top_logprobs or 0,
            ),
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }


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
        leaving = asyncio.ensure_future(disconnected(request))
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


class _EventStream(StreamingResponse):
    """Ends the engine's requests in any case, even if the response never started."""

    media_type = "text/event-stream"

    def __init__(self, pending: _Answer, streams: list[RequestStream], places: ExitStack):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(pending.events(streams), headers=headers)
        self._streams, self._service, self._places = streams, pending.service, places

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._service.stop(self._streams)
            self._places.close()


def _event(document: dict[str, Any]) -> bytes:
    return f"data: {to_json(document)}\n\n".encode()
