"""The engine: requests in, tokens out, one step at a time."""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.checkpoint.tokenizer import as_tokenizer
from megatron_dmc.engine.chunk import Chunk
from megatron_dmc.engine.config import EngineConfig
from megatron_dmc.engine.context import PagedContext
from megatron_dmc.engine.input_processor import InputProcessor
from megatron_dmc.engine.isolation import ends_engine, own_work
from megatron_dmc.engine.output_processor import OutputProcessor, output_of
from megatron_dmc.engine.parallel.group import TensorParallel
from megatron_dmc.engine.request import Request, RequestOutput
from megatron_dmc.engine.rule import check_combinations, compression_rule
from megatron_dmc.engine.runner import ModelRunner, device_of_weights
from megatron_dmc.engine.sampler import SampledToken, Sampler
from megatron_dmc.engine.sampling_params import SamplingParams
from megatron_dmc.engine.scheduler import Scheduler
from megatron_dmc.engine.sizes import resolve_sizes
from megatron_dmc.engine.stats import EngineStats, StatsCollector
from megatron_dmc.errors import InvalidRequest, RequestFailed
from megatron_dmc.ops.paged.kv_pages import parse_kv_cache_dtype
from megatron_dmc.ops.tensors import take_rows

logger = logging.getLogger(__name__)


@dataclass
class Batch:
    """A step's work on the device, from its launch to its outputs."""

    chunks: list[Chunk]
    sizes: list[int]
    """Tokens of each chunk."""
    logit_offsets: list[list[int]]
    """Positions in each chunk whose logits are wanted."""
    logits_XV: Tensor
    """Their logits, all chunks' in order."""


