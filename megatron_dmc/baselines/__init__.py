"""Training-free eviction inside the paged engine, to compare DMC with: for evaluation, of plain models.

One file for each method; `cache` holds what they share.
"""

from megatron_dmc.baselines.cache import EvictingCache, EvictingChunk
from megatron_dmc.baselines.policy import EvictionPolicy, make_policy
from megatron_dmc.baselines.rule import EvictionRule

__all__ = ["EvictingCache", "EvictingChunk", "EvictionPolicy", "EvictionRule", "make_policy"]
