"""Append and prefill of a paged cache into which tokens merge after a delay. docs/method.md, section 9.

The latest w tokens of a head lie raw in the first w slots of its block table, token t in slot t mod w
(the ring); the entries follow. The order of slots means nothing to attention, since keys are rotated at
their own positions, so decode attention is the one of `ops.paged.decode` over all slots: `num_entries` counts
those of the ring too. A new token takes the slot of the token w before it, which leaves the ring and
merges into the open segment or becomes an entry, as it decided when it came.

A raw key keeps what RoPE turns into its borrowed channel, so that turning it back gives the unrotated
key again; queries are zero there.

Dimension letters as in `ops.paged.decode`; W tokens of a ring, C tokens that leave the ring.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dmc.ops import gates, rope
from megatron_dmc.ops.paged.decode import Gates, torch_append
from megatron_dmc.ops.paged.kv_pages import as_stored
from megatron_dmc.ops.paged.layer_cache import LayerCache
from megatron_dmc.ops.paged.prefill import attend_chunk, write_chunk
from megatron_dmc.ops.training.attention import join_by_lse
from megatron_dmc.ops.training.delayed import recent_attention


@dataclass
class DelayedDecisions:
    """The decisions of the tokens in the rings, made when they came; undefined where no token lies.

    Attributes:
        is_merge_XGW: bool.
        omega_XGW: importances, float32 (float64).
    """

    is_merge_XGW: Tensor
    omega_XGW: Tensor

    @property
    def merge_delay(self) -> int:
        """w, the number of slots of a ring."""
        return self.is_merge_XGW.shape[-1]

    def __getitem__(self, index) -> "DelayedDecisions":
        return DelayedDecisions(self.is_merge_XGW[index], self.omega_XGW[index])


def _unrotate(k_XHD: Tensor, freqs_XF: Tensor | None) -> Tensor:
    return rope.rotate_by(k_XHD, None if freqs_XF is None else -freqs_XF)


def decode_delayed(
    cache: LayerCache,
    rows_B: Tensor,
    k_BGD: Tensor,
    v_BGD: Tensor,
    gates_BG: Gates,
    freqs_SF: Tensor | None,
    positions_B: Tensor,
    decisions: DelayedDecisions,
    *,
    merge_window: int = 0,
) -> None:
    """One new token for each of B requests into its ring, and the token that leaves it into its entry.

    Mutates `cache` and `decisions` (R, G, W).

    Args:
        rows_B: int64, each request's row; distinct, none of them padding.
        k_BGD, v_BGD: unrotated keys, their borrowed channel ignored; values.
        gates_BG: of the new tokens.
        freqs_SF: RoPE angles of positions 0 to S-1, or None.
        positions_B: int64, of the new tokens.
    """
    delay = decisions.merge_delay
    heads = k_BGD.shape[:2]
    slot_B = positions_B % delay
    leaves_B = positions_B >= delay
    if bool(leaves_B.any()):
        rows, slot = rows_B[leaves_B], slot_B[leaves_B]
        freqs = None if freqs_SF is None else freqs_SF[positions_B[leaves_B] - delay]
        places_CG = cache.slots(rows, slot[:, None, None].expand(-1, heads[1], 1))[..., 0]
        k, v = cache.load_slots(places_CG, k_BGD.dtype)
        torch_append(
            cache, rows, _unrotate(k, freqs), v,
            (decisions.is_merge_XGW[rows, :, slot], decisions.omega_XGW[rows, :, slot]),
            rope.cosine_and_sine(freqs, k.dtype), merge_window=merge_window, first_entry=delay,
        )  # fmt: skip
    cache.take_pages(rows_B, (slot_B + 1)[:, None].expand(heads))
    places_BG = cache.slots(rows_B, slot_B[:, None, None].expand(*heads, 1))[..., 0]
    freqs = None if freqs_SF is None else freqs_SF[positions_B]
    key = rope.rotate_by(gates.zero_borrowed_channel(k_BGD), freqs)
    cache.store(places_BG.flatten(), key.flatten(0, 1), v_BGD.flatten(0, 1))
    cache.num_entries_RG[rows_B] = torch.where(
        leaves_B[:, None], cache.num_entries_RG[rows_B], positions_B[:, None] + 1
    )
    decisions.is_merge_XGW[rows_B, :, slot_B] = gates_BG[0]
    decisions.omega_XGW[rows_B, :, slot_B] = gates_BG[1].to(decisions.omega_XGW.dtype)


def prefill_delayed(
    cache: LayerCache,
    row: int,
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    gates_TG: Gates,
    freqs_SF: Tensor | None,
    position: int,
    decisions: DelayedDecisions,
    *,
    softmax_scale: float,
    merge_window: int = 0,
) -> Tensor:
    """A chunk of one request's tokens in parallel: any chunking gives what decoding the tokens one at
    a time gives.

    Mutates the row's part of `cache` and `decisions` (R, G, W).

    Args:
        q_TND, k_TGD: unrotated, their borrowed channel ignored. v_TGD: values.
        gates_TG: the chunk's decisions and importances.
        freqs_SF: RoPE angles of positions 0 to S-1, or None.
        position: of the chunk's first token.

    Returns:
        out_TND in the queries' dtype.
    """
    is_merge_TG, omega_TG = gates_TG
    num_tokens, num_kv_heads = is_merge_TG.shape
    if num_tokens == 0:
        return torch.zeros_like(q_TND)
    decisions, num_entries_G = decisions[row], cache.num_entries_RG[row]
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