class LLMEngine:
    """Generates for many requests at a time with continuous batching over a paged cache.

    Args:
        model: Megatron's GPTModel whose attention calls `PagedContext.attend`.
        description: `num_layers, num_query_groups, kv_channels, vocab_size,
            max_position_embeddings, dmc`.
        tokenizer: see `as_tokenizer`; None: token ids only, no texts.
        config: settings; those about loading a model have no effect here.
        dtype: the model's. The cache and all computation are where its weights are.
        eos_id: end-of-text token; default: the tokenizer's.
        further_eos_ids: other tokens that end a completion, as models with several kinds of turns have.
        default_sampling_params: arguments of the `SamplingParams` of requests that bring none.
        parallel: this tensor-parallel rank, whose share of the heads `model` has; for
            `TensorParallelEngine`.
        make_context: called like `PagedContext`; for benchmarks, whose contexts override
            `begin_step` and `attend`.
    """

    def __init__(
        self,
        model: Any,
        description: Any,
        tokenizer: Any | None,
        config: EngineConfig,
        *,
        dtype: torch.dtype,
        eos_id: int | None = None,
        further_eos_ids: Collection[int] = (),
        default_sampling_params: dict[str, Any] | None = None,
        parallel: TensorParallel | None = None,
        make_context: Callable[..., PagedContext] = PagedContext,
    ):
        device = device_of_weights(model, config.device)
        config = resolve_sizes(config, description, dtype=dtype, device=device, parallel=parallel)
        assert config.num_pages is not None and config.max_model_len is not None
        rule = compression_rule(description.dmc, config.enable_dmc)
        check_combinations(config, rule)
        self.config, self.description, self.parallel = config, description, parallel
        self.tokenizer = tokenizer = as_tokenizer(tokenizer)
        self.default_sampling_params = default_sampling_params or {}
        counts = config.count_flipped_decisions
        self.context = make_context(
            num_layers=description.num_layers,
            num_kv_heads=description.num_query_groups // (1 if parallel is None else parallel.size),
            head_dim=description.kv_channels,
            num_pages=config.num_pages,
            page_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            dtype=dtype,
            cache_dtype=parse_kv_cache_dtype(config.kv_cache_dtype),
            device=device,
            rule=rule,
            poison=config.poison,
            prefix_block_size=config.prefix_block_size if config.enable_prefix_caching else None,
            count_flips=dtype.itemsize <= 2 if counts is None else counts,
            num_ranks=1 if parallel is None else parallel.size,
            exchange=None if parallel is None else parallel.exchange,
            rank=0 if parallel is None else parallel.rank,
            sum_over_ranks=None if parallel is None else parallel.sum,
            budget_rule=config.budget_rule,
        )
        self.runner = ModelRunner(
            model,
            self.context,
            vocab_size=description.vocab_size,
            device=device,
            gather=None if parallel is None else parallel.gather_logits,
        )
        if device.type == "cuda" and not config.enforce_eager:
            self.runner.capture_on_gpu(
                config.capture_sizes(), progress=parallel is None or parallel.rank == 0
            )
        self.scheduler = Scheduler(
            self.context,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            scheduling_policy=config.scheduling_policy,
            priority_reach=config.priority_reach,
        )
        self.eos_id = tokenizer.eos_id if eos_id is None and tokenizer is not None else eos_id
        self.eos_ids = frozenset(
            i
            for i in (self.eos_id, *further_eos_ids)
            if i is not None and 0 <= i < description.vocab_size
        )
        self.sampler = Sampler(config.seed, self.eos_ids)
        self.input_processor = InputProcessor(
            tokenizer,
            vocab_size=description.vocab_size,
            max_model_len=config.max_model_len,
            default_sampling_params=self.default_sampling_params,
            records_decisions=self.context.flips is not None,
        )
        self.output_processor = OutputProcessor(tokenizer, self.eos_id, self.eos_ids)
        self._stats = StatsCollector(
            self.context,
            self.scheduler,
            num_layers=description.num_layers,
            num_kv_heads=description.num_query_groups,
            plain_entry_bytes=2 * description.kv_channels * dtype.itemsize,
        )
        self._requests: dict[str, Request] = {}
        self._num_added = 0

    # Requests.

    def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int] | dict,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
    ) -> None:
        """Queue a request.

        Args:
            prompt: see `read_prompt`; in a dict, `"cache_salt"` limits the sharing of cached prefixes to
                requests with the same salt.
            params: copied and checked, so later changes of it have no effect; default:
                `default_sampling_params`.
            priority: lower goes first; only with the scheduling policy "priority".

        Raises:
            InvalidRequest: it can never run; nothing is queued then.
            RequestFailed: its tokenizer or another part of its own work raised something else; nothing
                is queued then either.
        """
        if request_id in self._requests:
            raise InvalidRequest(f"request {request_id}: this id is in use; choose another")
        with own_work(request_id):
            request = self.input_processor.request(
                request_id, self._num_added, prompt, params, priority
            )
            self.output_processor.add(request)
            try:
                self.scheduler.add(request)
            except BaseException:
                self.output_processor.forget(request)
                raise
        self._num_added += 1
        self._requests[request_id] = request

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """End a request and release its pages. None if it is unknown or has finished."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._finish(request, "abort", None)
        output = self._output(request)
        self._forget(request)
        return output

    @property
    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished_requests

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and completion together."""
        return self.scheduler.max_model_len

    # A step.

    def step(self) -> list[RequestOutput]:
        """Compute one batch: schedule, run, sample, postprocess, collect.

        Returns:
            outputs of every request that got a token or ended. A request whose own work fails ends with
            finish_reason "error"; the others continue.
        """
        began = time.perf_counter()
        schedule = self.scheduler.schedule()
        if not schedule.chunks:
            assert not self.has_unfinished_requests or schedule.preempted, (
                "nothing can be scheduled"
            )
            return []
        batch = self._run(schedule.chunks)
        results = self._sample(batch)
        changed = self._postprocess(results)
        outputs = self._collect(changed)
        self._stats.step_finished(batch.sizes, time.perf_counter() - began)
        return outputs

    def _run(self, chunks: list[Chunk]) -> Batch:
        """Enqueue the model's work on the device."""
        self._stats.step_scheduled(chunks)
        sizes = [chunk.num_tokens for chunk in chunks]
        offsets = [chunk.logit_offsets for chunk in chunks]
        return Batch(chunks, sizes, offsets, self.runner.run(chunks, offsets))

    def _sample(self, batch: Batch) -> list[tuple[Request, SampledToken | RequestFailed]]:
        """Wait for the device. A token for each request whose known tokens are all computed, and an error
        for each one that failed before it got that far."""
        sampling: list[Request] = []
        sample_rows: list[int] = []
        failed: list[tuple[Request, SampledToken | RequestFailed]] = []
        row = 0
        for chunk, offsets in zip(batch.chunks, batch.logit_offsets, strict=True):
            request = chunk.request
            rows = list(range(row, row + len(offsets)))
            row += len(offsets)
            sample_row = rows.pop() if chunk.samples else None
            try:
                if rows:
                    with own_work(request.request_id):
                        logits = take_rows(batch.logits_XV, rows)
                        start = chunk.start + offsets[0]
                        self.output_processor.add_prompt_logprobs(request, start, logits)
                if sample_row is not None:
                    sampling.append(request)
                    sample_rows.append(sample_row)
            except RequestFailed as error:
                failed.append((request, error))
            request.num_computed_tokens = chunk.end
        tokens = []
        if sampling:
            tokens = self._sample_tokens(take_rows(batch.logits_XV, sample_rows), sampling)
        # the device is done: reading the entry counts does not wait
        self.context.update_counts()
        self._stats.step_computed()
        return [*zip(sampling, tokens, strict=True), *failed]

    def _sample_tokens(
        self, logits_BV: Tensor, requests: list[Request]
    ) -> list[SampledToken | RequestFailed]:
        """Sample for all requests together. If that raises, sample for each alone, to find the one at fault;
        a row's token does not depend on the others."""
        try:
            return self.sampler.sample(logits_BV, requests)
        except BaseException as error:
            if ends_engine(error):
                raise
        sampled: list[SampledToken | RequestFailed] = []
        for b, request in enumerate(requests):
            try:
                with own_work(request.request_id):
                    sampled += self.sampler.sample(logits_BV[b : b + 1], [request])
            except RequestFailed as error:
                sampled.append(error)
        return sampled

    def _postprocess(
        self, results: list[tuple[Request, SampledToken | RequestFailed]]
    ) -> list[Request]:
        """Append the tokens, and end the requests that are done or have failed. Returns all of them."""
        failed: list[tuple[Request, RequestFailed]] = []
        for request, token in results:
            try:
                if isinstance(token, RequestFailed):
                    raise token
                self._stats.token_generated()
                with own_work(request.request_id):
                    ending = self.output_processor.append(request, token)
                if ending is not None:
                    self._finish(request, *ending)
            except RequestFailed as error:
                failed.append((request, error))
        for request, failure in failed:
            self._fail(request, failure)
        return [request for request, _ in results]

    def _collect(self, changed: list[Request]) -> list[RequestOutput]:
        outputs = []
        for request in changed:
            outputs.append(self._output(request))
            if request.is_finished:
                self._forget(request)
        return outputs

    # The end of a request.

    def _finish(self, request: Request, finish_reason: str, stop_reason: str | int | None) -> None:
        self._stats.request_finished(request)
        self.scheduler.finish(request)
        request.finish_reason, request.stop_reason = finish_reason, stop_reason
        request.metrics.finished_time = time.monotonic()

    def _fail(self, request: Request, error: RequestFailed) -> None:
        """End a request, unless it has ended, because of its own work."""
        logger.error("%s", error, exc_info=error.__cause__)
        if not request.is_finished:
            self._finish(request, "error", None)
        request.finish_reason, request.stop_reason = "error", None
        request.error = str(error)

    def _forget(self, request: Request) -> None:
        self.sampler.forget(request)
        self.output_processor.forget(request)
        del self._requests[request.request_id]

    def _output(self, request: Request) -> RequestOutput:
        self._stats.update_metrics(request)
        text = ""
        if request.error is None:
            try:
                with own_work(request.request_id):
                    text = self.output_processor.text(request)
            except RequestFailed as error:
                self._fail(request, error)
        return output_of(request, text)

    # The engine as a whole.

    def stats(self) -> EngineStats:
        """Figures so far."""
        return self._stats.collect()

    def lengths(self, request_id: str) -> list[list[int]] | None:
        """Entries of each layer's KV heads of a running request; None if it does not run."""
        request = self._requests.get(request_id)
        if request is None or request.row is None:
            return None
        return self.context.tables.entries(request.row).tolist()

    def check_integrity(self) -> None:
        """Verify that every page is free, or held by exactly those who name it.

        Raises:
            AssertionError: if not.
        """
        prefixes = self.context.prefixes
        self.context.tables.check_integrity(None if prefixes is None else prefixes.page_ids())

    def check_health(self) -> None:
        """Verify that the processes of the engine are running.

        Raises:
            EngineDead: with tensor parallelism: a rank is lost.
        """

    def close(self) -> None:
        """End the other ranks of tensor parallelism."""
