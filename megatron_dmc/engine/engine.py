"""The engine: requests in, tokens out, one step at a time."""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.checkpoint.tokenizer import as_tokenizer
from megatron_dmc.engine.batch import Batch, Launcher
from megatron_dmc.engine.config import EngineConfig
from megatron_dmc.engine.context import PagedContext
from megatron_dmc.engine.input_processor import InputProcessor
from megatron_dmc.engine.isolation import failure_of, own_work
from megatron_dmc.engine.output_processor import OutputProcessor, output_of
from megatron_dmc.engine.parallel.group import TensorParallel
from megatron_dmc.engine.request import Request, RequestOutput, RequestStatus
from megatron_dmc.engine.rule import check_combinations, compression_rule
from megatron_dmc.engine.runner import ModelRunner, device_of_weights
from megatron_dmc.engine.sampler import Sampled, Sampler, Sampling
from megatron_dmc.engine.sampling_params import SamplingParams
from megatron_dmc.engine.scheduler import Scheduler
from megatron_dmc.engine.sizes import resolve_sizes
from megatron_dmc.engine.stats import EngineStats, StatsCollector
from megatron_dmc.errors import InvalidRequest, RequestFailed
from megatron_dmc.ops.paged.kv_pages import parse_kv_cache_dtype

logger = logging.getLogger(__name__)


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
        assert config.max_num_seqs is not None
        rule = compression_rule(description.dmc, config.enable_dmc)
        check_combinations(config, rule)
        self.config, self.description, self.parallel = config, description, parallel
        self._is_async = config.async_scheduling
        if self._is_async is None:
            self._is_async = device.type == "cuda" and parallel is None
        self.tokenizer = tokenizer = as_tokenizer(tokenizer)
        self.default_sampling_params = default_sampling_params or {}
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
            count_flips=config.count_flipped_decisions,
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
            reads_sampled=self._is_async,
        )
        if config.enforce_eager:
            self.context.recorder = None
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
        self._launcher = Launcher(
            self.runner, self._sample, self.output_processor, keeps_sampled=self._is_async
        )
        self._requests: dict[str, Request] = {}
        self._num_added = 0
        self._in_flight: Batch | None = None
        self._began = self._carried_seconds = 0.0

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

    def abort(self, request_id: str) -> Request | None:
        """`abort_request` without an output: the request itself."""
        request = self._requests.get(request_id)
        self.abort_request(request_id)
        return request

    @property
    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished_requests

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and completion together."""
        return self.scheduler.max_model_len

    # A step.

    def step(self) -> list[RequestOutput]:
        """Compute one batch and report.

        With asynchronous scheduling the tokens read are those of the batch that was launched by the call
        before, while the device computes the new one. A token that turns out to follow the end of its
        request is dropped.

        Returns:
            outputs of every request that got a token or ended. A request whose own work fails ends with
            finish_reason "error"; the others continue.
        """
        changed = self._step()
        self._stats.update_metrics(changed)
        outputs = [self._output(request) for request in changed]
        self._forget_finished(changed)
        return outputs

    def advance(self) -> list[Request]:
        """As `step`, without outputs and their texts: the requests themselves."""
        changed = self._step()
        self._stats.update_metrics(changed)
        self._forget_finished(changed)
        return changed

    def _step(self) -> list[Request]:
        """Schedule and launch a batch, then read tokens and append them. Returns the requests that got one or
        ended."""
        self._began = time.perf_counter() - self._carried_seconds
        schedule = self.scheduler.schedule()
        chunks, decode, landing = schedule.chunks, schedule.decode, self._in_flight
        assert (
            decode or chunks or landing or schedule.preempted or not self.has_unfinished_requests
        ), "nothing can be scheduled"
        changed: list[Request] = []
        launched = None
        if decode is not None:
            launched = self._launcher.decode(decode)
        else:
            if landing is not None and not self._launcher.may_launch(chunks):
                changed, landing = self._land(landing), None
                chunks = [chunk for chunk in chunks if not chunk.request.is_finished]
            if chunks:
                self._stats.step_scheduled(chunks)
                launched = self._launcher.launch(chunks)
        if not self._is_async:
            landing, launched = launched, None
        if landing is not None:
            changed = self._land(landing, num_behind=0 if launched is None else 1)
        self._in_flight = launched
        self._carried_seconds = time.perf_counter() - self._began
        return changed

    def _sample(self, logits_BV: Tensor, requests: list[Request]) -> list[Sampling | RequestFailed]:
        return self.sampler.sample_all(logits_BV, requests)

    def _read(self, sampled: list[Sampling | RequestFailed]) -> list[Sampled]:
        """Wait for the tokens: the only wait for the device in a step."""
        tokens: list[Sampled] = []
        for part in sampled:
            tokens += [part] if isinstance(part, RequestFailed) else part.read()
        return tokens

    def _land(self, batch: Batch, *, num_behind: int = 0) -> list[Request]:
        """Read a batch's tokens, append them, and end the requests that are done or have failed.

        Args:
            num_behind: batches launched after it.

        Returns:
            the requests that got a token, ended, or failed.
        """
        tokens = self._read(batch.sampled) if batch.sampling else []
        # the device is done with this batch: its entry counts are there
        self.context.land(keep=num_behind)
        self._stats.step_computed()
        failed = batch.record_prompt_logprobs()
        changed: list[Request] = []
        for request, token in zip(batch.sampling, tokens, strict=True):
            request.num_pending_tokens -= 1
            if request.status is RequestStatus.FINISHED or (failed and request in failed):
                continue
            changed.append(request)
            try:
                if isinstance(token, RequestFailed):
                    raise token
                ending = self.output_processor.append(request, token)
            except BaseException as error:  # noqa: BLE001 - it ends this request alone
                failed[request] = failure_of(request.request_id, error)
                continue
            if ending is not None:
                self._finish(request, *ending)
        num_failed = sum(request in failed for request in changed) if failed else 0
        self._stats.tokens_generated(len(changed) - num_failed)
        if failed:
            for request, failure in failed.items():
                self._fail(request, failure)
            changed = list(dict.fromkeys([*changed, *failed]))
        began, self._began = self._began, time.perf_counter()
        self._stats.step_finished(batch.num_single, batch.num_prefilled, self._began - began)
        return changed

    def _forget_finished(self, changed: list[Request]) -> None:
        for request in changed:
            if request.status is RequestStatus.FINISHED:
                self._forget(request)

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
        text = ""
        if request.error is None:
            try:
                text = self.output_processor.text(request)
            except BaseException as error:  # noqa: BLE001 - it ends this request alone
                self._fail(request, failure_of(request.request_id, error))
        return output_of(request, text)

    # The engine as a whole.

    def stats(self) -> EngineStats:
        """Figures so far."""
        return self._stats.collect()

    def lengths(self, request_id: str) -> list[list[int]] | None:
        """Entries of each layer's KV heads of a running request; None if it does not run. Waits for the
        device."""
        request = self._requests.get(request_id)
        if request is None or request.row is None:
            return None
        self.context.update_counts()
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
