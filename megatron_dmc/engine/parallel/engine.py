"""The engine of one tensor-parallel rank.

Rank 0 is called like any engine, and sends its calls to the other ranks, which `follow`. All ranks compute one
schedule; rank 0 samples and sends the tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from megatron_dmc.engine.engine import LLMEngine
from megatron_dmc.engine.parallel.group import Command, TensorParallel
from megatron_dmc.engine.request import Request, RequestOutput
from megatron_dmc.engine.sampler import Sampled, Sampling
from megatron_dmc.engine.sampling_params import SamplingParams
from megatron_dmc.errors import EngineDead, RequestFailed


class TensorParallelEngine(LLMEngine):
    """`LLMEngine` on every rank. After a failure of any rank it raises `EngineDead` from every call."""

    parallel: TensorParallel

    def __init__(self, *arguments: Any, parallel: TensorParallel, **keywords: Any):
        super().__init__(*arguments, parallel=parallel, **keywords)
        self._leads = parallel.rank == 0
        self._unsent: list[Command] = []
        self._dead: EngineDead | None = None
        self._failed_here: set[str] = set()

    def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int] | dict,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
    ) -> None:
        self._check_alive()
        super().add_request(request_id, prompt, params, priority=priority)
        self._queue("add_request", request_id, prompt, params, priority=priority)

    def abort_request(self, request_id: str) -> RequestOutput | None:
        if request_id in self._requests:
            self._queue("abort_request", request_id)
        return super().abort_request(request_id)

    def step(self) -> list[RequestOutput]:
        """See `LLMEngine.step`.

        Raises:
            EngineDead: another rank is lost, or the step failed.
        """
        return self._with_other_ranks("step", super().step)

    def advance(self) -> list[Request]:
        """See `LLMEngine.advance`. Errors as `step`."""
        return self._with_other_ranks("advance", super().advance)

    def _with_other_ranks[T](self, name: str, step: Callable[[], T]) -> T:
        if not self._leads:
            if self._failed_here:
                raise RuntimeError(
                    f"requests failed on this rank alone: {sorted(self._failed_here)}"
                )
            return step()
        self._check_alive()
        try:
            self._queue(name)
            self._send()
            return step()
        except BaseException as error:
            dead = self._end(self.parallel.monitor.diagnose(error))
            if dead is error or not isinstance(error, Exception):
                raise
            raise dead from error

    def follow(self) -> None:
        """On ranks other than 0: make rank 0's calls, until it calls `close`.

        Raises:
            EngineDead: rank 0 or another rank is lost.
        """
        assert not self._leads, "rank 0 leads"
        try:
            while True:
                for name, arguments, keywords in self.parallel.receive():
                    if name == "close":
                        return
                    getattr(self, name)(*arguments, **keywords)
        except RuntimeError as error:
            raise self.parallel.monitor.diagnose(error) from error

    def close(self) -> None:
        """On rank 0: return the other ranks' `follow`."""
        if self._leads and self._dead is None:
            self._queue("close")
            self._send()
            self._dead = EngineDead("the engine was closed")
            self.parallel.close()

    def check_health(self) -> None:
        self._check_alive()
        try:
            self.parallel.monitor.check()
        except EngineDead as error:
            self._end(error)
            raise

    def fail_request(self, request_id: str) -> None:
        """End a request that failed on rank 0, whether or not it failed here."""
        self._failed_here.discard(request_id)
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, "error", None)
            self._forget(request)

    def _sample(self, logits_BV: Tensor, requests: list[Request]) -> list[Sampling | RequestFailed]:
        """On ranks other than 0 nothing is sampled."""
        return super()._sample(logits_BV, requests) if self._leads else []

    def _read(self, sampled: list[Sampling | RequestFailed]) -> list[Sampled]:
        read = super()._read
        return self.parallel.from_first(lambda: read(sampled))

    def _fail(self, request: Request, error: RequestFailed) -> None:
        super()._fail(request, error)
        if not self._leads:
            self._failed_here.add(request.request_id)
        self._queue("fail_request", request.request_id)

    def _output(self, request: Request) -> RequestOutput | Any:
        """On ranks other than 0 outputs are not built."""
        return super()._output(request) if self._leads else None

    def _end(self, error: BaseException) -> EngineDead:
        """Kill the other ranks: after a failure they are no longer in the same step."""
        if not isinstance(error, EngineDead):
            error = EngineDead(f"the engine failed: {type(error).__name__}: {error}")
        self._dead = error
        self.parallel.abandon()
        return error

    def _queue(self, name: str, *arguments: Any, **keywords: Any) -> None:
        """On rank 0: send a call to the other ranks with the next step."""
        if self._leads:
            self._unsent.append(Command(name, arguments, keywords))

    def _send(self) -> None:
        self.parallel.send(self._unsent)
        self._unsent = []

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise self._dead
