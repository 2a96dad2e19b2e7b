"""Prefill of a paged cache whose tokens merge, or are evicted (DMS), after a delay; `gate_and_append` has decoding.
docs/method.md, sections 8 and 9.

The latest w tokens of a head lie raw in the first w slots of its block table, token t in slot t mod w
(the ring); the entries follow. The order of slots means nothing to attention, since keys are rotated at
their own positions, so decode attention is the one of `ops.paged.decode` over all slots: `num_entries` counts
those of the ring too. A new token takes the slot of the token w before it, which leaves the ring and
merges into the open segment or becomes an entry, as it decided when it came. Where tokens are evicted, it becomes
an entry or is gone, as the token after it decided.

A raw key keeps what RoPE turns into its borrowed channel, so that turning it back gives the unrotated
key again; queries are zero there.

Dimension letters as in `ops.paged.decode`; W tokens of a ring, C tokens that leave the rings.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dmc.ops import gates, rope
from megatron_dmc.ops.backends import PREFILL
from megatron_dmc.ops.paged.chunks import Chunks
from megatron_dmc.ops.paged.decode import Gates
from megatron_dmc.ops.paged.kv_pages import as_stored
from megatron_dmc.ops.paged.layer_cache import LayerCache
from megatron_dmc.ops.paged.prefill import (
    ChunkStates,
    Near,
    attend_chunk,
    new_entries,
    write_chunk,
)
from megatron_dmc.ops.tensors import to_device
from megatron_dmc.ops.training.attention import masked_attention
from megatron_dmc.ops.training.delayed import recent_attention
from megatron_dmc.ops.training.near import join_by_lse


def _unrotate(k_XHD: Tensor, freqs_XF: Tensor | None) -> Tensor:
    return rope.rotate_by(k_XHD, None if freqs_XF is None else -freqs_XF)


def prefill_delayed(
    cache: LayerCache,
    chunks: Chunks,
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    gates_TG: Gates,
    freqs_SF: Tensor | None,
    *,
    softmax_scale: float,
    merge_window: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Chunks of several requests in parallel: any chunking gives what decoding the tokens one at a time gives.

    Mutates `cache`: slots, and the chunks' rows.

    Args:
        q_TND, k_TGD: unrotated, their borrowed channel ignored. v_TGD: values.
        gates_TG: the tokens' decisions and importances.
        freqs_SF: RoPE angles of positions 0 to S-1, or None.

    Returns:
        out_TND in the queries' dtype.

    Raises:
        ValueError: the backend cannot.
    """
    chosen = PREFILL.choose(q_TND, cache, merge_window, backend=backend)
    kernels = PREFILL.kernels(chosen)
    if kernels is None:
        outs = []
        for row, start, at in chunks.spans():
            outs.append(
                _prefill_chunk(
                    cache, row, q_TND[at], k_TGD[at], v_TGD[at], (gates_TG[0][at], gates_TG[1][at]),
                    freqs_SF, start, softmax_scale=softmax_scale, merge_window=merge_window,
                )
            )  # fmt: skip
        return torch.cat(outs) if outs else torch.zeros_like(q_TND)

    def angles(positions_X: Tensor) -> Tensor | None:
        return None if freqs_SF is None else freqs_SF[positions_X]

    delayed = cache.delayed
    assert delayed is not None
    lay = _layout(chunks, delayed.delay)
    freqs_TF = angles(chunks.positions_T)
    key = rope.rotate_by(gates.zero_borrowed_channel(k_TGD), freqs_TF)
    omega_XGW = delayed.omega_XGW
    of_tokens = (key, v_TGD, gates_TG[0]) if omega_XGW is None else (key, v_TGD, *gates_TG)
    near = [x.new_empty(lay.num_near, *x.shape[1:]) for x in of_tokens]
    rows_B1 = lay.rows_B[:, None]
    heads_G1 = torch.arange(cache.num_kv_heads, device=key.device)[:, None]
    places = cache.slots(lay.rows_B, lay.ring_BW[:, None].expand(-1, cache.num_kv_heads, -1))
    ring_k, ring_v = cache.load_slots(places.mT, key.dtype)
    missing = ~lay.is_token_BW[..., None, None]
    ring = [ring_k.masked_fill(missing, 0), ring_v.masked_fill(missing, 0)]
    of_rings = (delayed.is_merge_XGW, *([] if omega_XGW is None else [omega_XGW]))
    ring += [x[rows_B1, :, lay.ring_BW] for x in of_rings]
    for of_near, of_ring, of_chunk in zip(near, ring, of_tokens, strict=True):
        of_near[lay.old_X] = of_ring.flatten(0, 1).to(of_near.dtype)
        of_near[lay.new_T] = of_chunk
    if cache.evicts:  # a decision is about the token before
        near[2][lay.new_T - 1] = gates_TG[0]
    late_k, late_v, *late_gates = (x[lay.late_C] for x in near)

    entries_RG = cache.num_entries_RG
    count_B1 = lay.ring_count_B[:, None]
    num_new = torch.zeros_like(entries_RG)
    if lay.late.rows:
        late_rows = lay.late.table_B3[:, 0].long()
        # the first token to leave a ring does not merge, but it may be evicted
        before_RG = entries_RG + 1 if cache.evicts else (entries_RG - delayed.delay).clamp_min(0)
        num_new[late_rows] = new_entries((late_gates[0], late_gates[-1]), before_RG, lay.late)
    entries_BG = torch.maximum(entries_RG[lay.rows_B], count_B1)
    cache.take_pages(lay.rows_B, entries_BG + num_new[lay.rows_B])
    nothing = key.new_empty(0, cache.num_kv_heads, dtype=torch.int32)
    states: ChunkStates = (key[:0], v_TGD[:0], nothing)
    if cache.evicts:
        entries_RG[lay.rows_B] = entries_BG
        states = None, None, _keep_chunks(cache, lay.late, late_k, late_v, late_gates[0])
    elif lay.late.rows:
        late_freqs = angles(lay.late_positions_C)
        states = kernels.write_chunks(
            cache, lay.late, _unrotate(late_k, late_freqs), late_v, (late_gates[0], late_gates[1]),
            rope.cosine_and_sine(late_freqs, key.dtype), merge_window=merge_window,
        )  # fmt: skip
    entries_RG[lay.rows_B] = torch.maximum(entries_RG[lay.rows_B], count_B1)
    out: Tensor = kernels.attend_chunks(
        cache, chunks, q_TND, states, rope.cosine_and_sine(freqs_TF, q_TND.dtype),
        softmax_scale=softmax_scale, near=Near(near[0], near[1], lay.far_B2),
    )  # fmt: skip

    rows_X1, slots_X1 = lay.kept_rows_X[:, None], lay.kept_slots_X[:, None]
    places = cache.slots(lay.kept_rows_X, slots_X1[..., None].expand(-1, cache.num_kv_heads, 1))
    kept = lay.kept_X
    cache.store(places.flatten(), key[kept].flatten(0, 1), v_TGD[kept].flatten(0, 1))
    about_X1 = (slots_X1 - 1) % delayed.delay if cache.evicts else slots_X1
    delayed.is_merge_XGW[rows_X1, heads_G1.T, about_X1] = gates_TG[0][kept]
    if omega_XGW is not None:
        omega_XGW[rows_X1, heads_G1.T, slots_X1] = gates_TG[1][kept].to(omega_XGW.dtype)
    return out


