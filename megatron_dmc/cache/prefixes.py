"""Cached prefixes: snapshots of the cache after the first tokens of a sequence, for sharing.

At a token boundary every head has its own number of entries. The pages whose entries are all closed
never change again: a snapshot shares them with the request, by reference count. The page with the
open entry and the open segment do change: the snapshot has copies, and so has every request started
from it.

With a delay a head's first pages are its ring's. They are written again and again, so they are copied like
the page with the open entry, and so are the ring's decisions. Where tokens are evicted, a head may have no entries:
its last page is then the ring's, and it is copied twice.

Dimension letters: L layers, R rows, G key/value heads, M block-table width, P pages, S slots per page,
D head dim, U weighted tokens kept for an open segment, A components of an accumulator.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatron_dmc.cache.counts import Run
from megatron_dmc.cache.tables import BlockTables, CopiedCounts


def extend_keys(
    keys: list[bytes], token_ids: Sequence[int], block_size: int, *, salt: str | None = None
) -> None:
    """Append the keys of the full blocks of `token_ids`, which follow the blocks that have keys. Each is a
    hash of the block and of the key before it, so equal keys mean equal prefixes. Mutates `keys`.

    Args:
        salt: precedes the first block: equal keys mean equal salts too.
    """
    for end in range(block_size, len(token_ids) + 1, block_size):
        digest = hashlib.blake2b(keys[-1] if keys else _salt_key(salt), digest_size=16)
        digest.update(array("q", token_ids[end - block_size : end]).tobytes())
        keys.append(digest.digest())


def _salt_key(salt: str | None) -> bytes:
    if salt is None:
        return b""
    data = salt.encode(errors="surrogatepass")
    return hashlib.blake2b(data, digest_size=16, person=b"cache_salt").digest()


@dataclass
class Snapshot:
    """The cache of a prefix. Self-contained: it needs no shorter prefix's snapshot. Tensors are on the
    device, int32 page ids and int64 counts."""

    key: bytes
    num_tokens: int
    row: int
    """The row that it is captured from; meaningless afterwards."""
    own_ids_LGX: Tensor
    """The snapshot's own pages: copies of the rings' pages and, last, of the pages with the open entries."""
    num_entries_LG: Tensor
    state: list[Tensor]
    """The row's part of what the strategy keeps besides pages."""
    page_ids_LGM: Tensor | None = None
    """After the capture: the shared pages, in which every entry is closed; -1 elsewhere."""
    runs: list[Run] = field(default_factory=list)
    """The same as counts, once known."""
    entries_KLG: np.ndarray | None = None
    """Entries on all ranks, once known."""

    def own_columns_LGX(self, page_size: int) -> Tensor:
        """Columns of the block table that `own_ids_LGX` are copies of; those between are shared. The last two are
        the same in a head without entries."""
        ring_X = torch.arange(self.own_ids_LGX.shape[-1] - 1, device=self.own_ids_LGX.device)
        last_LG1 = ((self.num_entries_LG - 1) // page_size)[..., None]
        return torch.cat([ring_X.expand(*last_LG1.shape[:2], -1), last_LG1], dim=-1)


class PrefixCache:
    """Snapshots by key; the least recently used ones are reclaimed when pages run short.

    Args:
        state: tensors (L, R, ...) that belong to a row besides its pages.
        block_size: tokens between two boundaries at which snapshots are captured.
        num_ring_pages: pages that each head's ring fills, none of them with entries.

    Attributes:
        num_reclaimed: snapshots reclaimed so far.
    """

    def __init__(
        self,
        tables: BlockTables,
        state: Sequence[Tensor] = (),
        *,
        block_size: int,
        num_ring_pages: int = 0,
    ):
        self.block_size = block_size
        self._num_ring_pages = num_ring_pages
        self.num_reclaimed = 0
        self._tables, self._state = tables, list(state)
        self._num_own = tables.num_layers * tables.num_kv_heads * (num_ring_pages + 1)
        self._snapshots: OrderedDict[bytes, Snapshot] = OrderedDict()
        self._pinned: bytes | None = None
        tables.make_room = self._make_room

    def __len__(self) -> int:
        return len(self._snapshots)

    def find(self, keys: Sequence[bytes]) -> Snapshot | None:
        """The longest cached prefix among these keys (shortest first). Waits for the step that captured it."""
        found = next((self._snapshots[k] for k in reversed(keys) if k in self._snapshots), None)
        if found is not None and found.entries_KLG is None:
            self._tables.update_counts()
        return found

    def cost(self, snapshot: Snapshot) -> int:
        """Free pages consumed, on the tightest rank, by starting a row from this snapshot."""
        only_prefixes_XK = [run.only_prefixes_K for run in snapshot.runs]
        return self._num_own + int(np.sum(only_prefixes_XK, axis=0).max())

    def peak_cost(self, snapshot: Snapshot) -> int:
        """Pages that must be free or reclaimable for `restore`: it may not reclaim its own source."""
        return self.cost(snapshot) + self._num_own

    def restore(self, snapshot: Snapshot, row: int) -> None:
        """Start an open, empty row with the snapshot's tokens in its cache."""
        pool, tables = self._tables.pool, self._tables
        self._snapshots.move_to_end(snapshot.key)
        self._pinned = snapshot.key
        tables.take_room(self._num_own)
        self._pinned = None
        own_LGX = pool.take(self._num_own).view(snapshot.own_ids_LGX.shape)
        assert snapshot.page_ids_LGM is not None and snapshot.entries_KLG is not None
        columns_LGX = snapshot.own_columns_LGX(pool.page_size)
        pool.copy(snapshot.own_ids_LGX, own_LGX)
        if self._num_ring_pages:
            is_double_LG = columns_LGX[..., -1] < self._num_ring_pages
            doubles_LG = torch.where(is_double_LG, own_LGX[..., -1], -1)
            own_LGX[..., -1] = torch.where(is_double_LG, own_LGX[..., -2], own_LGX[..., -1])
            pool.release(doubles_LG)
        tables.adopt(
            row, snapshot.page_ids_LGM, columns_LGX, own_LGX,
            snapshot.num_entries_LG, snapshot.entries_KLG, snapshot.runs,
        )  # fmt: skip
        for of_rows, kept in zip(self._state, snapshot.state, strict=True):
            of_rows[:, row] = kept

    def begin(self, key: bytes, num_tokens: int, row: int) -> Snapshot | None:
        """Prepare to capture a snapshot of a row at a future number of tokens in its cache.

        Returns:
            a snapshot that `capture` and `finish` complete; None if it is cached already, pages are short, or
            the tokens are all in the rings.
        """
        tables = self._tables
        if key in self._snapshots:
            self._snapshots.move_to_end(key)
            return None
        if num_tokens <= self._num_ring_pages * tables.pool.page_size:
            return None
        if not tables.may_take(self._num_own):
            return None
        tables.take_room(self._num_own)
        tables.counts.num_unfinished += self._num_own
        own = tables.pool.take(self._num_own).view(tables.num_layers, tables.num_kv_heads, -1)
        num_entries = torch.empty_like(tables.num_entries_LRG[:, row])
        state = [torch.empty_like(x[:, row]) for x in self._state]
        return Snapshot(key, num_tokens, row, own, num_entries, state)

    def capture(self, snapshot: Snapshot, layers: slice) -> None:
        """Copy these layers' own pages, counts and state as they are now."""
        pool, tables, row = self._tables.pool, self._tables, snapshot.row
        snapshot.num_entries_LG[layers] = tables.num_entries_LRG[layers, row]
        columns_LGX = snapshot.own_columns_LGX(pool.page_size)[layers]
        source_LGX = tables.page_ids_LRGM[layers, row].gather(-1, columns_LGX)
        pool.copy(source_LGX, snapshot.own_ids_LGX[layers])
        for of_rows, kept in zip(self._state, snapshot.state, strict=True):
            kept[layers] = of_rows[layers, row]

    def finish(self, snapshot: Snapshot) -> CopiedCounts | None:
        """All layers are captured and the row still holds its pages: cache the snapshot.

        Returns:
            the accounting of its pages; None if it is not needed.
        """
        pool, tables = self._tables.pool, self._tables
        tables.counts.num_unfinished -= self._num_own
        if snapshot.key in self._snapshots:  # another request of this step has the same tokens
            pool.release(snapshot.own_ids_LGX.flatten(1))
            return None
        tables.counts.hold_tails(self._num_own)
        # a head has at most the pages for the prefix's tokens
        width = -(-snapshot.num_tokens // pool.page_size)
        table_LGM = tables.page_ids_LRGM[:, snapshot.row, :, :width]
        columns_M = torch.arange(table_LGM.shape[-1], device=table_LGM.device)
        last_LG1 = snapshot.own_columns_LGX(pool.page_size)[..., -1:]
        is_shared = (columns_M >= self._num_ring_pages) & (columns_M < last_LG1)
        snapshot.page_ids_LGM = torch.where(is_shared, table_LGM, -1)
        pool.add_owner(snapshot.page_ids_LGM)
        self._snapshots[snapshot.key] = snapshot

        def on_copied(entries_KLG: np.ndarray) -> None:
            snapshot.entries_KLG = entries_KLG
            full_KLG = (entries_KLG - 1) // pool.page_size - self._num_ring_pages
            snapshot.runs = tables.counts.add_run(snapshot.row, full_KLG.clip(min=0))

        return CopiedCounts(snapshot.row, snapshot.num_entries_LG, on_copied)

    def clear(self) -> None:
        """Drop every snapshot."""
        while self._snapshots:
            self._drop(next(iter(self._snapshots)))

    def page_ids(self) -> Tensor:
        """Pages of all snapshots, with repetitions and with -1 for none."""
        parts = [self._tables.page_ids_LRGM.new_empty(0)]
        for snapshot in self._snapshots.values():
            assert snapshot.page_ids_LGM is not None
            parts += [snapshot.page_ids_LGM.flatten(), snapshot.own_ids_LGX.flatten()]
        return torch.cat(parts)

    def _make_room(self, num_pages: int) -> None:
        """Reclaim the least recently used snapshots until `num_pages` pages are free on every rank."""
        counts = self._tables.counts
        if bool((counts.free_K < num_pages).any()):
            self._tables.count_landed()
        for key in list(self._snapshots):
            if bool((counts.free_K >= num_pages).all()):
                return
            if key != self._pinned:
                self._drop(key)
                self.num_reclaimed += 1

    def _drop(self, key: bytes) -> None:
        pool, counts = self._tables.pool, self._tables.counts
        snapshot = self._snapshots.pop(key)
        if snapshot.entries_KLG is None:
            self._tables.update_counts()
        assert snapshot.page_ids_LGM is not None
        counts.drop_prefix(snapshot.runs)
        counts.hold_tails(-self._num_own)
        pool.release(snapshot.page_ids_LGM.flatten(1))
        pool.release(snapshot.own_ids_LGX.flatten(1))
