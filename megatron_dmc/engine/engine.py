"""The engine: requests go in, tokens come out, one step at a time.

Dimension letters: L layers, G key/value heads.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_dmc.checkpoint.tokenizer import as_tokenizer
from megatron_dmc.engine.config import EngineConfig
from megatron_dmc.engine.context import PagedContext
from megatron_dmc.engine.decision_record import DecisionRecord
from megatron_dmc.engine.detokenizer import IncrementalDetokenizer, find_stop
from megatron_dmc.engine.isolation import ends_engine, own_work
from megatron_dmc.engine.logit_rules import bad_words_token_ids, check_token_ids
from megatron_dmc.engine.outputs import output_of, visible_text
from megatron_dmc.engine.parallel.group import Command, TensorParallel
from megatron_dmc.engine.prompts import read_cache_salt, read_prompt
from megatron_dmc.engine.request import Request, RequestOutput, RequestStatus
from megatron_dmc.engine.rule import check_combinations, compression_rule
from megatron_dmc.engine.runner import ModelRunner, device_of_weights
from megatron_dmc.engine.sampler import SampledToken, Sampler, token_logprobs
from megatron_dmc.engine.sampling_params import SamplingParams
from megatron_dmc.engine.scheduler import ScheduledChunk, Scheduler
from megatron_dmc.engine.sizes import resolve_sizes
from megatron_dmc.engine.stats import Counters, EngineStats
from megatron_dmc.errors import EngineDead, InvalidRequest, RequestFailed
from megatron_dmc.ops.paged.kv_pages import parse_kv_cache_dtype
from megatron_dmc.ops.tensors import take_rows

logger = logging.getLogger(__name__)


_METHODS = {"step": "_step", "fail_request": "_failed_on_rank_0"}
"""What the other ranks call where rank 0 is called something else."""


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
        further_eos_ids: tokens that end an answer too, as models of several kinds of turns have them.
        default_sampling_params: arguments of the `SamplingParams` of requests that bring none.
        parallel: this rank of several; `model` has its share of the heads. Rank 0 is called as ever, the
            others call `follow`.
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
        num_ranks = 1 if parallel is None else parallel.size
        heads_per_rank = description.num_query_groups // num_ranks
        config = resolve_sizes(config, description, dtype=dtype, device=device, parallel=parallel)
        assert config.num_pages is not None and config.max_model_len is not None
        rule = compression_rule(description.dmc, config.enable_dmc)
        check_combinations(config, rule)
        has_ring = rule is not None and rule.has_ring
        self.config, self.description = config, description
        self.tokenizer = tokenizer = as_tokenizer(tokenizer)
        self.parallel, self._dtype = parallel, dtype
        self.eos_id = tokenizer.eos_id if eos_id is None and tokenizer is not None else eos_id
        self.eos_ids = frozenset(
            i
            for i in (self.eos_id, *further_eos_ids)
            if i is not None and 0 <= i < description.vocab_size
        )
        self.default_sampling_params = default_sampling_params or {}
        counts = config.count_flipped_decisions
        self._counts_flips = not has_ring and (dtype.itemsize <= 2 if counts is None else counts)
        self.context = make_context(
            num_layers=description.num_layers,
            num_kv_heads=heads_per_rank,
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
            count_flips=self._counts_flips,
            num_ranks=num_ranks,
            exchange=None if parallel is None else parallel.exchange,
            rank=0 if parallel is None else parallel.rank,
            sum_over_ranks=None if parallel is None else parallel.sum,
            eviction=config.eviction,
        )
        self.runner = ModelRunner(
            model,
            self.context,
            vocab_size=description.vocab_size,
            device=device,
            gather=None if parallel is None else parallel.gather_logits,
        )
        # the rings' PyTorch selects by masks, which a graph cannot
        eager = config.enforce_eager or has_ring or config.cache_policy is not None
        if device.type == "cuda" and not eager:
            self.runner.capture_on_gpu(
                config.capture_sizes(), progress=parallel is None or parallel.rank == 0
            )
        self.scheduler = Scheduler(
            self.context,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            policy=config.scheduling_policy,
            priority_reach=config.priority_reach,
        )
        self.sampler = Sampler(config.seed, self.eos_ids)
        self._requests: dict[str, Request] = {}
        self._detokenizers: dict[str, IncrementalDetokenizer] = {}
        self._unsent: list[Command] = []
        self._lost: EngineDead | None = None
        self._failed_here: set[str] = set()
        self._num_added = 0
        self._counters = Counters(description.num_layers, description.num_query_groups)

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
            prompt: see `read_prompt`; a dict's `"cache_salt"` names those who share cached prefixes.
            params: copied and checked anew, later changes of it have no effect; default:
                `default_sampling_params`.
            priority: lower goes first; only with the scheduling policy "priority".

        Raises:
            InvalidRequest: it can never run; nothing is queued then.
            RequestFailed: its tokenizer or another part of its own work raised something else; nothing
                is queued then either.
        """
        self._check_alive()
        if request_id in self._requests:
            raise InvalidRequest(f"request {request_id}: this id is in use; choose another")
        with own_work(request_id):
            request, detokenizer = self._prepare(request_id, prompt, params, priority)
            self.scheduler.add(request)
        self._tell("add_request", request_id, prompt, params, priority=priority)
        self._num_added += 1
        self._requests[request_id] = request
        if detokenizer is not None:
            self._detokenizers[request_id] = detokenizer

    def _prepare(
        self,
        request_id: str,
        prompt: str | Sequence[int] | dict,
        params: SamplingParams | None,
        priority: int,
    ) -> tuple[Request, IncrementalDetokenizer | None]:
        """A checked request. Changes nothing."""
        if params is None:
            params = SamplingParams(**self.default_sampling_params)
        else:
            params = dataclasses.replace(params)
        if not isinstance(priority, int) or isinstance(priority, bool):
            raise InvalidRequest(f"request {request_id}: priority={priority!r}: use a whole number")
        text, token_ids = read_prompt(
            request_id, prompt, self.tokenizer, self.description.vocab_size
        )
        if params.stop and self.tokenizer is None:
            raise InvalidRequest(
                f"request {request_id}: stop={params.stop!r} needs a tokenizer; use stop_token_ids"
            )
        check_token_ids(request_id, params, self.description.vocab_size)
        room = self.max_model_len - len(token_ids)
        new = room if params.max_tokens is None else min(params.max_tokens, room)
        request = Request(
            request_id=request_id,
            number=self._num_added,
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            max_total_tokens=len(token_ids) + new,
            priority=priority,
            cache_salt=read_cache_salt(request_id, prompt),
            bad_words_token_ids=bad_words_token_ids(request_id, params, self.tokenizer),
            decisions=DecisionRecord() if self._counts_flips else None,
            prompt_logprobs=[None] * min(params.prompt_logprobs_start, len(token_ids)),
        )
        detokenizer = None
        if self.tokenizer is not None:
            detokenizer = IncrementalDetokenizer(
                self.tokenizer, token_ids, skip_special_tokens=params.skip_special_tokens
            )
        return request, detokenizer

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """End a request and give back its pages. None if it is unknown or has finished."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._tell("abort_request", request_id)
        self._finish(request, "abort", None)
        return self._collect([request])[0]

    @property
    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished_requests

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and completion together."""
        return self.scheduler.max_model_len

    # A step.

    def step(self) -> list[RequestOutput]:
        """Compute one batch. Returns what changed: every request that got a token or ended. One whose own
        work fails ends with finish_reason "error"; the others go on.

        Raises:
            EngineDead: with tensor parallelism: another rank is gone.
        """
        if self.parallel is None:
            return self._step()
        self._check_alive()
        try:
            self._tell("step")
            self._send()
            return self._step()
        except RuntimeError as error:
            explained = self.parallel.explain(error)
            self._end(explained)
            if isinstance(explained, EngineDead):
                raise explained from error
            raise
        except BaseException as error:
            self._end(error)
            raise

    def _step(self) -> list[RequestOutput]:
        if self._failed_here and self.parallel is not None and self.parallel.rank > 0:
            raise RuntimeError(f"requests failed on this rank alone: {sorted(self._failed_here)}")
        began = time.perf_counter()
        schedule = self.scheduler.schedule()
        if not schedule.chunks:
            assert not self.has_unfinished_requests or schedule.preempted, (
                "nothing can be scheduled"
            )
            return []
        sizes = [chunk.num_tokens for chunk in schedule.chunks]
        self._counters.scheduled(schedule.chunks)
        wanted = [chunk.logit_offsets for chunk in schedule.chunks]
        logits = self.runner.run(schedule.chunks, wanted)
        changed = self._postprocess(schedule.chunks, logits, wanted)
        outputs = self._collect(changed)
        self._counters.computed(sizes, time.perf_counter() - began)
        return outputs

    def _postprocess(
        self, chunks: list[ScheduledChunk], logits_XV: Tensor, wanted: list[list[int]]
    ) -> list[Request]:
        """Advance the requests, sample, and end those that are done or have failed."""
        sampling: list[Request] = []
        failed: list[tuple[Request, RequestFailed]] = []
        sample_rows: list[int] = []
        row = 0
        for chunk, offsets in zip(chunks, wanted, strict=True):
            request = chunk.request
            rows = list(range(row, row + len(offsets)))
            row += len(offsets)
            sample_row = rows.pop() if chunk.samples else None
            try:
                if rows:
                    with own_work(request.request_id):
                        logits = take_rows(logits_XV, rows)
                        self._record_prompt_logprobs(request, chunk.start + offsets[0], logits)
                if sample_row is not None:
                    sampling.append(request)
                    sample_rows.append(sample_row)
            except RequestFailed as error:
                failed.append((request, error))
            request.num_computed_tokens = chunk.end
        tokens = self._sample(take_rows(logits_XV, sample_rows), sampling) if sampling else []
        # the device is done: the counts wait for nothing more
        self.context.settle()
        self._counters.peak_pages = max(self._counters.peak_pages, self._pages_in_use)
        for request, token in zip(sampling, tokens, strict=True):
            try:
                if isinstance(token, RequestFailed):
                    raise token
                with own_work(request.request_id):
                    ending = self._append(request, token)
                if ending is not None:
                    self._finish(request, *ending)
            except RequestFailed as error:
                failed.append((request, error))
        for request, failure in failed:
            self._fail(request, failure)
        return sampling + [request for request, _ in failed if request not in sampling]

    def _sample(
        self, logits_BV: Tensor, requests: list[Request]
    ) -> list[SampledToken | RequestFailed]:
        if self.parallel is None:
            return self._sample_here(logits_BV, requests)
        return self.parallel.from_first(lambda: self._sample_here(logits_BV, requests))

    def _sample_here(
        self, logits_BV: Tensor, requests: list[Request]
    ) -> list[SampledToken | RequestFailed]:
        """All requests together; if that raises, one after the other, to find out whose work it is. A row's
        token does not depend on the others."""
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

    def _collect(self, changed: list[Request]) -> list[RequestOutput]:
        outputs = []
        for request in changed:
            outputs.append(self._output(request))
            if request.is_finished:
                self._forget(request)
        return outputs

    # Tensor parallelism.

    def follow(self) -> None:
        """On ranks other than 0: do what rank 0 is asked, until it calls `close`.

        Raises:
            EngineDead: rank 0 or another rank is gone.
        """
        parallel = self.parallel
        assert parallel is not None and parallel.rank > 0, "rank 0 leads"
        try:
            while True:
                for command in parallel.receive():
                    if command.name == "close":
                        return
                    method = getattr(self, _METHODS.get(command.name, command.name))
                    method(*command.arguments, **command.keywords)
        except RuntimeError as error:
            raise parallel.explain(error) from error

    def close(self) -> None:
        """Rank 0: let the other ranks' `follow` return. Without tensor parallelism nothing to do."""
        if self.parallel is not None and self.parallel.rank == 0 and self._lost is None:
            self._tell("close")
            self._send()
            self._lost = EngineDead("the engine was closed")
            self.parallel.close()

    def check_health(self) -> None:
        """Raises:
        EngineDead: with tensor parallelism: another rank is gone.
        """
        self._check_alive()
        if self.parallel is not None:
            try:
                self.parallel.check()
            except EngineDead as error:
                self._end(error)
                raise

    def _end(self, error: BaseException) -> None:
        """After a failure the ranks are no longer at one place."""
        assert self.parallel is not None
        if not isinstance(error, EngineDead):
            error = EngineDead(f"the engine failed: {type(error).__name__}: {error}")
        self._lost = error
        self.parallel.abandon()

    def _tell(self, name: str, *arguments: Any, **keywords: Any) -> None:
        """Rank 0: what the others have to do too, sent with the next step."""
        if self.parallel is not None and self.parallel.rank == 0:
            self._unsent.append(Command(name, arguments, keywords))

    def _send(self) -> None:
        assert self.parallel is not None
        self.parallel.send(self._unsent)
        self._unsent = []

    def _check_alive(self) -> None:
        if self._lost is not None:
            raise self._lost

    # One request.

    def _append(self, request: Request, token: SampledToken) -> tuple[str, str | int | None] | None:
        """Take a token in. Returns finish_reason and stop_reason if it is the last one."""
        if request.metrics.first_token_time is None:
            request.metrics.first_token_time = time.monotonic()
        request.output_token_ids.append(token.token_id)
        self._counters.num_generated += 1
        if token.logprobs is not None and token.logprob is not None:
            request.logprobs.append(token.logprobs)
            request.cumulative_logprob += token.logprob
        params = request.params
        is_eos = token.token_id in self.eos_ids and not params.ignore_eos
        is_stop_token = token.token_id in params.stop_token_ids
        detokenizer = self._detokenizers.get(request.request_id)
        stop_text = None
        if detokenizer is not None:
            num_old = len(detokenizer.text)
            if not (is_eos or is_stop_token) or params.include_stop_str_in_output:
                detokenizer.add(token.token_id)
            is_last = is_eos or is_stop_token or request.num_tokens >= request.max_total_tokens
            if is_last:
                detokenizer.flush()
            found = find_stop(detokenizer.text, num_old, params.stop)
            if found is None and detokenizer.skips(token.token_id):
                found = detokenizer.find_skipped_stop(token.token_id, params.stop)
            if found is not None and len(request.output_token_ids) > params.min_tokens:
                at, stop_text = found
                end = at + len(stop_text) if params.include_stop_str_in_output else at
                detokenizer.text = detokenizer.text[:end]
        if stop_text is not None:
            return "stop", stop_text
        if is_eos:
            return "stop", None if token.token_id == self.eos_id else token.token_id
        if is_stop_token:
            return "stop", token.token_id
        if request.num_tokens >= request.max_total_tokens:
            return "length", None
        return None

    def _record_prompt_logprobs(self, request: Request, start: int, logits_XV: Tensor) -> None:
        """Row x of the logits tells of prompt token `start + x + 1`."""
        count = request.params.prompt_logprobs
        assert count is not None
        following = request.prompt_token_ids[start + 1 : start + 1 + len(logits_XV)]
        rows = token_logprobs(logits_XV, following, [count] * len(following))
        if any(math.isnan(p.logprob) for row in rows for p in row.values()):
            raise RequestFailed(
                f"request {request.request_id}: the model's logits of the prompt are not finite (NaN or "
                "infinity); a larger dtype may help"
            )
        # after a preemption the first ones are there already
        request.prompt_logprobs += rows[len(request.prompt_logprobs) - start - 1 :]

    def _finish(self, request: Request, finish_reason: str, stop_reason: str | int | None) -> None:
        self._measure(request)
        if request.status is RequestStatus.RUNNING:
            self._counters.finished_tokens += request.num_computed_tokens
            self._counters.finished_entries_LG += self._entries_of(request)
        self.scheduler.finish(request)
        request.finish_reason, request.stop_reason = finish_reason, stop_reason
        request.metrics.finished_time = time.monotonic()
        self._counters.num_finished += 1

    def _fail(self, request: Request, error: RequestFailed) -> None:
        """End a request, if it has not ended, because of its own work."""
        logger.error("%s", error, exc_info=error.__cause__)
        if not request.is_finished:
            self._finish(request, "error", None)
        request.finish_reason, request.stop_reason = "error", None
        request.error = str(error)
        if self.parallel is not None and self.parallel.rank > 0:
            self._failed_here.add(request.request_id)
        self._tell("fail_request", request.request_id)

    def _failed_on_rank_0(self, request_id: str) -> None:
        """On the other ranks: end it too, unless its work failed here as well."""
        self._failed_here.discard(request_id)
        request = self._requests.get(request_id)
        if request is not None:
            self._finish(request, "error", None)
            self._forget(request)

    def _forget(self, request: Request) -> None:
        self.sampler.forget(request)
        self._detokenizers.pop(request.request_id, None)
        del self._requests[request.request_id]

    def _entries_of(self, request: Request) -> np.ndarray:
        assert request.row is not None
        return self.context.tables.entries(request.row)

    def _measure(self, request: Request) -> None:
        """Bring the request's cache figures up to date; keep the last ones of one that does not run."""
        if request.row is None:
            return
        counts, metrics = self.context.tables.counts, request.metrics
        num_heads = self._counters.finished_entries_LG.size
        metrics.num_cached_tokens = request.num_computed_tokens * num_heads
        metrics.num_entries = counts.num_entries(request.row)
        metrics.num_pages = counts.num_pages_of(request.row)

    def _output(self, request: Request) -> RequestOutput:
        self._measure(request)
        text = ""
        if request.error is None and (self.parallel is None or self.parallel.rank == 0):
            try:
                with own_work(request.request_id):
                    text = visible_text(request, self._detokenizers.get(request.request_id))
            except RequestFailed as error:
                self._fail(request, error)
        return output_of(request, text)

    # Figures.

    def lengths(self, request_id: str) -> list[list[int]] | None:
        """Entries of each layer's KV heads of a running request; None if it does not run."""
        request = self._requests.get(request_id)
        if request is None or request.row is None:
            return None
        return self._entries_of(request).tolist()

    def check_integrity(self) -> None:
        """Every page is free or held by exactly those who name it.

        Raises:
            AssertionError: if not.
        """
        prefixes = self.context.prefixes
        self.context.tables.check_integrity(None if prefixes is None else prefixes.page_ids())

    def stats(self) -> EngineStats:
        """Counts so far."""
        counters, context = self._counters, self.context
        running_LG = np.zeros_like(counters.finished_entries_LG)
        tokens = counters.finished_tokens
        crs = {}
        for request in self.scheduler.running:
            self._measure(request)
            tokens += request.num_computed_tokens
            running_LG += self._entries_of(request)
            if request.metrics.measured_cr is not None:
                crs[request.request_id] = request.metrics.measured_cr
        pool, prefixes, flips = context.pool, context.prefixes, context.flips
        return EngineStats(
            num_waiting=len(self.scheduler.waiting),
            num_running=len(self.scheduler.running),
            num_finished=counters.num_finished,
            num_preemptions=self.scheduler.num_preemptions,
            num_pages=pool.num_pages,
            num_pages_in_use=self._pages_in_use,
            page_bytes=pool.page_bytes,
            peak_pages_in_use=counters.peak_pages,
            num_generated_tokens=counters.num_generated,
            num_prompt_tokens=counters.num_prompt,
            busy_seconds=counters.prefill_seconds + counters.decode_seconds,
            seq_tokens=tokens,
            entries_LG=(counters.finished_entries_LG + running_LG).tolist(),
            cr_of_running=crs,
            entry_bytes=pool.page_bytes // pool.page_size,
            plain_entry_bytes=2 * self.description.kv_channels * self._dtype.itemsize,
            running_entries_LG=running_LG.tolist(),
            num_prefill_tokens=counters.num_prefill,
            num_decode_tokens=counters.num_decode,
            prefill_seconds=counters.prefill_seconds,
            decode_seconds=counters.decode_seconds,
            num_decode_only_tokens=counters.num_decode_only,
            num_cached_pages=context.tables.num_cached_pages,
            num_cached_prefixes=0 if prefixes is None else len(prefixes),
            num_evicted_prefixes=0 if prefixes is None else prefixes.num_evicted,
            num_prefix_queried_tokens=context.num_queried_tokens,
            num_prefix_hit_tokens=context.num_hit_tokens,
            num_repeated_decisions=0 if flips is None else flips.num_repeated,
            num_flipped_decisions=0 if flips is None else flips.num_flipped,
        )

    @property
    def _pages_in_use(self) -> int:
        return self.context.tables.num_pages_in_use
