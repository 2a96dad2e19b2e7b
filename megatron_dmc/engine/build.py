"""Build an engine: load the model and its tokenizer, with tensor parallelism on every rank."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_dmc.checkpoint.generation_config import (
    read_generation_config,
    sampling_defaults,
    token_ids,
)
from megatron_dmc.checkpoint.hub import local_path
from megatron_dmc.checkpoint.tokenizer import load_tokenizer
from megatron_dmc.engine.config import EngineConfig
from megatron_dmc.engine.sampling_params import SamplingParams
from megatron_dmc.errors import InvalidRequest, UnsupportedConfig
from megatron_dmc.quiet import quietly
from megatron_dmc.startup import compiling_at_first_call

with compiling_at_first_call():  # these import Megatron
    from megatron_dmc.engine.context import PagedContext
    from megatron_dmc.engine.engine import LLMEngine
    from megatron_dmc.engine.parallel.engine import TensorParallelEngine
    from megatron_dmc.engine.parallel.launch import ended_on_failure, start_ranks
    from megatron_dmc.engine.runner import device_of_weights
    from megatron_dmc.engine.sizes import check_memory, model_dtype


def build_engine(
    model: Any,
    tokenizer: Any | None,
    config: EngineConfig,
    *,
    make_context: Callable[..., PagedContext] = PagedContext,
) -> LLMEngine:
    """An engine for a checkpoint or a loaded model.

    Args:
        model, tokenizer: see `LLM`.

    Raises:
        DMCError: the model cannot be read, or a setting does not fit it.
    """
    if not hasattr(model, "description"):  # once, before there are other ranks
        model = local_path(model, revision=config.revision)
        config = replace(config, revision=None)
    device = _device(model, config)
    parallel = None
    if config.tensor_parallel_size != 1:
        parallel = start_ranks((model, tokenizer, make_context), config, device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    with ended_on_failure(parallel):
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(tokenizer, trust_remote_code=config.trust_remote_code)
        loaded = _load(model, config, device)
        eos_ids, sampling = _generation_defaults(config.generation_config, loaded)
        if parallel is not None:
            parallel.monitor.wait_until_loaded()
        make: Any = LLMEngine if parallel is None else TensorParallelEngine
        return make(
            loaded.model,
            loaded.description,
            loaded.tokenizer if tokenizer is None else tokenizer,
            config,
            dtype=next(loaded.model.parameters()).dtype,
            parallel=parallel,
            make_context=make_context,
            further_eos_ids=eos_ids,
            default_sampling_params=sampling,
        )


def _device(model: Any, config: EngineConfig) -> torch.device:
    if hasattr(model, "description"):
        return device_of_weights(model.model, config.device)
    return torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _load(model: Any, config: EngineConfig, device: torch.device) -> Any:
    """The loaded model; its needs are compared with the memory first."""
    if hasattr(model, "description"):
        check_memory(model.description, config, device)
        return model
    with quietly():
        from megatron_dmc.checkpoint.load import load_model

        return load_model(
            model,
            device=device,
            dtype=model_dtype(config.dtype),
            tensor_parallel_size=config.tensor_parallel_size,
            allow_pickle=config.allow_pickle,
            verify_checkpoint=config.verify_checkpoint,
            check=functools.partial(check_memory, config=config, device=device),
            trust_remote_code=config.trust_remote_code,
        )


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
