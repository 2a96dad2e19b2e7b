"""An engine without a model, for benchmarks of the server."""

import mmap
import time
from types import SimpleNamespace
from typing import Any

from megatron_dmc.checkpoint.tokenizer import load_tokenizer
from megatron_dmc.engine.config import EngineConfig
from megatron_dmc.engine.input_processor import InputProcessor
from megatron_dmc.engine.output_processor import OutputProcessor
from megatron_dmc.engine.request import Request, RequestStatus
from megatron_dmc.engine.sampling_params import SamplingParams

_TEXT = "    def append(self, token_id: int) -> None:\n        self.tokens.append(token_id)\n\n"
_MAX_MODEL_LEN = 2**20
_POLL_S = 0.0005


class Progress:
    """A number that two processes share.

    Args:
        file: of at least eight bytes.
    """

    def __init__(self, file: str):
        with open(file, "r+b") as opened:
            self._memory = mmap.mmap(opened.fileno(), 8)

    @property
    def count(self) -> int:
        """The number."""
        return int.from_bytes(self._memory[:8], "little")

    @count.setter
    def count(self, count: int) -> None:
        self._memory[:8] = count.to_bytes(8, "little")


class StubEngine:
    """Gives every request the next token of a text in each step. It has the interface of `LLMEngine` that
    `EngineLoop` uses.

    A step begins when the client has the tokens of the one before, or `step_s` after it.

    Args:
        tokenizer: its folder.
        progress: of the client.
    """

    parallel = None

    def __init__(self, tokenizer: str, step_s: float, progress: str):
        self.tokenizer, self._step_s = load_tokenizer(tokenizer), step_s
        self._progress, self._num_sent = Progress(progress), 0
        self.config = EngineConfig(num_pages=1, max_model_len=_MAX_MODEL_LEN)
        self.max_model_len = _MAX_MODEL_LEN
        self.description = SimpleNamespace(vocab_size=self.tokenizer.vocab_size)
        self.context = SimpleNamespace(pool=SimpleNamespace(page_bytes=1))
        self.default_sampling_params: dict[str, Any] = {}
        self._input = InputProcessor(
            self.tokenizer, vocab_size=self.tokenizer.vocab_size, max_model_len=_MAX_MODEL_LEN,
            default_sampling_params={}, records_decisions=False,
        )  # fmt: skip
        self._output = OutputProcessor(self.tokenizer, None, frozenset())
        self._token_ids = self.tokenizer.encode(_TEXT)
        self._requests: dict[str, Request] = {}
        self._due = 0.0

    def add_request(
        self, request_id: str, prompt: Any, params: SamplingParams | None, *, priority: int = 0
    ) -> None:
        """See `LLMEngine.add_request`."""
        request = self._input.request(request_id, 0, prompt, params, priority)
        self._output.add(request)
        self._requests[request_id] = request

    def abort(self, request_id: str) -> Request | None:
        """See `LLMEngine.abort`."""
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, "abort")
        return request

    @property
    def has_unfinished_requests(self) -> bool:
        """See `LLMEngine.has_unfinished_requests`."""
        return bool(self._requests)

    def advance(self) -> list[Request]:
        """See `LLMEngine.advance`."""
        while self._progress.count < self._num_sent and time.monotonic() < self._due:
            time.sleep(_POLL_S)
        self._due = time.monotonic() + self._step_s
        self._num_sent = self._progress.count + len(self._requests)
        requests = list(self._requests.values())
        for request in requests:
            token_id = self._token_ids[len(request.output_token_ids) % len(self._token_ids)]
            ending = self._output.append(request, token_id)
            if ending is not None:
                self._finish(request, ending.finish_reason)
        return requests

    def check_health(self) -> None:
        """See `LLMEngine.check_health`."""

    def close(self) -> None:
        """See `LLMEngine.close`."""

    def _finish(self, request: Request, reason: str) -> None:
        request.status, request.finish_reason = RequestStatus.FINISHED, reason
        self._output.forget(request)
        del self._requests[request.request_id]
