"""The compressed KV cache, a `Cache` of transformers: as many entries as there are, per row and head.

Dimension letters: T tokens, B batch, G key/value heads, D head dim, E cache entries, P slots of a
layer's pool, W merge window, U weighted tokens kept of an open segment, A = 2 D + 1 components of one.

The rows of a `Ring` and the new tokens together are the *line*: a row's X tokens one after the other, its padding
behind them.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from .ops_dmc import merge_sums, weigh


class Line(NamedTuple):
    """The tokens of a ring and the new ones behind them.

    Attributes:
        values: tensors (X, B, ...), as they were given.
        before_B: tokens of each row that were in the ring.
        late_TB: bool: the row's token leaves the ring. Such tokens come first.
    """

    values: list[Tensor]
    before_B: Tensor
    late_TB: Tensor


class Ring:
    """The last n tokens of every row of a batch: tensors (n, B, ...), oldest first."""

    def __init__(self, n: int):
        self.n = n
        self.values: list[Tensor] | None = None
        self.count_B: Tensor | None = None

    def pass_through(self, new: list[Tensor], real_TB: Tensor | None) -> Line:
        """Put new tokens (T, B, ...) behind those of the ring, which then holds the last ones."""
        num_tokens, batch = new[0].shape[:2]
        device, n = new[0].device, self.n
        if self.values is None or self.count_B is None:
            self.values = [x.new_zeros(n, *x.shape[1:]) for x in new]
            self.count_B = torch.zeros(batch, dtype=torch.int64, device=device)
        before_B = self.count_B
        length_B = torch.full_like(before_B, num_tokens) if real_TB is None else real_TB.sum(0)
        rows = torch.arange(batch, device=device)
        place = torch.arange(n + num_tokens, device=device)[:, None]
        at = torch.where(place < before_B, place, place - before_B + n)
        at = at.clamp_max(n + num_tokens - 1)
        line = [
            torch.cat([old, x.to(old.dtype)])[at, rows]
            for old, x in zip(self.values, new, strict=True)
        ]
        total_B = before_B + length_B
        self.count_B = total_B.clamp_max(n)
        kept = total_B - self.count_B + torch.arange(n, device=device)[:, None]
        kept = kept.clamp_max(n + num_tokens - 1)
        self.values = [x[kept, rows].detach() for x in line]
        late_TB = torch.arange(num_tokens, device=device)[:, None] < total_B - self.count_B
        return Line(line, before_B, late_TB)

    def select(self, rows: Tensor) -> None:
        """Keep the given rows, in this order and possibly more than once."""
        if self.values is not None and self.count_B is not None:
            self.values = [x[:, rows] for x in self.values]
            self.count_B = self.count_B[rows]


class DMCLayer(CacheLayerMixin):
    """One layer: a pool of entries shared by all rows and heads, and where each head's entries are.

    `keys` and `values` (P, D) hold rotated, merged entries; an open segment's entry is its head's newest.
    The open segments themselves are kept unrotated in float32, since the next token may join them.
    """

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self):
        super().__init__()
        self.num_tokens = 0
        self.ring: Ring | None = None

    def pass_ring(self, n: int, new: list[Tensor], real_TB: Tensor | None) -> Line:
        """Put new tokens into the ring of the last n; see `Ring.pass_through`."""
        if self.ring is None:
            self.ring = Ring(n)
        return self.ring.pass_through(new, real_TB)

    def num_slots_BG(self) -> Tensor:
        """Entries and raw tokens."""
        if self.ring is None or self.ring.count_B is None:
            return self.num_entries_BG
        return self.num_entries_BG + self.ring.count_B[:, None]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Empty, for (T, B, G, D) keys and values."""
        _, batch, heads, dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states.new_empty(0, dim), value_states.new_empty(0, dim)
        self.num_used = 0
        self.slot_BGE = torch.empty(batch, heads, 0, dtype=torch.int32, device=self.device)
        self.num_entries_BG = torch.zeros(batch, heads, dtype=torch.int64, device=self.device)
        self.segment_UBGA: Tensor | None = None
        self.is_initialized = True

    def continue_segment(
        self,
        k_TBGD: Tensor,
        v_TBGD: Tensor,
        alpha_TBG: Tensor,
        omega_TBG: Tensor,
        merge_window: int,
        real_TB: Tensor | None,
    ) -> Tensor:
        """Merge new tokens, continuing the open segments (which are moved on).

        Returns:
            their sums, (T, B, G, A).
        """
        x = weigh(k_TBGD, v_TBGD, omega_TBG)
        kept = max(merge_window, 1)
        if not self.is_initialized:
            self.lazy_initialization(k_TBGD, v_TBGD)
        if self.segment_UBGA is None:
            self.segment_UBGA = x.new_zeros(kept, *x.shape[1:])
        # what is kept stands before the new tokens as tokens that all merge
        alpha = torch.cat([x.new_ones(kept, *x.shape[1:3]), alpha_TBG.to(x.dtype)])
        x = torch.cat([self.segment_UBGA, x])
        sums = merge_sums(alpha, x, merge_window)
        if real_TB is None:
            length_B = x.new_full((x.shape[1],), x.shape[0] - kept, dtype=torch.int64)
        else:
            length_B = real_TB.sum(0)
        latest_UB = length_B + torch.arange(kept, device=x.device)[:, None]
        rows = torch.arange(x.shape[1], device=x.device)
        if merge_window:
            # a token is still part of the open segment if everything after it merged
            after = torch.cat([alpha[latest_UB, rows][1:], torch.ones_like(alpha[:1])])
            alive = after.flip(0).cumprod(0).flip(0)
            segment = x[latest_UB, rows] * alive[..., None]
        else:
            segment = sums[latest_UB, rows]
        self.segment_UBGA = segment.detach()
        return sums[kept:]

    def update(  # type: ignore[override]
        self, k_TBGD: Tensor, v_TBGD: Tensor, is_merge_TBG: Tensor, real_TB: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cache new tokens' states: the last of each segment, in place of an older one of it.

        Args:
            k_TBGD, v_TBGD: rotated merged keys, merged values.
            real_TB: see `ForwardState`. (T, B, G): False for what is not cached in a head.

        Returns:
            keys and values (E, B, G, D), the entries that were cached before and then the new states;
            visible_BGP, bool: which of the former exist and are not superseded.
        """
        if not self.is_initialized:
            self.lazy_initialization(k_TBGD, v_TBGD)
        merges = is_merge_TBG.permute(1, 2, 0)
        before = self.num_entries_BG
        entry = torch.arange(self.slot_BGE.shape[-1], device=self.device)
        visible = entry < (before - merges[..., 0].long())[..., None]
        slots = self.slot_BGE.long().permute(2, 0, 1).clamp_min(0)
        k, v = torch.cat([self.keys[slots], k_TBGD]), torch.cat([self.values[slots], v_TBGD])

        if real_TB is None:
            real = torch.ones_like(merges)
        elif real_TB.dim() == 2:
            real = real_TB.T[:, None].expand_as(merges)
        else:
            real = real_TB.permute(1, 2, 0)
        appends = real & ~merges
        self.num_entries_BG = before + appends.sum(-1)
        self._reserve(before)
        # the last state of a segment stays: its successor appends, is padding, or is not there
        stays = real & F.pad(~real[..., 1:] | appends[..., 1:], (0, 1), value=True)
        if stays.any():
            entry_BGT = (before[..., None] - 1 + appends.cumsum(-1)).clamp_min(0)
            target = self.slot_BGE.gather(-1, entry_BGT)[stays].long()
            self.keys[target] = k_TBGD.detach().permute(1, 2, 0, 3)[stays]
            self.values[target] = v_TBGD.detach().permute(1, 2, 0, 3)[stays]
        self.num_tokens += k_TBGD.shape[0]
        return k, v, visible

    def _reserve(self, before_BG: Tensor) -> None:
        """Slots for the entries from `before_BG` to `num_entries_BG`; the pool grows by an eighth."""
        longest = int(self.num_entries_BG.max())
        self.slot_BGE = F.pad(self.slot_BGE, (0, longest - self.slot_BGE.shape[-1]), value=-1)
        entry = torch.arange(longest, device=self.device)
        new = (entry >= before_BG[..., None]) & (entry < self.num_entries_BG[..., None])
        wanted = self.num_used + int(new.sum())
        numbers = torch.arange(self.num_used, wanted, dtype=torch.int32, device=self.device)
        self.slot_BGE[new] = numbers
        self.num_used = wanted
        capacity = self.keys.shape[0]
        if wanted > capacity:
            grown = wanted if capacity == 0 else max(wanted, capacity + capacity // 8)
            self.keys = F.pad(self.keys, (0, 0, 0, grown - capacity))
            self.values = F.pad(self.values, (0, 0, 0, grown - capacity))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """In tokens."""
        return self.num_tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens, padding included; entries are fewer."""
        return self.num_tokens

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a merged token cannot be taken back out of its entry."""
        if tokens_to_remove:
            raise ValueError(
                "a DMC cache cannot forget tokens: they are merged into its entries; generate without "
                "an assistant model or prompt lookup"
            )

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized = False
        self.num_tokens = 0
        self.ring = None
        self.keys = self.values = torch.empty(0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows, in this order and possibly more than once."""
        if not self.is_initialized:
            return
        indices = indices.to(self.device)
        slots, self.num_entries_BG = self.slot_BGE[indices], self.num_entries_BG[indices]
        exists = slots >= 0
        chosen = slots[exists].long()
        self.keys, self.values = self.keys[chosen], self.values[chosen]
        self.num_used = chosen.shape[0]
        self.slot_BGE = torch.full_like(slots, -1)
        self.slot_BGE[exists] = torch.arange(self.num_used, dtype=torch.int32, device=self.device)
        if self.segment_UBGA is not None:
            self.segment_UBGA = self.segment_UBGA[:, indices]
        if self.ring is not None:
            self.ring.select(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select the rows of the continued beams."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        if self.is_initialized:
            rows = torch.arange(self.num_entries_BG.shape[0], device=self.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def num_bytes(self) -> int:
        """Bytes of everything that is kept: entries, slots, counts, open segments and raw tokens."""
        kept = [self.keys, self.values, self.slot_BGE, self.num_entries_BG, self.segment_UBGA]
        kept += [] if self.ring is None else self.ring.values or []
        return sum(t.numel() * t.element_size() for t in kept if t is not None)


class DMCCache(Cache):
    """A model's compressed cache. It has a length in tokens (`get_seq_length`) and, for every layer,
    row and KV head, a number of entries."""

    layers: list[DMCLayer]

    def __init__(self):
        super().__init__(layer_class_to_replicate=DMCLayer)
        self.num_real_B: Tensor | int = 0

    def layer(self, layer_idx: int) -> DMCLayer:
        """The layer's part, made when first asked for."""
        while len(self.layers) <= layer_idx:
            self.layers.append(DMCLayer())
        return self.layers[layer_idx]

    def count(self, batch: int, num_tokens: int, real_BT: Tensor | None) -> None:
        """After a forward: its tokens, padding left out, are cached."""
        device = self.layers[0].device
        new = (
            torch.full((batch,), num_tokens, device=device)
            if real_BT is None
            else real_BT.sum(1).to(device)
        )
        self.num_real_B = self.num_real_B + new

    def real_tokens(self, device: torch.device) -> Tensor:
        """Tokens of each row, padding left out; (B,), or a scalar 0 for an empty cache."""
        return torch.as_tensor(self.num_real_B, device=device)

    def num_entries(self) -> int:
        """Entries, and raw tokens of a delay, over all layers, rows and KV heads."""
        return sum(int(layer.num_slots_BG().sum()) for layer in self.layers)

    def compression_ratio(self) -> float:
        """Tokens / entries: what an uncompressed cache would hold (without padding) by what this does."""
        heads = sum(layer.num_entries_BG.shape[1] for layer in self.layers)
        assert isinstance(self.num_real_B, Tensor), "the cache is empty"
        return int(self.num_real_B.sum()) * heads / max(1, self.num_entries())

    def num_bytes(self) -> int:
        """Bytes of everything that is kept."""
        return sum(layer.num_bytes() for layer in self.layers)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.num_real_B = 0

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows, in this order and possibly more than once."""
        super().batch_select_indices(indices)
        if isinstance(self.num_real_B, Tensor):
            self.num_real_B = self.num_real_B[indices.to(self.num_real_B.device)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select the rows of the continued beams."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        if isinstance(self.num_real_B, Tensor):
            self.num_real_B = self.num_real_B.repeat_interleave(repeats)
