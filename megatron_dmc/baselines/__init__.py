"""What DMC is compared with, one file per method, stated from its paper.

GQA is a conversion (`gqa`). The others evict entries inside the paged engine, without training: for
evaluation, of plain models. `cache` holds what they share.
"""

from megatron_dmc.baselines.cache import EvictingCache, EvictingChunk
from megatron_dmc.baselines.policy import EvictionPolicy, make_policy
from megatron_dmc.baselines.rule import EvictionRule

__all__ = ["EvictingCache", "EvictingChunk", "EvictionPolicy", "EvictionRule", "make_policy"]
