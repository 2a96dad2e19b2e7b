"""Sizes and policies of the engine."""

from dataclasses import dataclass
from typing import get_args

import torch

from megatron_dmc.engine.scheduler import SchedulingPolicy
from megatron_dmc.errors import UnsupportedConfig

KV_CACHE_DTYPES = {
    "auto": None,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
}
"""What `kv_cache_dtype` may be; None: the model's dtype."""


def parse_kv_cache_dtype(name: str) -> torch.dtype | None:
    """The pages' dtype, None for the model's.

    Raises:
        UnsupportedConfig: for any other name.
    """
    if name not in KV_CACHE_DTYPES:
        raise UnsupportedConfig(f"kv_cache_dtype={name!r}: use one of {', '.join(KV_CACHE_DTYPES)}")
    return KV_CACHE_DTYPES[name]


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
        parse_kv_cache_dtype(self.kv_cache_dtype)
        if self.scheduling_policy not in get_args(SchedulingPolicy):
            raise UnsupportedConfig(
                f"scheduling_policy={self.scheduling_policy!r}: use 'fcfs' or 'priority'"
            )