def _keep_chunks(
    cache: LayerCache, late: Chunks, k_CGD: Tensor, v_CGD: Tensor, is_evicted_CG: Tensor
) -> Tensor:
    """Tokens that leave the rings as new entries, without those that are evicted. Mutates slots and counts.

    Returns:
        the newest entry after each token, int32 (C, G).
    """
    rows_B, first_B, num_tokens_B = late.table_B3.long().unbind(1)
    is_kept_CG = ~is_evicted_CG
    of_chunk_C = torch.repeat_interleave(num_tokens_B, output_size=late.total)
    count_CG = is_kept_CG.cumsum(0)
    before_BG = count_CG[first_B] - is_kept_CG[first_B].to(count_CG.dtype)
    entry_CG = (cache.num_entries_RG[rows_B] - before_BG)[of_chunk_C] + count_CG - 1
    slots_CG = cache.slots(rows_B[of_chunk_C], entry_CG[..., None])[..., 0]
    cache.store(
        slots_CG.masked_fill(is_evicted_CG, -1).flatten(), k_CGD.flatten(0, 1), v_CGD.flatten(0, 1)
    )
    cache.num_entries_RG[rows_B] = entry_CG[first_B + num_tokens_B - 1] + 1
    return entry_CG.int()


class _Layout(NamedTuple):
    """Places of the tokens of some chunks and of their rings. Near rows are those of `Near`; int64 on the device
    unless it says otherwise.

    Attributes:
        rows_B: the chunks' rows of the cache.
        ring_BW: the ring's slots, oldest token first; is_token_BW, bool: there is one.
        ring_count_B: tokens that each ring holds afterwards.
        old_X, new_T: near rows of the rings' tokens and of the chunks'; num_near: all.
        late: the tokens that leave the rings, as chunks; late_C, late_positions_C: their near rows and positions.
        far_B2: see `Near`.
        kept_X, kept_rows_X, kept_slots_X: the tokens that stay raw, and their places in the rings.
    """

    rows_B: Tensor
    ring_BW: Tensor
    is_token_BW: Tensor
    ring_count_B: Tensor
    old_X: Tensor
    new_T: Tensor
    num_near: int
    late: Chunks
    late_C: Tensor
    late_positions_C: Tensor
    far_B2: Tensor
    kept_X: Tensor
    kept_rows_X: Tensor
    kept_slots_X: Tensor


