"""The paged cache: who holds which page, and where a request's heads keep their entries."""

from megatron_dmc.cache.block_tables import BlockTables, OpenSegments
from megatron_dmc.cache.late_copy import LateCopy
from megatron_dmc.cache.page_pool import PagePool
from megatron_dmc.cache.prefix_cache import PrefixCache, Snapshot, extend_keys

__all__ = [
    "BlockTables",
    "LateCopy",
    "OpenSegments",
    "PagePool",
    "PrefixCache",
    "Snapshot",
    "extend_keys",
]
