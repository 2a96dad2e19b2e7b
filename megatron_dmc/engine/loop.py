"""`EngineLoop`: steps an engine for a front, which it exchanges messages with.

The front posts `Call`s; the loop sends one `Reply` to each, one `StepOutputs` for each step, and `Ended` as the
last message, which answers every open call. Between processes they are pickled: both ends are this package's, over a socket pair.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_dmc.checkpoint.tokenizer import Tokenizer
from megatron_dmc.engine.config import EngineConfig
from megatron_dmc.engine.request import Logprob, Request, RequestMetrics
from megatron_dmc.engine.sampling_params import SamplingParams
from megatron_dmc.engine.stats import EngineStats
from megatron_dmc.errors import DMCError, EngineDead, InvalidRequest, RequestFailed

if TYPE_CHECKING:
    from megatron_dmc.engine.engine import LLMEngine

logger = logging.getLogger(__name__)

_HEALTH_S = 1.0
_METHODS = ("add_request", "abort_request", "stats")


@dataclass(frozen=True)
class EngineInfo:
    """The description of an engine for its front."""

    config: EngineConfig
    """With its sizes resolved."""
    max_model_len: int
    vocab_size: int
    page_bytes: int
    """Of one page, key and value together."""
    default_sampling_params: dict[str, Any]
    tokenizer: Tokenizer | None = field(repr=False)

    @classmethod
    def of(cls, engine: "LLMEngine") -> "EngineInfo":
        """From the engine."""
        return cls(
            config=engine.config,
            max_model_len=engine.max_model_len,
            vocab_size=engine.description.vocab_size,
            page_bytes=engine.context.pool.page_bytes,
            default_sampling_params=engine.default_sampling_params,
            tokenizer=engine.tokenizer,
        )


class Call(NamedTuple):
    """A call of one of the loop's methods."""

    number: int
    method: str
    arguments: tuple


class Reply(NamedTuple):
    """The result of a call, or what it raised."""

    number: int
    result: Any = None
    error: DMCError | None = None


class Change(NamedTuple):
    """A request's new tokens, and its cache figures as in `RequestMetrics`."""

    key: int
    """The front's name of the request."""
    token_ids: list[int]
    num_cached_tokens: int
    num_entries: int
    num_pages: int
    more: "More | None"


class More(NamedTuple):
    """The part of a change that most steps do not have."""

    metrics: RequestMetrics
    finish_reason: str | None
    stop_reason: str | int | None
    error: str | None
    logprobs: list[dict[int, Logprob]] | None
    """Of the new tokens."""
    cumulative_logprob: float | None
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    """With the request's first token."""


class StepOutputs(NamedTuple):
    """The changes of all requests in one step, those of one token and nothing more as columns."""

    keys: list[int]
    token_ids: list[int]
    num_cached_tokens: list[int]
    num_entries: list[int]
    num_pages: list[int]
    others: list[Change]

    def changes(self) -> Iterator[Change]:
        """All of them."""
        figures = (self.num_cached_tokens, self.num_entries, self.num_pages)
        for key, token_id, tokens, entries, pages in zip(
            self.keys, self.token_ids, *figures, strict=True
        ):
            yield Change(key, [token_id], tokens, entries, pages, None)
        yield from self.others


class Ended(NamedTuple):
    """The engine has failed or was shut down."""

    error: EngineDead


type Message = Reply | StepOutputs | Ended


@dataclass(slots=True)
class _Sent:
    """The part of a request's output that the front has."""

    key: int
    num_tokens: int = 0
    num_preemptions: int = 0
    is_plain: bool = False
    """Whether each further token is one number: the first one is sent, and no log-probabilities are asked for."""


