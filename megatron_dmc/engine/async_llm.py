"""`AsyncLLM`: the engine behind asyncio, as in vLLM.

The engine runs in a thread of its own. Event loops post commands to it and receive its outputs, once per step.
Outputs are cumulative and a stream keeps only the newest one, so a slow reader costs no memory and delays no
other request.
"""

import asyncio
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from typing import Any

from megatron_dmc.engine.build import build_engine
from megatron_dmc.engine.config import EngineConfig
from megatron_dmc.engine.engine import LLMEngine
from megatron_dmc.engine.isolation import own_work
from megatron_dmc.engine.prompts import read_prompt
from megatron_dmc.engine.request import RequestOutput
from megatron_dmc.engine.sampling_params import SamplingParams
from megatron_dmc.engine.stats import EngineStats
from megatron_dmc.errors import EngineDead, InvalidRequest, RequestFailed

logger = logging.getLogger(__name__)

_HEALTH_S = 1.0

type Prompt = str | Sequence[int] | dict
type Observer = Callable[[list[RequestOutput]], None]


class RequestStream:
    """The outputs of one request, to be read with `async for` in the loop that made it.

    Outputs are cumulative. The next output replaces one that has not been read.

    Attributes:
        latest: the newest output, read or not; None before the first.
        arrival_time: `time.monotonic()` seconds.
    """

    def __init__(self, request_id: str, loop: asyncio.AbstractEventLoop):
        self.request_id = request_id
        self.latest: RequestOutput | None = None
        self.arrival_time = time.monotonic()
        self._loop = loop
        self._unread: RequestOutput | None = None
        self._error: Exception | None = None
        self._ready = asyncio.Event()
        self._ended = False

    @property
    def finished(self) -> bool:
        """True once the last output, or the engine's failure, has arrived."""
        return self._error is not None or (self.latest is not None and self.latest.finished)

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> RequestOutput:
        if self._ended:
            raise StopAsyncIteration
        await self._ready.wait()
        self._ready.clear()
        if self._unread is None:
            self._ended = True
            assert self._error is not None
            raise self._error
        output, self._unread = self._unread, None
        if output.finished:
            self._ended = True
        elif self._error is not None:
            self._ready.set()
        return output

    def _put(self, item: RequestOutput | Exception) -> None:
        """Called in the stream's loop."""
        if isinstance(item, Exception):
            self._error = item
        else:
            self.latest = self._unread = item
        self._ready.set()


