"""Training-free eviction inside the paged engine, to compare DMC with. For plain models, for evaluation.

One file for each method; `cache` holds what they share.
"""

from megatron_dmc.baselines.cache import EvictingCache, EvictingChunk
from megatron_dmc.baselines.policy import EvictionPolicy, make_policy

__all__ = ["EvictingCache", "EvictingChunk", "EvictionPolicy", "make_policy"]