class EngineLoop:
    """Runs in the one thread that uses the engine.

    Args:
        send: called with every message, from that thread.
    """

    def __init__(self, engine: "LLMEngine", send: Callable[[Message], None]):
        self._engine, self._send = engine, send
        self._calls: deque[Call] = deque()
        self._condition = threading.Condition()
        self._sent: dict[str, _Sent] = {}
        self._stopping = False

    # From any thread.

    def post(self, call: Call) -> None:
        """Queue a call; it is made before the next step."""
        with self._condition:
            self._calls.append(call)
            self._condition.notify()

    def stop(self) -> None:
        """End `run` after the current step."""
        with self._condition:
            self._stopping = True
            self._condition.notify()

    # In the engine's thread.

    def run(self) -> bool:
        """Work until `stop`, or until the engine fails.

        Returns:
            False after a failure.
        """
        try:
            while self._wait_for_work():
                self._make_calls()
                self._engine.check_health()
                if self._engine.has_unfinished_requests:
                    self._deliver(self._engine.advance())
        except BaseException as e:  # callers must not wait forever, whatever it is
            logger.exception("the engine failed")
            self._send(Ended(_as_engine_dead(e)))
            return False
        self._send(Ended(EngineDead("the engine was shut down")))
        return True

    def _wait_for_work(self) -> bool:
        """Wait for calls or unfinished requests; with tensor parallelism at most `_HEALTH_S`.

        Returns:
            False after `stop`.
        """
        timeout = None if self._engine.parallel is None else _HEALTH_S
        with self._condition:
            self._condition.wait_for(
                lambda: self._stopping or self._calls or self._engine.has_unfinished_requests,
                timeout,
            )
            return not self._stopping

    def _make_calls(self) -> None:
        while self._calls:
            number, method, arguments = self._calls.popleft()
            assert method in _METHODS, method
            try:
                self._send(Reply(number, getattr(self, method)(*arguments)))
            except (InvalidRequest, RequestFailed) as e:
                # the request's own; anything else is a failure of the engine
                self._send(Reply(number, error=e))

    # Calls.

    def add_request(
        self, key: int, request_id: str, prompt: dict, params: SamplingParams, priority: int
    ) -> None:
        self._engine.add_request(request_id, prompt, params, priority=priority)
        self._sent[request_id] = _Sent(key)

    def abort_request(self, request_id: str) -> None:
        request = self._engine.abort(request_id)
        if request is not None:
            self._deliver([request])

    def stats(self) -> EngineStats:
        return self._engine.stats()

    # Outputs.

    def _deliver(self, requests: Sequence[Request]) -> None:
        """Send what has changed of requests since their last changes."""
        keys, token_ids, cached_tokens, entries, pages, others = step = StepOutputs(
            [], [], [], [], [], []
        )
        for request in requests:
            sent = self._sent.get(request.request_id)
            if sent is None:
                continue
            metrics, output = request.metrics, request.output_token_ids
            if (
                sent.is_plain and request.finish_reason is None
                and len(output) == sent.num_tokens + 1
                and metrics.num_preemptions == sent.num_preemptions
            ):  # fmt: skip
                sent.num_tokens += 1
                keys.append(sent.key)
                token_ids.append(output[-1])
                cached_tokens.append(metrics.num_cached_tokens)
                entries.append(metrics.num_entries)
                pages.append(metrics.num_pages)
            else:
                others.append(self._change(request, sent))
        if keys or others:
            self._send(step)

    def _change(self, request: Request, sent: _Sent) -> Change:
        metrics, params, start = request.metrics, request.params, sent.num_tokens
        wants_logprobs = params.logprobs is not None
        is_first = start == 0
        more = More(
            replace(metrics),
            request.finish_reason,
            request.stop_reason,
            request.error,
            request.logprobs[start:] if wants_logprobs else None,
            request.cumulative_logprob if wants_logprobs else None,
            request.prompt_logprobs if is_first and params.prompt_logprobs is not None else None,
        )
        sent.num_tokens, sent.num_preemptions = (
            len(request.output_token_ids),
            metrics.num_preemptions,
        )
        sent.is_plain = sent.num_tokens > 0 and not wants_logprobs
        if request.is_finished:
            del self._sent[request.request_id]
        return Change(
            sent.key,
            request.output_token_ids[start:],
            metrics.num_cached_tokens,
            metrics.num_entries,
            metrics.num_pages,
            more,
        )


def _as_engine_dead(error: BaseException) -> EngineDead:
    if isinstance(error, EngineDead):
        return error
    dead = EngineDead(f"the engine failed: {type(error).__name__}: {error}")
    dead.__cause__ = error
    return dead
