"""A step's work on the device, from its launch to its outputs."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from megatron_dmc.engine.isolation import own_work
from megatron_dmc.engine.output_processor import OutputProcessor
from megatron_dmc.engine.request import Request
from megatron_dmc.engine.sampler import Sampling
from megatron_dmc.errors import RequestFailed


@dataclass
class Batch:
    """A launched step."""

    sizes: list[int]
    """Tokens of each request."""
    sampling: list[Request] = field(default_factory=list)
    """Requests whose tokens so far are all computed."""
    sampled: list[Sampling | RequestFailed] = field(default_factory=list)
    """Their next tokens: those of all requests together, or of each alone."""
    prompt_logprobs: list[tuple[Request, Callable[[], None]]] = field(default_factory=list)
    """Requests whose prompt's log-probabilities are being copied, and what waits for them and records them."""
    failed: dict[Request, RequestFailed] = field(default_factory=dict)
    """Requests whose own work failed."""

    def begin_prompt_logprobs(
        self, processor: OutputProcessor, request: Request, start: int, logits_XV: Tensor
    ) -> None:
        """Start to copy the log-probabilities of prompt tokens; row x of the logits predicts token
        `start + x + 1`."""
        try:
            with own_work(request.request_id):
                record = processor.begin_prompt_logprobs(request, start, logits_XV)
                self.prompt_logprobs.append((request, record))
        except RequestFailed as error:
            self.failed[request] = error

    def record_prompt_logprobs(self) -> dict[Request, RequestFailed]:
        """Wait for them and record them. Returns the requests whose own work failed and that have not ended."""
        for request, record in self.prompt_logprobs:
            if request.is_finished:
                continue
            try:
                with own_work(request.request_id):
                    record()
            except RequestFailed as error:
                self.failed[request] = error
        return {request: error for request, error in self.failed.items() if not request.is_finished}