@lru_cache(maxsize=2)
def _layout(chunks: Chunks, delay: int) -> _Layout:
    """Made once for the layers of a step."""
    arange, device = torch.arange, chunks.device
    ring, counts, old, new, late, positions, far, kept, kept_rows, kept_slots = (
        [] for _ in range(10)
    )
    num_late, num_far = [], 0
    for c, (row, start, at) in enumerate(chunks.spans()):
        num, first = at.stop - at.start, at.start + c * delay  # `first`: the chunk's near row
        lead = max(0, delay - start)
        num_late.append(max(0, num - lead))
        ring.append(arange(start - delay, start))
        counts.append(min(start + num, delay))
        old.append(arange(first, first + delay))
        new.append(arange(first + delay, first + delay + num))
        late.append(arange(first + lead, first + lead + num_late[-1]))
        positions.append(arange(start + lead - delay, start + lead - delay + num_late[-1]))
        far.append((lead, num_far))
        num_far += num_late[-1]
        last = arange(max(0, num - delay), num)
        kept.append(at.start + last)
        kept_rows.append(torch.full_like(last, row))
        kept_slots.append((start + last) % delay)
    tokens_BW = torch.stack(ring)
    is_token_BW = to_device(tokens_BW >= 0, device, dtype=torch.bool)
    rows_B, ring_BW, count_B, old_X, new_T = (
        to_device(x, device)
        for x in (
            torch.tensor(chunks.rows), tokens_BW % delay, torch.tensor(counts), torch.cat(old),
            torch.cat(new),
        )
    )  # fmt: skip
    late_C, positions_C, kept_X, kept_rows_X, kept_slots_X = (
        to_device(torch.cat(x), device) for x in (late, positions, kept, kept_rows, kept_slots)
    )
    return _Layout(
        rows_B, ring_BW, is_token_BW, count_B, old_X, new_T,
        chunks.total + len(chunks.rows) * delay, Chunks.of(chunks.rows, num_late, device), late_C,
        positions_C, to_device(far, device, dtype=torch.int32), kept_X, kept_rows_X, kept_slots_X,
    )  # fmt: skip


