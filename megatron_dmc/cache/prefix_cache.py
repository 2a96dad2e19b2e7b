"""Cached prefixes: the cache as it stood after the first tokens of a sequence, to be shared.

At a token boundary every head has its own number of entries. The pages whose entries are all closed
never change again: a snapshot holds them together with the request, by count of owners. The page with
the open entry and the open segment do change: the snapshot has copies, and so does whoever starts
from it.

Dimension letters: L layers, R rows, G key/value heads, M block-table width, P pages, S slots per page,
D head dim, U weighted tokens kept for an open segment, A components of an accumulator.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_dmc.cache.block_tables import BlockTables, OpenSegments


def extend_keys(keys: list[bytes], token_ids: Sequence[int], block_size: int) -> None:
    """Append the keys of the full blocks of `token_ids` that `keys` lacks. Each is a hash of the
    block and of the key before it, so equal keys mean equal prefixes. Mutates `keys`."""
    for end in range((len(keys) + 1) * block_size, len(token_ids) + 1, block_size):
        digest = hashlib.blake2b(keys[-1] if keys else b"", digest_size=16)
        digest.update(array("q", token_ids[end - block_size : end]).tobytes())
        keys.append(digest.digest())


@dataclass
class Snapshot:
    """The cache of a prefix. Self-contained: it needs no shorter prefix's snapshot."""

    key: bytes
    num_tokens: int
    row: int
    """Whose cache it is taken from; meaningless once it is taken."""
    tail_ids_LG: np.ndarray
    """The snapshot's own pages: copies of the pages with the open entries."""
    tail_index_LG: Tensor
    """The same on the device."""
    num_entries_LG: Tensor
    segments_LGUA: Tensor | None
    entries: np.ndarray
    """`num_entries_LG` on the host, once taken."""
    page_ids: np.ndarray
    """The shared pages, head by head in order, once taken."""

    def num_shared(self, page_size: int) -> np.ndarray:
        """Full pages of each head in which every entry is closed, (L, G)."""
        return (self.entries - 1) // page_size


class PrefixCache:
    """Snapshots by key; the least recently used ones make room when pages run short.

    Args:
        block_size: tokens between two boundaries at which snapshots are taken.

    Attributes:
        num_evicted: snapshots given up so far.
    """

    def __init__(self, tables: BlockTables, segments: OpenSegments | None, *, block_size: int):
        self.block_size = block_size
        self.num_evicted = 0
        self._tables, self._segments = tables, segments
        self._snapshots: OrderedDict[bytes, Snapshot] = OrderedDict()
        self._pinned: bytes | None = None
        tables.pool.reclaim = self._evict

    def __len__(self) -> int:
        return len(self._snapshots)

    def find(self, keys: Sequence[bytes]) -> Snapshot | None:
        """The longest prefix that is cached, of those with these keys (shortest first)."""
        return next((self._snapshots[k] for k in reversed(keys) if k in self._snapshots), None)

    def cost(self, snapshot: Snapshot) -> int:
        """Pages that can be allocated less once a row has been started from this snapshot."""
        return snapshot.tail_ids_LG.size + self._tables.pool.count_reclaimable(snapshot.page_ids)

    def peak_cost(self, snapshot: Snapshot) -> int:
        """Pages that must be free or reclaimable for `restore`: it may not evict its own source."""
        return self.cost(snapshot) + snapshot.tail_ids_LG.size

    def restore(self, snapshot: Snapshot, row: int) -> None:
        """Start an open, empty row with the snapshot's tokens in its cache."""
        pool, tables = self._tables.pool, self._tables
        self._snapshots.move_to_end(snapshot.key)
        self._pinned = snapshot.key
        tails = tables.adopt(
            row, snapshot.entries, snapshot.num_shared(pool.page_size), snapshot.page_ids
        )
        self._pinned = None
        index = torch.from_numpy(tails).to(snapshot.tail_index_LG.device)
        pool.copy(snapshot.tail_index_LG, index)
        if self._segments is not None:
            assert snapshot.segments_LGUA is not None
            self._segments.state_LRGUA[:, row] = snapshot.segments_LGUA

    def begin(self, key: bytes, num_tokens: int, row: int) -> Snapshot | None:
        """Prepare to take a snapshot of a row when it will have so many tokens in its cache.

        Returns:
            what `capture` and `finish` complete; None if it is cached already or pages are short.
        """
        pool, tables = self._tables.pool, self._tables
        if key in self._snapshots:
            self._snapshots.move_to_end(key)
            return None
        shape = (tables.num_layers, tables.num_kv_heads)
        count = shape[0] * shape[1]
        if count > pool.num_free + pool.num_reclaimable:
            return None
        tails = pool.allocate(count).reshape(shape)
        device = tables.num_entries_LRG.device
        segments = None
        if self._segments is not None:
            segments = torch.empty_like(self._segments.state_LRGUA[:, row])
        return Snapshot(
            key,
            num_tokens,
            row,
            tails,
            torch.from_numpy(tails).to(device),
            torch.empty(shape, dtype=torch.int64, device=device),
            segments,
            entries=np.zeros(shape, dtype=np.int64),
            page_ids=np.zeros(0, dtype=np.int64),
        )

    def capture(self, snapshot: Snapshot, layer: int) -> None:
        """Copy one layer's open entries' pages, counts and segments as they are now."""
        pool, tables = self._tables.pool, self._tables
        num_entries_G = tables.num_entries_LRG[layer, snapshot.row]
        snapshot.num_entries_LG[layer] = num_entries_G
        column_G1 = ((num_entries_G - 1) // pool.page_size)[:, None]
        source_G = tables.page_ids_LRGM[layer, snapshot.row].gather(1, column_G1)[:, 0].long()
        pool.copy(source_G, snapshot.tail_index_LG[layer])
        if snapshot.segments_LGUA is not None and self._segments is not None:
            snapshot.segments_LGUA[layer] = self._segments.state_LRGUA[layer, snapshot.row]

    def finish(self, snapshot: Snapshot) -> None:
        """All layers are captured and the row still holds its pages: cache the snapshot."""
        pool = self._tables.pool
        if snapshot.key in self._snapshots:  # another request of this step had the same tokens
            pool.free(snapshot.tail_ids_LG)
            return
        snapshot.entries = snapshot.num_entries_LG.cpu().numpy().copy()
        snapshot.page_ids = self._tables.first_pages(
            snapshot.row, snapshot.num_shared(pool.page_size)
        )
        pool.give_to_prefix(snapshot.tail_ids_LG.reshape(-1))
        pool.share(snapshot.page_ids, by_prefix=True)
        self._snapshots[snapshot.key] = snapshot

    def clear(self) -> None:
        """Give up every snapshot."""
        while self._snapshots:
            self._drop(next(iter(self._snapshots)))

    def page_ids(self) -> np.ndarray:
        """Pages of all snapshots, with repetitions."""
        parts = [s.page_ids for s in self._snapshots.values()]
        parts += [s.tail_ids_LG.reshape(-1) for s in self._snapshots.values()]
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])

    def _evict(self, num_pages: int) -> None:
        """Give up the least recently used snapshots until so many pages more are free."""
        pool = self._tables.pool
        wanted = pool.num_free + num_pages
        for key in list(self._snapshots):
            if pool.num_free >= wanted:
                return
            if key != self._pinned:
                self._drop(key)
                self.num_evicted += 1

    def _drop(self, key: bytes) -> None:
        snapshot = self._snapshots.pop(key)
        self._tables.pool.free(snapshot.page_ids, by_prefix=True)
        self._tables.pool.free(snapshot.tail_ids_LG, by_prefix=True)
