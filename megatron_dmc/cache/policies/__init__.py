"""Training-free eviction policies (H2O, TOVA, window), one file per method, each stated from its paper.

They evict entries inside the paged engine, for evaluation, from the cache of a plain model;
`cache.strategies.budget` applies them.
"""

from megatron_dmc.cache.policies.base import EvictionPolicy
from megatron_dmc.cache.policies.h2o import H2O
from megatron_dmc.cache.policies.tova import TOVA
from megatron_dmc.cache.policies.window import Window
from megatron_dmc.errors import UnsupportedConfig

POLICIES: dict[str, type[EvictionPolicy]] = {p.name: p for p in (H2O, TOVA, Window)}


def make_policy(name: str) -> EvictionPolicy:
    """The policy of this name.

    Raises:
        UnsupportedConfig: there is none.
    """
    if name not in POLICIES:
        raise UnsupportedConfig(f"cache_policy={name!r}: use one of {', '.join(POLICIES)}")
    return POLICIES[name]()


__all__ = ["POLICIES", "EvictionPolicy", "make_policy"]
