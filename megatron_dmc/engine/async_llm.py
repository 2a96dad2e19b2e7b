"""`AsyncLLM`: the engine behind asyncio, as in vLLM.

The engine runs in a thread or in a process of its own and sends one message per step with the new tokens of all
requests. The front, in the event loops of its callers, makes texts of them. Outputs are cumulative, and a stream
makes one only when it is read, so a slow reader costs no memory and delays no other request.
"""

import asyncio
import contextlib
import itertools
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from megatron_dmc.engine.clients import EngineClient, EngineThread
from megatron_dmc.engine.config import EngineConfig
from megatron_dmc.engine.detokenizer import CompletionText
from megatron_dmc.engine.isolation import own_work
from megatron_dmc.engine.loop import Call, Change, EngineInfo, Message, Reply, StepOutputs
from megatron_dmc.engine.process import EngineProcess
from megatron_dmc.engine.prompts import read_cache_salt, read_prompt
from megatron_dmc.engine.request import RequestOutput
from megatron_dmc.engine.sampling_params import SamplingParams
from megatron_dmc.engine.stats import EngineStats
from megatron_dmc.engine.stream import RequestStream
from megatron_dmc.errors import EngineDead, InvalidRequest

if TYPE_CHECKING:
    from megatron_dmc.engine.engine import LLMEngine

logger = logging.getLogger(__name__)

type Prompt = str | Sequence[int] | dict
type Observer = Callable[[RequestStream, int], None]


