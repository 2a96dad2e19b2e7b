"""Whether an engine of the sizes that were asked for can be, said before a model is loaded."""

from dataclasses import replace
from typing import Any

import psutil
import torch

from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.weights import weight_bytes
from megatron_dmc.engine.config import EngineConfig, parse_dtype
from megatron_dmc.engine.rule import compression_rule
from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.ops.paged.kv_pages import entry_bytes, parse_kv_cache_dtype
from megatron_dmc.ops.training.merge import num_kept

MOST = {
    "max_model_len": 2**31 - 1,
    "num_pages": 2**31 - 1,
    "block_size": 2**16,
    "page_size": 2**16,
    "max_num_seqs": 2**16,
    "max_num_batched_tokens": 2**24,
    "kv_cache_memory_bytes": 2**50,
    "tensor_parallel_size": 2**16,
}
"""Arguments of `LLM`, above which numbers overflow; memory sets lower limits."""


def check_arguments(arguments: dict[str, Any]) -> None:
    """Look at the sizes among the arguments of `LLM`, without a model.

    Raises:
        UnsupportedConfig: names the argument, its value and what it may be.
    """
    for name, most in MOST.items():
        value = arguments[name]
        if value is not None and not (type(value) is int and 1 <= value <= most):
            raise UnsupportedConfig(
                f"{name}={value!r}: use a positive whole number, at most {most}"
            )
    part = arguments["gpu_memory_utilization"]
    if not (isinstance(part, int | float) and 0 < part <= 1):
        raise UnsupportedConfig(f"gpu_memory_utilization={part!r}: use a number above 0, at most 1")
    _config(arguments, arguments["max_model_len"] or 1)


def _config(arguments: dict[str, Any], max_model_len: int) -> EngineConfig:
    """Validates what it is made of. Where no number of pages was given it holds a stand-in."""
    names = ("kv_cache_dtype", "max_num_seqs", "max_num_batched_tokens", "scheduling_policy",
             "enable_prefix_caching", "prefix_block_size", "enforce_eager", "cudagraph_capture_sizes",
             "cache_policy", "cache_budget")  # fmt: skip
    size = arguments["block_size"] or arguments["page_size"] or EngineConfig.page_size
    return EngineConfig(
        max_model_len, arguments["num_pages"] or MOST["num_pages"], size,
        **{name: arguments[name] for name in names},
    )  # fmt: skip


def check_fits_model(config: EngineConfig, description: Any, heads_per_rank: int) -> None:
    """Raises UnsupportedConfig: too few pages for a token, or sequences longer than the model's."""
    num_heads = description.num_layers * heads_per_rank
    if config.num_pages < num_heads:
        raise UnsupportedConfig(
            f"num_pages={config.num_pages} cannot hold a single token: {description.num_layers} "
            f"layers of {heads_per_rank} KV heads need {num_heads} pages at least"
        )
    if config.max_model_len > description.max_position_embeddings:
        raise UnsupportedConfig(
            f"max_model_len={config.max_model_len} is more than the model's "
            f"{description.max_position_embeddings} positions; lower it"
        )


def check_memory(
    description: ModelDescription, arguments: dict[str, Any], device: torch.device
) -> None:
    """Compare what the engine of `LLM(**arguments)` keeps in memory with the device's memory.

    Raises:
        UnsupportedConfig: there is no such device; or names the arguments that ask for more, and how
            much.
    """
    d, dtype = description, parse_dtype(arguments["dtype"]) or description.dtype
    ranks = arguments["tensor_parallel_size"]
    heads = -(-d.num_query_groups // ranks)
    config = _config(arguments, arguments["max_model_len"] or d.max_position_embeddings)
    check_fits_model(config, d, heads)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UnsupportedConfig(
            f"device={device}: this machine has {gpus} GPUs; choose another, or device='cpu'"
        )
    total = (
        torch.cuda.get_device_properties(device).total_memory
        if device.type == "cuda"
        else psutil.virtual_memory().total
    )
    weights = weight_bytes(replace(d, dtype=dtype)) // ranks
    cache_dtype = parse_kv_cache_dtype(config.kv_cache_dtype) or dtype
    pages = arguments["kv_cache_memory_bytes"] or 0
    if arguments["num_pages"] is not None:
        page_bytes = 2 * config.page_size * entry_bytes(d.kv_channels, cache_dtype)
        pages = config.num_pages * page_bytes
    rows = d.num_layers * heads * config.max_num_seqs
    tables = rows * -(-config.max_model_len // config.page_size) * 4
    rule = compression_rule(d.dmc, arguments["enable_dmc"])
    if rule is not None and rule.eviction_delay is not None:
        tables += rows * (rule.eviction_delay + 1) * 5
    elif rule is not None:
        tables += rows * num_kept(rule.merge_window) * (2 * d.kv_channels + 1) * 4
        tables += rows * rule.merge_delay * 5  # decisions and importances of the raw tokens
    if weights + pages + tables <= total:
        return
    asked = "num_pages" if arguments["num_pages"] is not None else "kv_cache_memory_bytes"
    parts = [
        f"the model {weights:,} bytes",
        *([f"{asked}={arguments[asked]} {pages:,}"] if pages else []),
        f"tables for max_num_seqs={config.max_num_seqs} of max_model_len={config.max_model_len} {tables:,}",
    ]
    largest = max((weights, "use a GPU with more memory, or more of them"), (pages, f"lower {asked}"),
                  (tables, "lower max_num_seqs or max_model_len"))[1]  # fmt: skip
    raise UnsupportedConfig(
        f"{', '.join(parts)}: more than the {total:,} bytes of this {device.type.upper()}; {largest}"
    )
