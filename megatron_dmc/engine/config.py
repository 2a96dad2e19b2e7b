"""Sizes and policies of the engine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch

from megatron_dmc.cache.policies import EvictionRule
from megatron_dmc.engine.graphs import default_sizes
from megatron_dmc.engine.scheduler import SchedulingPolicy
from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.ops.paged.kv_pages import parse_kv_cache_dtype

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The model's dtype by name; None for "auto": as the checkpoint stores it.

    Raises:
        UnsupportedConfig: for any other name.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    name = dtype.removeprefix("torch.")
    if name == "auto":
        return None
    if name not in _DTYPES:
        raise UnsupportedConfig(f"dtype={dtype!r}: use one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


@dataclass
class EngineConfig:
    """Sizes of the engine. Validated at construction: `UnsupportedConfig` names the field."""

    max_model_len: int
    """Longest sequence, prompt and completion together."""

    num_pages: int
    """Pages of the cache, over all layers and KV heads."""

    page_size: int = 16
    """Slots per page."""

    kv_cache_dtype: str = "auto"
    """How pages store keys and values: "auto" (the model's dtype), "fp8" (also "fp8_e4m3") or "int8"."""

    max_num_seqs: int = 64
    """Requests that run at a time."""

    max_num_batched_tokens: int = 2048
    """Tokens computed in a step; longer prompts are computed in chunks."""

    seed: int = 0
    """For requests that bring no seed."""

    scheduling_policy: SchedulingPolicy = "fcfs"
    """"fcfs", or "priority": requests with a lower `priority` go first."""

    priority_reach: int = 256
    """How many earlier requests one level of priority lets a request pass."""

    enable_prefix_caching: bool = False
    """Share the pages of equal prefixes between requests."""

    prefix_block_size: int = 256
    """Tokens between two places at which a prefix can end. Each costs a page per layer and KV head."""

    count_flipped_decisions: bool | None = None
    """After preemption, compare the decisions with the first ones. None: in 16-bit dtypes."""

    enforce_eager: bool = False
    """Do not capture decode steps into CUDA graphs. Without a GPU there are none anyway."""

    cudagraph_capture_sizes: Sequence[int] | None = None
    """Batch sizes that are captured; None: 1, 2, 4, 8, 16, 24, ... up to `max_num_seqs`."""

    cache_policy: str | None = None
    """"h2o", "tova" or "window": evict entries instead of merging (megatron_dmc.cache.policies); for
    evaluation, with a plain model in one process and without cached prefixes."""

    cache_budget: int | float | None = None
    """With a policy: entries that each head keeps; a float: as a part of the request's prompt."""

    poison: bool = False
    """Fill free pages with NaN, for tests."""

    def __post_init__(self) -> None:
        for name in (
            "max_model_len",
            "num_pages",
            "page_size",
            "max_num_seqs",
            "max_num_batched_tokens",
            "priority_reach",
            "prefix_block_size",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UnsupportedConfig(f"{name}={value!r}: use a positive whole number")
        sizes = self.cudagraph_capture_sizes
        if sizes is not None and not (sizes and all(type(n) is int and n > 0 for n in sizes)):
            raise UnsupportedConfig(
                f"cudagraph_capture_sizes={sizes!r}: use positive whole numbers, or enforce_eager=True "
                "for none"
            )
        if sizes is not None and min(sizes) > self.max_num_seqs:
            raise UnsupportedConfig(
                f"cudagraph_capture_sizes={sizes!r}: all are larger than max_num_seqs="
                f"{self.max_num_seqs}; choose smaller ones, or enforce_eager=True"
            )
        parse_kv_cache_dtype(self.kv_cache_dtype)
        if (self.cache_policy is None) != (self.cache_budget is None):
            raise UnsupportedConfig(
                f"cache_policy={self.cache_policy!r} with cache_budget={self.cache_budget!r}: give both "
                "or neither"
            )
        if self.eviction is not None and self.enable_prefix_caching:
            raise UnsupportedConfig(
                f"cache_policy={self.cache_policy!r} with enable_prefix_caching=True: what is evicted "
                "depends on the whole prompt; switch prefix caching off"
            )
        if self.eviction is not None and parse_kv_cache_dtype(self.kv_cache_dtype) is not None:
            raise UnsupportedConfig(
                f"cache_policy={self.cache_policy!r} with kv_cache_dtype={self.kv_cache_dtype!r}: the "
                "policies are compared in the model's dtype; use kv_cache_dtype='auto'"
            )
        if self.scheduling_policy not in get_args(SchedulingPolicy):
            raise UnsupportedConfig(
                f"scheduling_policy={self.scheduling_policy!r}: use 'fcfs' or 'priority'"
            )

    def graph_sizes(self) -> list[int]:
        """Batch sizes whose decode steps become CUDA graphs: none larger than `max_num_seqs`."""
        sizes = self.cudagraph_capture_sizes or default_sizes(self.max_num_seqs)
        return sorted({size for size in sizes if size <= self.max_num_seqs})

    @property
    def eviction(self) -> EvictionRule | None:
        """The policy and its budget, if any."""
        if self.cache_policy is None or self.cache_budget is None:
            return None
        return EvictionRule(self.cache_policy, self.cache_budget)