class AsyncLLM:
    """Generates for many callers at a time.

    Args:
        engine: used from now on by a thread of this object alone; or an `EngineProcess`.
        observer: called in the callers' event loops with a stream that a step, or an abort, has changed, and
            the number of its new tokens; must be quick and must not raise.

    The engine ends with `shutdown` or the process.
    """

    def __init__(self, engine: "LLMEngine | EngineProcess", *, observer: Observer | None = None):
        self.client: EngineClient = (
            engine if isinstance(engine, EngineProcess) else EngineThread(engine)
        )
        self._observer = observer
        self._streams: dict[int, RequestStream] = {}
        self._keys, self._numbers = itertools.count(), itertools.count(1)
        self._lock = threading.Lock()
        """Of the calls and the failure."""
        self._calls: dict[int, Future] = {}
        self._failure: EngineDead | None = None
        self._changes: dict[asyncio.AbstractEventLoop, list[tuple[RequestStream, Change]]] = {}
        self.client.start(self._receive)

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any | None = None,
        *,
        observer: Observer | None = None,
        **settings: Any,
    ) -> "AsyncLLM":
        """Load a model into a thread's engine; the arguments are those of `LLM`."""
        config = EngineConfig.from_settings(settings)
        from megatron_dmc.engine.build import build_engine

        return cls(build_engine(model, tokenizer, config), observer=observer)

    @property
    def info(self) -> EngineInfo:
        """The engine's settings, sizes and tokenizer."""
        return self.client.info

    # Requests.

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the request's outputs, each with all of the completion so far. Leaving the loop, or
        cancelling the task, aborts the request.

        Args:
            prompt: see `read_prompt`.
            request_id: default: a new one.
            priority: lower goes first; only with the scheduling policy "priority".

        Raises:
            InvalidRequest: it can never run.
            RequestFailed: an exception of its own work ended it.
            EngineDead: the engine has failed, or was shut down.
        """
        stream = await self.add_request(prompt, sampling_params, request_id, priority=priority)
        try:
            async for output in stream:
                yield output
        finally:
            if not stream.finished:
                self.abort_soon(stream.request_id)

    async def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> RequestStream:
        """Queue a request; returns once the engine has accepted it. A caller that stops reading the
        stream must `abort` the request. Raises like `generate`."""
        key = next(self._keys)
        request_id = f"request-{key}" if request_id is None else request_id
        if sampling_params is None:
            sampling_params = SamplingParams(**self.info.default_sampling_params)
        if self.info.tokenizer is None and sampling_params.stop:
            raise InvalidRequest(
                f"request {request_id}: stop={sampling_params.stop!r} needs a tokenizer; use stop_token_ids"
            )
        text, token_ids = await self._read_prompt(prompt, request_id)
        salt = read_cache_salt(request_id, prompt)
        stream = self._streams[key] = self._stream(
            request_id, key, text, token_ids, replace(sampling_params)
        )
        asked = {"prompt_token_ids": token_ids, "cache_salt": salt}
        params = replace(sampling_params, detokenize=False, stop=[])
        try:
            await self._call("add_request", key, request_id, asked, params, priority)
        except BaseException as error:
            self._streams.pop(key, None)
            if isinstance(error, asyncio.CancelledError):
                self.abort_soon(request_id)
            raise
        return stream

    def _stream(
        self,
        request_id: str,
        key: int,
        prompt: str | None,
        token_ids: list[int],
        params: SamplingParams,
    ) -> RequestStream:
        text = None
        if self.info.tokenizer is not None and params.detokenize:
            with own_work(request_id):
                text = CompletionText(self.info.tokenizer, token_ids, params)
        return RequestStream(
            request_id, key, prompt=prompt, prompt_token_ids=token_ids, params=params, text=text,
            loop=asyncio.get_running_loop(),
        )  # fmt: skip

    async def abort(self, request_id: str) -> None:
        """End a request and free its pages; its stream gets a last output with finish_reason "abort".
        Nothing happens if it is unknown or has finished."""
        if self._failure is None:
            await self._call("abort_request", request_id)

    def abort_soon(self, request_id: str) -> None:
        """`abort` without waiting for it, from any thread."""
        self._post("abort_request", request_id)

    async def tokenize(self, prompt: Prompt, request_id: str) -> list[int]:
        """Encode a prompt as the engine would, a text in a thread of its own. `add_request` takes the token ids in
        place of the prompt.

        Raises:
            InvalidRequest: it has none; the message names `request_id`.
        """
        return (await self._read_prompt(prompt, request_id))[1]

    async def _read_prompt(self, prompt: Prompt, request_id: str) -> tuple[str | None, list[int]]:
        def read() -> tuple[str | None, list[int]]:
            with own_work(request_id):
                return read_prompt(request_id, prompt, self.info.tokenizer, self.info.vocab_size)

        is_text = isinstance(prompt, str) or (
            isinstance(prompt, dict) and "prompt_token_ids" not in prompt
        )
        return await asyncio.to_thread(read) if is_text else read()

    # The engine as a whole.

    async def stats(self) -> EngineStats:
        """The engine's statistics between two steps.

        Raises:
            EngineDead: the engine has failed, or was shut down.
        """
        return await self._call("stats")

    def unfinished(self) -> list[RequestStream]:
        """Streams of the requests that wait or run, oldest first."""
        return [stream for stream in list(self._streams.values()) if not stream.finished]

    @property
    def failure(self) -> Exception | None:
        """The error that ended the engine; None while it runs."""
        return self._failure

    def shutdown(self, timeout: float | None = None) -> None:
        """End the engine after its current step, and the other ranks; unfinished requests end with
        `EngineDead`.

        Args:
            timeout: seconds to wait for the step; None: as long as it takes.
        """
        self.client.stop(timeout)

    # Messages of the engine, in the client's thread.

    def _receive(self, message: Message) -> None:
        if isinstance(message, StepOutputs):
            self._deliver(message.changes())
        elif isinstance(message, Reply):
            with self._lock:
                future = self._calls.pop(message.number, None)
            if future is not None and future.set_running_or_notify_cancel():
                if message.error is None:
                    future.set_result(message.result)
                else:
                    future.set_exception(message.error)
        else:
            self._end(message.error)

    def _deliver(self, changes: Iterable[Change]) -> None:
        """Give each event loop its requests' changes, in one call; those of several steps together if the loop
        is behind."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[RequestStream, Change]]] = {}
        for change in changes:
            stream = self._streams.get(change.key)
            if stream is not None:
                by_loop.setdefault(stream.loop, []).append((stream, change))
        for loop, items in by_loop.items():
            with self._lock:
                waiting = self._changes.setdefault(loop, [])
                is_called = bool(waiting)
                waiting += items
            if not is_called:
                self._call_in(loop, self._add_changes, loop)
            if loop.is_closed():
                with self._lock:
                    self._changes.pop(loop, None)
                for stream, _ in items:  # these have no reader
                    if self._streams.pop(stream.key, None) is not None:
                        self.abort_soon(stream.request_id)

    def _end(self, error: EngineDead) -> None:
        with self._lock:
            self._failure = error
            calls, self._calls = list(self._calls.values()), {}
        for future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        streams = list(self._streams.values())
        self._streams.clear()
        for stream in streams:
            self._call_in(stream.loop, stream.fail, error)

    @staticmethod
    def _call_in(loop: asyncio.AbstractEventLoop, function: Callable, *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(function, *arguments)

    # In a caller's event loop.

    def _add_changes(self, loop: asyncio.AbstractEventLoop) -> None:
        with self._lock:
            items = self._changes.pop(loop, [])
        for stream, change in items:
            if stream.finished:
                continue  # it has ended here, and the engine did not know yet
            num_before = len(stream.token_ids)
            is_to_abort = stream.add(change)
            if stream.finished:
                self._streams.pop(stream.key, None)
            if is_to_abort:
                self.abort_soon(stream.request_id)
            if self._observer is not None:
                try:
                    self._observer(stream, len(stream.token_ids) - num_before)
                except Exception:
                    logger.exception("the observer failed; no request is affected")

    # Calls.

    async def _call(self, method: str, *arguments: Any) -> Any:
        return await asyncio.wrap_future(self._post(method, *arguments))

    def _post(self, method: str, *arguments: Any) -> Future:
        future: Future = Future()
        with self._lock:
            if self._failure is not None:
                future.set_exception(self._failure)
                return future
            number = next(self._numbers)
            self._calls[number] = future
        self.client.post(Call(number, method, arguments))
        return future