class AsyncLLM:
    """Generates for many callers at a time.

    Args:
        engine: used by this object alone from now on.
        observer: called in the engine's thread with every step's outputs, and with those of aborted
            requests; must be quick and must not raise.

    The thread starts with the first call, or at once with tensor parallelism, where it monitors the other ranks.
    It ends with `shutdown` or the process.
    """

    def __init__(self, engine: LLMEngine, *, observer: Observer | None = None):
        self.engine = engine
        self._observer = observer
        self._commands: deque[tuple[Callable[[], Any], Future]] = deque()
        self._condition = threading.Condition()
        self._streams: dict[str, RequestStream] = {}
        self._counter = itertools.count()
        self._failure: EngineDead | None = None
        self._stopping = False
        self._thread: threading.Thread | None = None
        if engine.parallel is not None:
            self._start()

    @classmethod
    def from_model(
        cls,
        model: Any,
        tokenizer: Any | None = None,
        *,
        observer: Observer | None = None,
        **settings: Any,
    ) -> "AsyncLLM":
        """Load a model; the arguments are those of `LLM`."""
        config = EngineConfig.from_settings(settings)
        return cls(build_engine(model, tokenizer, config), observer=observer)

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
        request_id = f"request-{next(self._counter)}" if request_id is None else request_id
        stream = RequestStream(request_id, asyncio.get_running_loop())

        def add() -> None:
            self.engine.add_request(request_id, prompt, sampling_params, priority=priority)
            self._streams[request_id] = stream

        try:
            await self._call(add)
        except asyncio.CancelledError:
            self.abort_soon(request_id)
            raise
        return stream

    async def abort(self, request_id: str) -> None:
        """End a request and free its pages; its stream gets a last output with finish_reason "abort".
        Nothing happens if it is unknown or has finished."""
        if self._failure is None:
            await self._call(lambda: self._abort(request_id))

    def abort_soon(self, request_id: str) -> None:
        """`abort` without waiting for it, from any thread."""
        if self._failure is None:
            self._post(lambda: self._abort(request_id))

    async def tokenize(self, prompt: Prompt, request_id: str) -> list[int]:
        """Encode a prompt in a thread of its own, as the engine would. `add_request` takes the token ids in place
        of the prompt.

        Raises:
            InvalidRequest: it has none; the message names `request_id`.
        """
        tokenizer, vocab_size = self.engine.tokenizer, self.engine.description.vocab_size

        def tokenize() -> list[int]:
            with own_work(request_id):
                return read_prompt(request_id, prompt, tokenizer, vocab_size)[1]

        return await asyncio.to_thread(tokenize)

    # The engine as a whole.

    async def stats(self) -> EngineStats:
        """The engine's statistics between two steps.

        Raises:
            EngineDead: the engine has failed, or was shut down.
        """
        return await self._call(self.engine.stats)

    def unfinished(self) -> list[RequestStream]:
        """Streams of the requests that wait or run, oldest first."""
        return [stream for stream in list(self._streams.values()) if not stream.finished]

    @property
    def failure(self) -> Exception | None:
        """The error that ended the engine; None while it runs."""
        return self._failure

    def shutdown(self, timeout: float | None = None) -> None:
        """End the thread after its current step, and the other ranks; unfinished requests end with
        `EngineDead`.

        Args:
            timeout: seconds to wait for the step; None: as long as it takes.
        """
        with self._condition:
            self._stopping = True
            self._condition.notify()
            if self._thread is None:
                self._failure = EngineDead("the engine was shut down")
        if self._thread is not None:
            self._thread.join(timeout)
        if self._thread is None or not self._thread.is_alive():
            self.engine.close()

    # The engine's thread.

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._execute_commands()
                self.engine.check_health()
                if self.engine.has_unfinished_requests:
                    self._deliver(self.engine.step())
            self._end(EngineDead("the engine was shut down"))
        except BaseException as e:  # callers must not wait forever, whatever it is
            logger.exception("the engine failed")
            if isinstance(e, EngineDead):
                error = e
            else:
                error = EngineDead(f"the engine failed: {type(e).__name__}: {e}")
                error.__cause__ = e
            self._end(error)

    def _wait_for_work(self) -> bool:
        """Wait for commands or unfinished requests; with tensor parallelism at most `_HEALTH_S`.

        Returns:
            False after `shutdown`.
        """
        timeout = None if self.engine.parallel is None else _HEALTH_S
        with self._condition:
            self._condition.wait_for(
                lambda: self._stopping or self._commands or self.engine.has_unfinished_requests,
                timeout,
            )
            return not self._stopping

    def _execute_commands(self) -> None:
        while self._commands:
            function, future = self._commands.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except (InvalidRequest, RequestFailed) as e:
                # the request's own; anything else is a failure of the engine
                future.set_exception(e)
            except BaseException as e:
                future.set_exception(EngineDead(f"the engine failed: {type(e).__name__}: {e}"))
                raise

    def _abort(self, request_id: str) -> None:
        output = self.engine.abort_request(request_id)
        if output is not None:
            self._deliver([output])

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        """Deliver outputs to their streams, with one call per event loop."""
        if self._observer is not None:
            try:
                self._observer(outputs)
            except Exception:
                logger.exception("the observer of outputs failed; no request is affected")
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[RequestStream, Any]]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            if output.finished:
                del self._streams[output.request_id]
            item = output if output.error is None else RequestFailed(output.error)
            by_loop.setdefault(stream._loop, []).append((stream, item))
        self._hand_over(by_loop)

    def _hand_over(self, by_loop: dict) -> None:
        for loop, items in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, items)
            except RuntimeError:  # the loop is closed: these have no reader
                for stream, _ in items:
                    if self._streams.pop(stream.request_id, None) is not None:
                        self.engine.abort_request(stream.request_id)

    def _end(self, error: EngineDead) -> None:
        with self._condition:
            self._failure = error
            commands, self._commands = list(self._commands), deque()
        for _, future in commands:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[RequestStream, Any]]] = {}
        for stream in self._streams.values():
            by_loop.setdefault(stream._loop, []).append((stream, error))
        self._streams.clear()
        self._hand_over(by_loop)

    # Commands.

    async def _call(self, function: Callable[[], Any]) -> Any:
        return await asyncio.wrap_future(self._post(function))

    def _post(self, function: Callable[[], Any]) -> Future:
        future: Future = Future()
        with self._condition:
            if self._failure is not None:
                future.set_exception(self._failure)
                return future
            self._start()
            self._commands.append((function, future))
            self._condition.notify()
        return future

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()


def _put_all(items: list[tuple[RequestStream, Any]]) -> None:
    for stream, item in items:
        stream._put(item)
