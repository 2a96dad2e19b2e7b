"""Resolve the sizes that a configuration leaves open, and check them against the model and the memory."""

from dataclasses import replace
from typing import Any

import psutil
import torch

from megatron_dmc.cache.strategies import store_class
from megatron_dmc.checkpoint.description import ModelDescription, parse_dtype
from megatron_dmc.checkpoint.weights import weight_bytes
from megatron_dmc.engine.config import EngineConfig
from megatron_dmc.engine.parallel.group import TensorParallel
from megatron_dmc.engine.rule import compression_rule
from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.ops.paged.kv_pages import entry_bytes, parse_kv_cache_dtype

_DEFAULT_CPU_CACHE_BYTES = 2**30
_DEFAULT_MAX_NUM_SEQS = range(64, 257)
_TABLES_PART = 32
"""More requests than the least default run only if their tables take at most 1/32 of the cache's memory."""


def model_dtype(name: str | torch.dtype) -> torch.dtype | None:
    """The model's dtype from the setting `dtype`; None for "auto".

    Raises:
        UnsupportedConfig: for an unknown name.
    """
    synonyms = {"half": "float16", "float": "float32"}
    return None if name == "auto" else parse_dtype(synonyms.get(str(name), name))


def resolve_sizes(
    config: EngineConfig,
    description: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    parallel: TensorParallel | None,
) -> EngineConfig:
    """The configuration with `max_model_len`, `num_pages` and `max_num_seqs` set, the same on every rank.

    Args:
        dtype: the model's; `device`: its weights', in whose memory the cache is.

    Raises:
        UnsupportedConfig: the sizes do not fit the model, or no memory is left for the cache.
    """
    num_ranks = 1 if parallel is None else parallel.size
    max_model_len = config.max_model_len
    if max_model_len is None:
        max_model_len = int(description.max_position_embeddings)
    heads = description.num_layers * description.num_query_groups // num_ranks
    cache_dtype = parse_kv_cache_dtype(config.kv_cache_dtype) or dtype
    page_bytes = 2 * config.block_size * entry_bytes(description.kv_channels, cache_dtype)
    most_pages = config.num_pages
    if most_pages is None:
        most_pages = pages_in_memory(
            page_bytes,
            kv_cache_memory_bytes=config.kv_cache_memory_bytes,
            gpu_memory_utilization=config.gpu_memory_utilization,
            device=device,
        )
    if parallel is not None:
        most_pages = parallel.least(most_pages)
    max_num_seqs = config.max_num_seqs
    if max_num_seqs is None:
        tables = table_bytes(description, config, max_model_len, num_ranks)
        in_memory = most_pages * page_bytes // _TABLES_PART // tables
        in_memory = min(max(in_memory, _DEFAULT_MAX_NUM_SEQS[0]), _DEFAULT_MAX_NUM_SEQS[-1])
        max_num_seqs = max(1, min(in_memory, most_pages // heads))
    num_pages = most_pages
    if config.num_pages is None:  # more than all requests need if nothing merges is never used
        num_pages = min(most_pages, -(-max_model_len // config.block_size) * heads * max_num_seqs)
    config = replace(
        config, max_model_len=max_model_len, num_pages=num_pages, max_num_seqs=max_num_seqs
    )
    check_fits_model(config, description, num_ranks)
    return config


def pages_in_memory(
    page_bytes: int,
    *,
    kv_cache_memory_bytes: int | None,
    gpu_memory_utilization: float,
    device: torch.device,
) -> int:
    """Pages that fit into the given memory.

    Args:
        page_bytes: of one page, key and value together, with their scales.
        kv_cache_memory_bytes: memory of the cache. None: on a GPU the part `gpu_memory_utilization` of its
            memory less all that is in use, on a CPU 1 GiB.

    Raises:
        UnsupportedConfig: no memory is left for a page.
    """
    if kv_cache_memory_bytes is None and device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        kv_cache_memory_bytes = int(total * gpu_memory_utilization) - (total - free)
        if kv_cache_memory_bytes < page_bytes:
            raise UnsupportedConfig(
                f"gpu_memory_utilization={gpu_memory_utilization} leaves no memory for the cache; "
                "raise it, or use kv_cache_memory_bytes"
            )
    limit = _DEFAULT_CPU_CACHE_BYTES if kv_cache_memory_bytes is None else kv_cache_memory_bytes
    return limit // page_bytes


def table_bytes(
    description: ModelDescription, config: EngineConfig, max_model_len: int, num_ranks: int
) -> int:
    """Bytes of a running request on one rank besides its pages: page tables and the strategy's state."""
    heads = description.num_layers * -(-description.num_query_groups // num_ranks)
    rule = compression_rule(description.dmc, config.enable_dmc)
    state = store_class(rule).state_bytes(rule, description.kv_channels)
    return heads * (4 * -(-max_model_len // config.block_size) + state)


def check_fits_model(config: EngineConfig, description: Any, num_ranks: int) -> None:
    """Raises:
    UnsupportedConfig: too few pages for a token, or sequences longer than the model's.
    """
    heads = -(-description.num_query_groups // num_ranks)
    num_heads = description.num_layers * heads
    if config.num_pages is not None and config.num_pages < num_heads:
        raise UnsupportedConfig(
            f"num_pages={config.num_pages} cannot hold a single token: {description.num_layers} "
            f"layers of {heads} KV heads need {num_heads} pages at least"
        )
    longest = description.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > longest:
        raise UnsupportedConfig(
            f"max_model_len={config.max_model_len} is more than the model's {longest} positions; lower it"
        )


def check_memory(description: ModelDescription, config: EngineConfig, device: torch.device) -> None:
    """Compare the engine's needs with the device's memory, before a model is loaded.

    Raises:
        UnsupportedConfig: there is no such device; or names the settings that ask for more memory than it
            has, and how much.
    """
    ranks = config.tensor_parallel_size
    check_fits_model(config, description, ranks)
    total = _device_memory(device)
    dtype = model_dtype(config.dtype) or description.dtype
    weights = weight_bytes(replace(description, dtype=dtype)) // ranks
    setting, pages = _cache_bytes(config, description, dtype)
    max_model_len = config.max_model_len or description.max_position_embeddings
    max_num_seqs = config.max_num_seqs or _DEFAULT_MAX_NUM_SEQS[0]
    tables = max_num_seqs * table_bytes(description, config, max_model_len, ranks)
    if weights + pages + tables <= total:
        return
    parts = [
        f"the model {weights:,} bytes",
        *([f"{setting}={getattr(config, setting)} {pages:,}"] if pages else []),
        f"tables for max_num_seqs={max_num_seqs} of max_model_len={max_model_len} {tables:,}",
    ]
    _, remedy = max(
        (weights, "use a GPU with more memory, or more of them"),
        (pages, f"lower {setting}"),
        (tables, "lower max_num_seqs or max_model_len"),
    )
    raise UnsupportedConfig(
        f"{', '.join(parts)}: more than the {total:,} bytes of this {device.type.upper()}; {remedy}"
    )


def _device_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return psutil.virtual_memory().total
    gpus = torch.cuda.device_count()
    if (device.index or 0) >= gpus:
        raise UnsupportedConfig(
            f"device={device}: this machine has {gpus} GPUs; choose another, or device='cpu'"
        )
    return torch.cuda.get_device_properties(device).total_memory


def _cache_bytes(
    config: EngineConfig, description: ModelDescription, dtype: torch.dtype
) -> tuple[str, int]:
    """The setting that fixes the cache's size, and its bytes; 0 where none does."""
    if config.num_pages is None:
        return "kv_cache_memory_bytes", config.kv_cache_memory_bytes or 0
    cache_dtype = parse_kv_cache_dtype(config.kv_cache_dtype) or dtype
    entry = entry_bytes(description.kv_channels, cache_dtype)
    return "num_pages", config.num_pages * 2 * config.block_size * entry
