"""`LLM(model=...).generate(prompts, params)`, in vLLM's manner."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_dmc.checkpoint.generation_config import (
    read_generation_config,
    sampling_defaults,
    token_ids,
)
from megatron_dmc.engine.config import EngineConfig, parse_dtype
from megatron_dmc.engine.context import PagedContext
from megatron_dmc.engine.engine import LLMEngine
from megatron_dmc.engine.parallel.launch import ended_on_failure, start_ranks
from megatron_dmc.engine.request import RequestOutput
from megatron_dmc.engine.runner import device_of_weights
from megatron_dmc.engine.sampling_params import SamplingParams
from megatron_dmc.engine.scheduler import SchedulingPolicy
from megatron_dmc.engine.sizes import check_arguments, check_memory
from megatron_dmc.engine.stats import EngineStats
from megatron_dmc.errors import EngineDead, InvalidRequest, RequestFailed, UnsupportedConfig
from megatron_dmc.ops.paged.kv_pages import entry_bytes, parse_kv_cache_dtype
from megatron_dmc.quiet import quietly

_DEFAULT_CPU_CACHE_BYTES = 2**30


class LLM:
    """A model with its tokenizer and engine.

    Args:
        model: a Hugging Face folder or a Megatron checkpoint; or a loaded model
            (`model, description, tokenizer`).
        tokenizer: instead of the model's own: its folder, or an object (see `as_tokenizer`).
        trust_remote_code: run the code of a tokenizer that brings its own. The model's is never run.
        generation_config: where the model's end-of-text tokens and the sampling defaults come from:
            "auto": the model's generation_config.json; a path: that file or folder; "vllm": the tokens from
            the model, and this package's defaults.
        dtype: "auto" (as stored), "float32", "bfloat16", ...
        max_model_len: longest sequence; default: the model's.
        max_num_seqs: requests that run at a time.
        max_num_batched_tokens: tokens computed in a step.
        block_size: slots per page (`page_size` is the same).
        num_pages: size of the cache in pages; or
        kv_cache_memory_bytes: in bytes; or
        gpu_memory_utilization: as a part of the GPU's memory, model included. On a CPU the default is
            what `max_num_seqs` longest sequences need, at most 1 GiB.
        kv_cache_dtype: how pages store keys and values: "auto" (the model's dtype), "fp8" (also
            "fp8_e4m3") or "int8".
        enable_dmc: None: as the model. False: never merge.
        scheduling_policy: "fcfs" or "priority".
        enable_prefix_caching: share the pages of equal prefixes between requests.
        prefix_block_size: tokens between two places at which a shared prefix can end.
        enforce_eager: no CUDA graphs for decode steps.
        cudagraph_capture_sizes: batch sizes that get one; default: 1, 2, 4, 8, 16, ... `max_num_seqs`.
        cache_policy: "h2o", "tova" or "window": evict instead of merging, for evaluation of plain models.
        cache_budget: with it: entries that each head keeps, or as a float the part of the prompt.
        tensor_parallel_size: processes that share the heads: children of this one; or, under torchrun,
            those it started: every process then makes an `LLM`, and all but rank 0 call `follow`.
        distributed_timeout_seconds: a process that takes longer over its part of a step is given up.
        seed: of requests without a seed.
        device: default: where the weights of a loaded model are, else the GPU if there is one.
        allow_pickle: let a Megatron checkpoint run the code in its pickles; only if you trust it.
        verify_checkpoint: compare the files with the checksums beside them, where there are any.
        make_context: see `LLMEngine`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any | None = None,
        *,
        trust_remote_code: bool = False,
        generation_config: str | Path = "auto",
        dtype: str | torch.dtype = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
        block_size: int | None = None,
        page_size: int | None = None,
        num_pages: int | None = None,
        kv_cache_memory_bytes: int | None = None,
        gpu_memory_utilization: float = 0.9,
        kv_cache_dtype: str = "auto",
        enable_dmc: bool | None = None,
        scheduling_policy: SchedulingPolicy = "fcfs",
        enable_prefix_caching: bool = False,
        prefix_block_size: int = 256,
        enforce_eager: bool = False,
        cudagraph_capture_sizes: Sequence[int] | None = None,
        cache_policy: str | None = None,
        cache_budget: float | None = None,
        tensor_parallel_size: int = 1,
        distributed_timeout_seconds: float = 60.0,
        seed: int = 0,
        device: str | torch.device | None = None,
        allow_pickle: bool = False,
        verify_checkpoint: bool = True,
        make_context: Callable[..., PagedContext] = PagedContext,
    ):
        given = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        if None not in (block_size, page_size) and block_size != page_size:
            raise UnsupportedConfig(
                f"block_size={block_size} and page_size={page_size} are one thing; give one"
            )
        check_arguments(given)
        cache_dtype = parse_kv_cache_dtype(kv_cache_dtype)
        chosen = block_size if block_size is not None else page_size
        page_size = 16 if chosen is None else chosen
        if hasattr(model, "description"):
            device = device_of_weights(model.model, device)
        elif device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(device)
        parallel = None
        if tensor_parallel_size != 1:
            parallel = start_ranks(given, device)
            if device.type == "cuda" and device.index is None:
                device = torch.device("cuda", torch.cuda.current_device())
        with ended_on_failure(parallel):
            if isinstance(tokenizer, str | Path):
                from megatron_dmc.checkpoint.tokenizer import load_tokenizer

                tokenizer = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
            check = functools.partial(check_memory, arguments=given, device=device)
            if hasattr(model, "description"):
                check(model.description)
            else:
                with quietly():
                    from megatron_dmc.checkpoint.load import load_model

                    model = load_model(
                        model, device=device, dtype=parse_dtype(dtype),
                        tensor_parallel_size=tensor_parallel_size, allow_pickle=allow_pickle,
                        verify_checkpoint=verify_checkpoint, check=check,
                        trust_remote_code=trust_remote_code,
                    )  # fmt: skip
            description = model.description
            eos_ids, sampling = _generation_defaults(generation_config, model)
            gpt = model.model
            model_dtype = next(gpt.parameters()).dtype
            if max_model_len is None:
                max_model_len = int(description.max_position_embeddings)
            page_bytes = (
                2 * page_size * entry_bytes(description.kv_channels, cache_dtype or model_dtype)
            )
            if num_pages is None:
                num_pages = pages_in_memory(
                    page_bytes,
                    worst_case=_worst_case_pages(description, max_model_len, page_size)
                    // tensor_parallel_size
                    * max_num_seqs,
                    kv_cache_memory_bytes=kv_cache_memory_bytes,
                    gpu_memory_utilization=gpu_memory_utilization,
                    device=device,
                )
            if parallel is not None:
                parallel.wait_until_loaded()
                num_pages = parallel.least(num_pages)
            self.engine = LLMEngine(
                gpt,
                description,
                tokenizer if tokenizer is not None else model.tokenizer,
                EngineConfig(
                    max_model_len=max_model_len,
                    num_pages=num_pages,
                    page_size=page_size,
                    kv_cache_dtype=kv_cache_dtype,
                    max_num_seqs=max_num_seqs,
                    max_num_batched_tokens=max_num_batched_tokens,
                    seed=seed,
                    scheduling_policy=scheduling_policy,
                    enable_prefix_caching=enable_prefix_caching,
                    prefix_block_size=prefix_block_size,
                    enforce_eager=enforce_eager,
                    cudagraph_capture_sizes=cudagraph_capture_sizes,
                    cache_policy=cache_policy,
                    cache_budget=cache_budget,
                ),
                dtype=model_dtype,
                device=device,
                enable_dmc=enable_dmc,
                parallel=parallel,
                make_context=make_context,
                further_eos_ids=eos_ids,
                default_sampling_params=sampling,
            )
        self._num_generated = 0

    def follow(self) -> bool:
        """With tensor parallelism: on rank 0 False at once; elsewhere True when rank 0 is done, after
        taking part in all it did.

        Raises:
            EngineDead: another rank is gone.
        """
        if self.engine.parallel is None or self.engine.parallel.rank == 0:
            return False
        self.engine.follow()
        return True

    def close(self) -> None:
        """With tensor parallelism: let the other ranks go; nothing can be generated any more."""
        self.engine.close()

    def get_tokenizer(self) -> Any | None:
        """The tokenizer in use."""
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What requests without sampling parameters get: the model's `generation_config.json`, in part."""
        return SamplingParams(**self.engine.default_sampling_params)

    def stats(self) -> EngineStats:
        """The engine's counts so far."""
        return self.engine.stats()

    def generate(
        self,
        prompts: str | dict | Sequence[str | dict | Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete the prompts. The outputs are in the prompts' order.

        Args:
            prompts: texts, lists of token ids, or dictionaries (see `read_prompt`); one or several.
            sampling_params: one for all, or one for each; default: `get_default_sampling_params`.
            priority: of each prompt, with the scheduling policy "priority"; lower goes first.

        Raises:
            InvalidRequest: for the first prompt that can never run; none has been started then.
            RequestFailed: an exception of a prompt's own work ended it; raised when the others are done,
                with the `outputs` of all.
        """
        if isinstance(prompts, str | dict):
            prompts = [prompts]
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or self.get_default_sampling_params()] * len(prompts)
        else:
            params = list(sampling_params)
        if len(params) != len(prompts):
            raise InvalidRequest(
                f"{len(params)} sampling_params for {len(prompts)} prompts; give one, or one for each"
            )
        priorities = [0] * len(prompts) if priority is None else list(priority)
        if len(priorities) != len(prompts):
            raise InvalidRequest(
                f"{len(priorities)} priorities for {len(prompts)} prompts; give one for each"
            )
        ids: list[str] = []
        try:
            for prompt, p, level in zip(prompts, params, priorities, strict=True):
                request_id = f"generate-{self._num_generated}"
                self._num_generated += 1
                self.engine.add_request(request_id, prompt, p, priority=level)
                ids.append(request_id)
            finished = self._run(len(ids), use_tqdm)
        except EngineDead:
            raise
        except BaseException:
            for request_id in ids:
                self.engine.abort_request(request_id)
            raise
        outputs = [finished[request_id] for request_id in ids]
        errors = [output.error for output in outputs if output.error is not None]
        if errors:
            raise RequestFailed(
                f"{len(errors)} of {len(outputs)} prompts failed, the first: {errors[0]}; the other "
                "completions are in this exception's `outputs`",
                outputs,
            )
        return outputs

    def _run(self, num_requests: int, use_tqdm: bool) -> dict[str, RequestOutput]:
        from tqdm import tqdm

        finished: dict[str, RequestOutput] = {}
        with tqdm(total=num_requests, desc="Prompts", unit="", disable=not use_tqdm) as bar:
            while self.engine.has_unfinished_requests:
                for output in self.engine.step():
                    if output.finished:
                        finished[output.request_id] = output
                        bar.update()
        return finished


def _generation_defaults(choice: str | Path, model: Any) -> tuple[list[int], dict[str, Any]]:
    """(end-of-text tokens, arguments of `SamplingParams`), as vLLM's `generation_config` says.

    Raises:
        DMCError: the file is missing or damaged, or a value in it cannot be used.
    """
    config = getattr(model, "generation_config", {})
    if choice not in ("auto", "vllm"):
        config = read_generation_config(Path(choice))
    eos = config.get("eos_token_id")
    if eos is None:
        eos = getattr(model.description, "eos_token_id", None)
    defaults = {} if choice == "vllm" else sampling_defaults(config)
    try:
        SamplingParams(**defaults)
    except InvalidRequest as error:
        raise UnsupportedConfig(
            f"generation_config.json: {error}; mend it, or use generation_config='vllm' "
            "(--generation-config vllm) to leave its defaults out"
        ) from error
    return token_ids(eos, where="config.json: eos_token_id"), defaults


def _worst_case_pages(description: Any, num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size) * description.num_layers * description.num_query_groups


def pages_in_memory(
    page_bytes: int,
    *,
    worst_case: int,
    kv_cache_memory_bytes: int | None,
    gpu_memory_utilization: float,
    device: torch.device,
) -> int:
    """Pages that the given memory holds, and never more than could be used.

    Args:
        page_bytes: of one page, key and value together, with their scales.
        worst_case: pages that all requests need together if nothing merges.
        kv_cache_memory_bytes: memory of the cache; None: on a GPU what `gpu_memory_utilization` of its
            memory leaves beside all that is in use, on a CPU 1 GiB.

    Raises:
        UnsupportedConfig: the part is not in (0, 1], or leaves no page.
    """
    if kv_cache_memory_bytes is None and device.type == "cuda":
        if not 0 < gpu_memory_utilization <= 1:
            raise UnsupportedConfig(
                f"gpu_memory_utilization={gpu_memory_utilization}: use a number above 0, at most 1"
            )
        free, total = torch.cuda.mem_get_info(device)
        kv_cache_memory_bytes = int(total * gpu_memory_utilization) - (total - free)
        if kv_cache_memory_bytes < page_bytes:
            raise UnsupportedConfig(
                f"gpu_memory_utilization={gpu_memory_utilization} leaves no memory for the cache; "
                "raise it, or use kv_cache_memory_bytes"
            )
    limit = _DEFAULT_CPU_CACHE_BYTES if kv_cache_memory_bytes is None else kv_cache_memory_bytes
    return min(worst_case, limit // page_bytes)
