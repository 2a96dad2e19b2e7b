"""Training-free eviction policies (H2O, TOVA, window), one file per method, each stated from its paper.

They evict entries inside the paged engine, for evaluation, from the cache of a plain model;
`cache.budget` applies them.
"""

from megatron_dmc.cache.policies.base import EvictionPolicy, make_policy
from megatron_dmc.cache.policies.rule import EvictionRule

__all__ = ["EvictionPolicy", "EvictionRule", "make_policy"]
