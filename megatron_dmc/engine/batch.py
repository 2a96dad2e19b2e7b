"""A step's work on the device, from its launch to its outputs."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from megatron_dmc.engine.chunk import Chunk
from megatron_dmc.engine.decode_batch import DecodeBatch
from megatron_dmc.engine.isolation import own_work
from megatron_dmc.engine.logit_rules import reads_last_token
from megatron_dmc.engine.output_processor import OutputProcessor
from megatron_dmc.engine.request import Request
from megatron_dmc.engine.runner import ModelRunner
from megatron_dmc.engine.sampler import Sampling
from megatron_dmc.errors import RequestFailed
from megatron_dmc.ops.tensors import take_rows, to_device

Sample = Callable[[Tensor, list[Request]], list[Sampling | RequestFailed]]
"""Starts to sample for these requests from their logits."""


@dataclass
class Batch:
    """A launched step."""

    num_single: int
    """Tokens of requests that have one."""
    num_prefilled: int
    """Tokens of the others."""
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


class Launcher:
    """Launches steps. Waits for nothing.

    Args:
        keeps_sampled: the next step may be launched before these tokens are read.
    """

    def __init__(
        self,
        runner: ModelRunner,
        sample: Sample,
        output_processor: OutputProcessor,
        *,
        keeps_sampled: bool,
    ):
        self._runner, self._sample, self._keeps_sampled = runner, sample, keeps_sampled
        self._output_processor = output_processor

    def may_launch(self, chunks: list[Chunk]) -> bool:
        """Whether the host need not know the tokens of the batch in flight before this one. It has to for
        rules that read the completion, for the key of a cached prefix that ends with such a token, and
        where a preempted request computes it with others."""
        for chunk in chunks:
            request = chunk.request
            if request.num_pending_tokens and (
                chunk.num_tokens > 1
                or reads_last_token(request)
                or self._runner.context.takes_snapshot(chunk)
            ):
                return False
        return bool(chunks)

    def launch(self, chunks: list[Chunk]) -> Batch:
        """Enqueue the work of the model and the sampler on the device."""
        offsets = [chunk.logit_offsets for chunk in chunks]
        logits_XV = self._runner.run(chunks, offsets)
        num_single = sum(chunk.num_tokens == 1 for chunk in chunks)
        batch = Batch(num_single, sum(chunk.num_tokens for chunk in chunks) - num_single)
        sample_rows: list[int] = []
        row = 0
        for chunk, of_chunk in zip(chunks, offsets, strict=True):
            request, first, row = chunk.request, row, row + len(of_chunk)
            end = row
            if of_chunk and (request.params.prompt_logprobs is None or chunk.samples):
                batch.sampling.append(request)
                end -= 1
                sample_rows.append(end)
            if end > first:
                logits, start = logits_XV[first:end], chunk.start + of_chunk[0]
                batch.begin_prompt_logprobs(self._output_processor, request, start, logits)
            request.num_computed_tokens = chunk.start + chunk.num_tokens
        if batch.sampling:
            self._sample_all(batch, take_rows(logits_XV, sample_rows))
        return batch

    def decode(self, decode: DecodeBatch) -> Batch:
        """`launch` of a step in which requests decode one token each."""
        logits_BV = self._runner.decode(decode)
        decode.launched()
        batch = Batch(len(decode.requests), 0, decode.requests)
        self._sample_all(batch, logits_BV, decode)
        return batch

    def _sample_all(
        self, batch: Batch, logits_BV: Tensor, decode: DecodeBatch | None = None
    ) -> None:
        batch.sampled = self._sample(logits_BV, batch.sampling)
        for request in batch.sampling:
            request.num_pending_tokens += 1
        if self._keeps_sampled:
            device = self._runner.device
            for part in batch.sampled:
                if isinstance(part, Sampling):
                    if decode is not None and part.requests is decode.requests:
                        rows_B = decode.rows_on(device)
                    else:
                        rows_B = to_device([request.row for request in part.requests], device)
                    self._runner.keep_sampled(part.token_ids_B, rows_B)