def _prefill_chunk(
    cache: LayerCache,
    row: int,
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    gates_TG: Gates,
    freqs_SF: Tensor | None,
    position: int,
    *,
    softmax_scale: float,
    merge_window: int = 0,
) -> Tensor:
    """One chunk in PyTorch; `position` is that of its first token."""
    is_merge_TG, omega_TG = gates_TG
    num_tokens, num_kv_heads = is_merge_TG.shape
    if num_tokens == 0:
        return torch.zeros_like(q_TND)
    assert cache.delayed is not None
    decisions, num_entries_G = cache.delayed[row], cache.num_entries_RG[row]
    delay, device = decisions.delay, q_TND.device
    end = position + num_tokens

    def angles(start: int, stop: int) -> Tensor | None:
        return None if freqs_SF is None else freqs_SF[start:stop]

    # the tokens of the ring, oldest first, and the chunk's behind them, as the cache gives them back
    num_old = min(position, delay)
    first = position - num_old
    old_slots = torch.arange(first, position, device=device) % delay
    places_GX = cache.slots(row, old_slots.expand(num_kv_heads, -1))
    key = rope.rotate_by(gates.zero_borrowed_channel(k_TGD), angles(position, end))
    old_k, old_v = cache.load_slots(places_GX.T, key.dtype)
    k = torch.cat([old_k, as_stored(key, cache.k_pages_PSD)])
    v = torch.cat([old_v, as_stored(v_TGD, cache.v_pages_PSD)])
    is_merge = torch.cat([decisions.is_merge_XGW[:, old_slots].T, is_merge_TG])
    if cache.evicts:  # a decision is about the token before
        is_merge[max(0, num_old - 1) : -1] = is_merge_TG[1 if position == 0 else 0 :]
    num_leaving = max(0, end - delay - first)
    appends = ~is_merge[:num_leaving]
    if not cache.evicts:
        appends[:1] |= num_entries_G <= delay
    cache.take_pages(row, num_entries_G.clamp_min(min(end, delay)) + appends.sum(0))

    q = rope.rotate_by(q_TND, angles(position, end), compress=True)
    out, lse = recent_attention(q, k, v, num_recent=delay, softmax_scale=softmax_scale)
    # the last of the queries see the states of the tokens w before them, and what came before
    far = slice(num_tokens - num_leaving, None)
    if num_leaving:
        late_k, late_v = k[:num_leaving], v[:num_leaving]
        if decisions.omega_XGW is None:
            far_out, far_lse = _keep_and_attend(
                cache, row, q[far], late_k, late_v, appends, places_GX.T[:num_leaving],
                softmax_scale=softmax_scale,
            )  # fmt: skip
        else:
            late_omega = torch.cat([decisions.omega_XGW[:, old_slots].T, omega_TG])[:num_leaving]
            freqs = angles(first, first + num_leaving)
            written = write_chunk(
                cache, row, _unrotate(late_k, freqs), late_v,
                (is_merge[:num_leaving], late_omega), freqs, merge_window=merge_window,
                first_entry=delay,
            )  # fmt: skip
            far_out, far_lse = attend_chunk(
                cache, row, q_TND[far], written, angles(end - num_leaving, end),
                softmax_scale=softmax_scale, first_entry=delay,
            )  # fmt: skip
        joined, _ = join_by_lse(out[far], lse[far], far_out, far_lse)
        out[far] = joined
    else:
        num_entries_G.fill_(end)

    num_kept = min(num_tokens, delay)
    slots = torch.arange(end - num_kept, end, device=device) % delay
    places = cache.slots(row, slots.expand(num_kv_heads, -1)).T
    cache.store(places.flatten(), key[-num_kept:].flatten(0, 1), v_TGD[-num_kept:].flatten(0, 1))
    about = (slots - 1) % delay if cache.evicts else slots
    decisions.is_merge_XGW[:, about] = is_merge_TG[-num_kept:].T
    if decisions.omega_XGW is not None:
        decisions.omega_XGW[:, slots] = omega_TG[-num_kept:].T.to(decisions.omega_XGW.dtype)
    return out


def _keep_and_attend(
    cache: LayerCache,
    row: int,
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    is_kept_TG: Tensor,
    ring_XG: Tensor,
    *,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    """Tokens that leave the ring as new entries, and attention to them and to the older entries. Each query
    sees the tokens up to its own row. Mutates slots and the row's counts.

    Args:
        q_TND: rotated queries; k_TGD, v_TGD: rotated keys and values.
        is_kept_TG: bool: the token is not evicted.
        ring_XG: physical slots of those of the first tokens that lie in the ring: they are copied as they are stored.

    Returns:
        out_TND and its log-sum-exp lse_TN.
    """
    num_entries_G, num_old = cache.num_entries_RG[row], ring_XG.shape[0]
    out, lse = masked_attention(
        q_TND, k_TGD.transpose(0, 1), v_TGD.transpose(0, 1), is_kept_TG.T,
        softmax_scale=softmax_scale, causal=True,
    )  # fmt: skip
    old_k, old_v, is_entry = (x[:, cache.delay :] for x in cache.load(row, q_TND.dtype))
    if old_k.shape[1]:
        old = masked_attention(q_TND, old_k, old_v, is_entry, softmax_scale=softmax_scale)
        out, lse = join_by_lse(out, lse, *old)
    entry_TG = num_entries_G.clamp_min(cache.delay) + is_kept_TG.cumsum(0) - 1
    slots = cache.slots(row, entry_TG.T).T.masked_fill(~is_kept_TG, -1)
    cache.copy_slots(ring_XG.flatten(), slots[:num_old].flatten())
    cache.store(
        slots[num_old:].flatten(), k_TGD[num_old:].flatten(0, 1), v_TGD[num_old:].flatten(0, 1)
    )
    num_entries_G.copy_(entry_TG[-1] + 1)
    return out, lse
