"""Sizes and policies of the engine."""

from dataclasses import dataclass
from typing import get_args

from megatron_dmc.baselines import EvictionRule
from megatron_dmc.engine.scheduler import SchedulingPolicy
from megatron_dmc.errors import UnsupportedConfig


@dataclass
class EngineConfig:
    """Sizes of the engine. Validated at construction: `UnsupportedConfig` names the field."""

    max_model_len: int
    """Longest sequence, prompt and completion together."""

    num_pages: int
    """Pages of the cache, over all layers and KV heads."""

    page_size: int = 16
    """Slots per page."""

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

    cache_policy: str | None = None
    """"h2o", "tova" or "window": evict entries instead of merging (megatron_dmc.baselines); for
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
        if self.scheduling_policy not in get_args(SchedulingPolicy):
            raise UnsupportedConfig(
                f"scheduling_policy={self.scheduling_policy!r}: use 'fcfs' or 'priority'"
            )

    @property
    def eviction(self) -> EvictionRule | None:
        """The policy and its budget, if any."""
        if self.cache_policy is None or self.cache_budget is None:
            return None
        return EvictionRule(self.cache_policy, self.cache_budget)
