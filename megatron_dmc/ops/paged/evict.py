"""Append, prefill and attention over a paged cache that evicts after a delay (DMS). docs/method.md,
section 8.

A token that leaves the cache gives its slot to the token that comes then: entries are only ever
appended or overwritten, a head's pages hold what the head holds, and the order of entries means nothing
(keys are rotated at their own positions). With n = delay + 1, token t takes the entry of token t - n if
that one was evicted, and a new entry otherwise.

Dimension letters as in `ops.paged.decode`; H heads of any requests, K slots of a ring (n).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_dmc.ops import rope
from megatron_dmc.ops.paged.kv_pages import as_stored
from megatron_dmc.ops.paged.layer_cache import LayerCache

_QUERY_BLOCK = 256
"""Queries of a chunk whose masks exist at a time."""
_NEVER = torch.iinfo(torch.int64).max


@dataclass
class Rings:
    """The latest n tokens of every head: token t is at t mod n.

    Attributes:
        entry_XGK: int32, the token's entry; undefined before there is one.
        is_evicted_XGK: bool, its decision, known once the next token has come.
    """

    entry_XGK: Tensor
    is_evicted_XGK: Tensor

    def __getitem__(self, index) -> "Rings":
        return Rings(self.entry_XGK[index], self.is_evicted_XGK[index])


def place_tokens(
    is_evict_TH: Tensor, positions_H: Tensor, num_entries_H: Tensor, rings: Rings
) -> tuple[Tensor, Tensor, Tensor, Rings]:
    """Assign the entries of a chunk's tokens, head by head.

    Args:
        is_evict_TH: bool; row t evicts the token before it. Ignored where there is none.
        positions_H: int64, of each head's first token.
        num_entries_H: int64, before the chunk.
        rings: (H, K).

    Returns:
        entry_TH, int64; is_written_TH, false where a later token of the chunk takes the entry;
        num_entries_H afterwards, and the rings afterwards. Nothing is mutated.
    """
    num_tokens, num_slots = is_evict_TH.shape[0], rings.entry_XGK.shape[-1]
    device = is_evict_TH.device
    # tokens -n .. T-1 relative to the chunk's first
    age = torch.arange(-num_slots, 0, device=device)
    slot_HK = (positions_H[:, None] + age) % num_slots
    exists_HK = positions_H[:, None] + age >= 0
    entry = torch.cat([
        rings.entry_XGK.gather(-1, slot_HK).long(),
        num_entries_H.new_zeros(num_entries_H.shape[0], num_tokens),
    ], dim=1)  # fmt: skip
    evicted = torch.cat([
        rings.is_evicted_XGK.gather(-1, slot_HK) & exists_HK,
        is_evict_TH.new_zeros(is_evict_TH.shape[1], num_tokens),
    ], dim=1)  # fmt: skip
    before = evicted[:, num_slots - 1 : num_slots - 1 + num_tokens]
    before |= is_evict_TH.T
    before[:, 0] &= positions_H > 0
    reuses = evicted[:, :num_tokens]
    new = num_entries_H[:, None] + (~reuses).cumsum(1) - 1
    for start in range(0, num_tokens, num_slots):
        end = min(start + num_slots, num_tokens)
        entry[:, num_slots + start : num_slots + end] = torch.where(
            reuses[:, start:end], entry[:, start:end], new[:, start:end]
        )
    is_written = torch.ones_like(is_evict_TH)
    if num_tokens > num_slots:
        is_written[: num_tokens - num_slots] = ~reuses[:, num_slots:].T
    # the last n of them, each to its place
    last = positions_H[:, None] + num_tokens + age
    slot_HK = last % num_slots
    after = Rings(
        torch.empty_like(rings.entry_XGK).scatter_(
            -1, slot_HK, entry[:, num_tokens:].to(rings.entry_XGK.dtype)
        ),
        torch.empty_like(rings.is_evicted_XGK).scatter_(-1, slot_HK, evicted[:, num_tokens:]),
    )
    return entry[:, num_slots:].T, is_written, new[:, -1] + 1, after


def decode_evict(
    cache: LayerCache,
    rows_B: Tensor,
    k_BGD: Tensor,
    v_BGD: Tensor,
    is_evict_BG: Tensor,
    freqs_BF: Tensor | None,
    positions_B: Tensor,
    rings: Rings,
) -> None:
    """One new token for each of B requests into the slot of the token that leaves, or a new one.

    Mutates `cache` (without segments) and `rings` (R, G, K).

    Args:
        rows_B: int64, each request's row; distinct, none of them padding.
        k_BGD, v_BGD: unrotated keys, their borrowed channel ignored; values.
        is_evict_BG: bool, about each request's token before this one.
        positions_B: int64, of the tokens.
    """
    batch, num_kv_heads = is_evict_BG.shape
    old = rings[rows_B]
    entry_1H, _, num_entries, after = place_tokens(
        is_evict_BG.reshape(1, -1),
        positions_B.repeat_interleave(num_kv_heads),
        cache.num_entries_RG[rows_B].flatten(),
        Rings(old.entry_XGK.flatten(0, 1), old.is_evicted_XGK.flatten(0, 1)),
    )
    num_entries_BG = num_entries.view(batch, num_kv_heads)
    cache.take_pages(rows_B, num_entries_BG)
    slots = cache.slots(rows_B, entry_1H.view(batch, num_kv_heads, 1))
    key = rope.rotate_by(k_BGD, freqs_BF, compress=True)
    cache.store(slots.flatten(), key.flatten(0, 1), v_BGD.flatten(0, 1))
    cache.num_entries_RG[rows_B] = num_entries_BG
    rings.entry_XGK[rows_B] = after.entry_XGK.view_as(old.entry_XGK)
    rings.is_evicted_XGK[rows_B] = after.is_evicted_XGK.view_as(old.is_evicted_XGK)


def prefill_evict(
    cache: LayerCache,
    row: int,
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    is_evict_TG: Tensor,
    freqs_TF: Tensor | None,
    position: int,
    rings: Rings,
    *,
    softmax_scale: float,
) -> Tensor:
    """A chunk of one request's tokens in parallel: any chunking gives what decoding the tokens one at
    a time gives. Tokens that have left by the end of the chunk are not written.

    Mutates the row's part of `cache` (without segments) and `rings` (R, G, K).

    Args:
        q_TND, k_TGD: unrotated, their borrowed channel ignored. v_TGD: values.
        is_evict_TG: bool, row t about the token before it.
        position: of the chunk's first token.

    Returns:
        out_TND in the queries' dtype.
    """
    num_tokens, num_kv_heads = is_evict_TG.shape
    if num_tokens == 0:
        return torch.zeros_like(q_TND)
    rings, num_entries_G = rings[row], cache.num_entries_RG[row]
    device, num_slots = q_TND.device, rings.entry_XGK.shape[-1]
    q = rope.rotate_by(q_TND, freqs_TF, compress=True)
    k = rope.rotate_by(k_TGD, freqs_TF, compress=True)

    # the position from which on each key is gone: of cached entries, and of the chunk's tokens
    old_k, old_v, is_entry = cache.load(row, q.dtype)
    ring_slots = torch.arange(num_slots, device=device)
    token_K = position - 1 - (position - 1 - ring_slots) % num_slots
    evicted_GK = rings.is_evicted_XGK.clone()
    if position:
        evicted_GK[:, (position - 1) % num_slots] |= is_evict_TG[0]
    gone_GK = torch.where(evicted_GK & (token_K >= 0), token_K + num_slots, _NEVER)
    gone_GE = torch.full(is_entry.shape, _NEVER, device=device)
    if old_k.shape[1]:
        # of several tokens in a slot of the ring only the last is there, so no entry is named twice
        known = (token_K >= 0).expand(num_kv_heads, -1)
        at = torch.where(known, rings.entry_XGK.long(), 0)
        gone_GE = gone_GE.scatter_reduce(-1, at, torch.where(known, gone_GK, _NEVER), "amin")
    gone_GE = gone_GE.masked_fill(~is_entry, 0)
    tokens = position + torch.arange(num_tokens, device=device)
    next_evicts = torch.cat([is_evict_TG[1:], torch.zeros_like(is_evict_TG[:1])])
    gone_GT = torch.where(next_evicts.T, tokens + num_slots, _NEVER)

    # with 8-bit pages a token sees its chunk as the cache would give it back
    keys = torch.cat([old_k, as_stored(k, cache.k_pages_PSD).transpose(0, 1)], dim=1)
    values = torch.cat([old_v, as_stored(v_TGD, cache.v_pages_PSD).transpose(0, 1)], dim=1)
    gone = torch.cat([gone_GE, gone_GT], dim=1)
    since = torch.cat([tokens.new_zeros(old_k.shape[1]), tokens])
    group = q.shape[1] // num_kv_heads
    outs = []
    for q_XND, tokens_X in zip(
        q.split(_QUERY_BLOCK), tokens[:, None].split(_QUERY_BLOCK), strict=True
    ):
        is_visible_GXK = (since <= tokens_X) & (tokens_X < gone[:, None])
        outs.append(
            scaled_dot_product_attention(
                q_XND.transpose(0, 1)[None], keys[None], values[None],
                attn_mask=is_visible_GXK.repeat_interleave(group, dim=0)[None],
                scale=softmax_scale, enable_gqa=group > 1,
            )[0].transpose(0, 1)
        )  # fmt: skip

    entry_TG, is_written, num_entries, after = place_tokens(
        is_evict_TG, torch.full_like(num_entries_G, position), num_entries_G, rings
    )
    cache.take_pages(row, num_entries)
    slots = torch.where(is_written, cache.slots(row, entry_TG.T).T, -1).flatten()
    cache.store(slots, k.flatten(0, 1), v_TGD.flatten(0, 1))
    num_entries_G.copy_(num_entries)
    rings.entry_XGK.copy_(after.entry_XGK)
    rings.is_evicted_XGK.copy_(after.is_evicted_XGK)
    return torch.cat(outs)
