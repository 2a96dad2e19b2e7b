"""Prefill of a paged cache into which tokens merge after a delay; `gate_and_append` has decoding.
docs/method.md, section 9.

The latest w tokens of a head lie raw in the first w slots of its block table, token t in slot t mod w
(the ring); the entries follow. The order of slots means nothing to attention, since keys are rotated at
their own positions, so decode attention is the one of `ops.paged.decode` over all slots: `num_entries` counts
those of the ring too. A new token takes the slot of the token w before it, which leaves the ring and
merges into the open segment or becomes an entry, as it decided when it came.

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
from megatron_dmc.ops.paged.prefill import Near, attend_chunk, new_entries, write_chunk
from megatron_dmc.ops.tensors import to_device
from megatron_dmc.ops.training.attention import join_by_lse
from megatron_dmc.ops.training.delayed import recent_attention


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
    lay = _layout(chunks, delayed.merge_delay)
    freqs_TF = angles(chunks.positions_T)
    key = rope.rotate_by(gates.zero_borrowed_channel(k_TGD), freqs_TF)
    near = [x.new_empty(lay.num_near, *x.shape[1:]) for x in (key, v_TGD, *gates_TG)]
    rows_B1 = lay.rows_B[:, None]
    heads_G1 = torch.arange(cache.num_kv_heads, device=key.device)[:, None]
    places = cache.slots(lay.rows_B, lay.ring_BW[:, None].expand(-1, cache.num_kv_heads, -1))
    ring_k, ring_v = cache.load_slots(places.mT, key.dtype)
    missing = ~lay.is_token_BW[..., None, None]
    ring = [ring_k.masked_fill(missing, 0), ring_v.masked_fill(missing, 0)]
    ring += [x[rows_B1, :, lay.ring_BW] for x in (delayed.is_merge_XGW, delayed.omega_XGW)]
    for of_near, of_ring, of_chunk in zip(near, ring, (key, v_TGD, *gates_TG), strict=True):
        of_near[lay.old_X] = of_ring.flatten(0, 1).to(of_near.dtype)
        of_near[lay.new_T] = of_chunk
    late_k, late_v, *late_gates = (x[lay.late_C] for x in near)

    entries_RG = cache.num_entries_RG
    count_B1 = lay.ring_count_B[:, None]
    num_new = torch.zeros_like(entries_RG)
    if lay.late.rows:
        late_rows = lay.late.table_B3[:, 0].long()
        num_new[late_rows] = new_entries(
            (late_gates[0], late_gates[1]),
            (entries_RG - delayed.merge_delay).clamp_min(0),
            lay.late,
        )
    entries_BG = torch.maximum(entries_RG[lay.rows_B], count_B1)
    cache.take_pages(lay.rows_B, entries_BG + num_new[lay.rows_B])
    states: tuple[Tensor, Tensor, Tensor] = (key[:0], v_TGD[:0], entries_RG.new_empty(0).int())
    if lay.late.rows:
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
    delayed.is_merge_XGW[rows_X1, heads_G1.T, slots_X1] = gates_TG[0][kept]
    delayed.omega_XGW[rows_X1, heads_G1.T, slots_X1] = gates_TG[1][kept].to(delayed.omega_XGW.dtype)
    return out


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
    delay, device = decisions.merge_delay, q_TND.device
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
    omega_CG = torch.cat(
        [decisions.omega_XGW[:, old_slots].T, omega_TG.to(decisions.omega_XGW.dtype)]
    )
    num_leaving = max(0, end - delay - first)
    appends = ~is_merge[:num_leaving]
    appends[:1] |= num_entries_G <= delay
    cache.take_pages(row, num_entries_G.clamp_min(min(end, delay)) + appends.sum(0))

    q = rope.rotate_by(q_TND, angles(position, end), compress=True)
    out, lse = recent_attention(q, k, v, num_recent=delay, softmax_scale=softmax_scale)
    if num_leaving:
        freqs = angles(first, first + num_leaving)
        written = write_chunk(
            cache, row, _unrotate(k[:num_leaving], freqs), v[:num_leaving],
            (is_merge[:num_leaving], omega_CG[:num_leaving]), freqs, merge_window=merge_window,
            first_entry=delay,
        )  # fmt: skip
        # the last of the queries see the states of the tokens w before them, and what came before
        far = slice(num_tokens - num_leaving, None)
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
    decisions.is_merge_XGW[:, slots] = is_merge_TG[-num_kept:].T
    decisions.omega_XGW[:, slots] = omega_TG[-num_kept:].T.to(decisions.omega_XGW.dtype)
    return out
