"""The paged cache: who holds which page, and where a request's heads keep their entries."""

from megatron_dmc.cache.async_copy import AsyncCopy
from megatron_dmc.cache.pool import PagePool
from megatron_dmc.cache.prefixes import PrefixCache, Snapshot, extend_keys
from megatron_dmc.cache.segments import OpenSegments
from megatron_dmc.cache.tables import BlockTables

__all__ = [
    "AsyncCopy",
    "BlockTables",
    "OpenSegments",
    "PagePool",
    "PrefixCache",
    "Snapshot",
    "extend_keys",
]
