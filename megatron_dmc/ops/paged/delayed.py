"""What attention does with a paged cache into which tokens merge after a delay. docs/method.md, section 9.

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
from megatron_dmc.ops.paged import pages as page_ops
from megatron_dmc.ops.paged.decode import (
    slots_of_entries,
    torch_append,
    write_entries,
)
from megatron_dmc.ops.paged.kv_pages import Pages, as_stored, load_slots
from megatron_dmc.ops.paged.pages import FreePages
from megatron_dmc.ops.paged.prefill import attend_chunk, write_chunk
from megatron_dmc.ops.training.attention import join_by_lse
from megatron_dmc.ops.training.delayed import recent_attention


@dataclass
class DelayedDecisions:
    """What the tokens in the rings decided when they came; undefined where no token lies.

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
    k_BGD: Tensor,
    v_BGD: Tensor,
    is_merge_BG: Tensor,
    omega_BG: Tensor,
    freqs_SF: Tensor | None,
    positions_B: Tensor,
    k_pages_PSD: Pages,
    v_pages_PSD: Pages,
    block_table_RGM: Tensor,
    num_entries_RG: Tensor,
    segments_RGUA: Tensor,
    decisions: DelayedDecisions,
    rows_B: Tensor,
    *,
    merge_window: int = 0,
    free_pages: FreePages | None = None,
) -> None:
    """One new token for each of B requests into its ring, and the token that leaves it into its entry.

    Mutates `k_pages_PSD, v_pages_PSD`, `num_entries_RG`, `segments_RGUA` and `decisions` (R, G, W); with
    `free_pages` also `block_table_RGM` and `free_pages.state`.

    Args:
        k_BGD, v_BGD: unrotated keys, their borrowed channel ignored; values.
        is_merge_BG, omega_BG: of the new tokens.
        freqs_SF: RoPE angles of positions 0 to S-1, or None.
        positions_B: int64, of the new tokens.
        block_table_RGM: without `free_pages` it holds a page for every slot that is written.
        rows_B: which of the R rows each request uses; distinct, none of them padding.
    """
    delay, page_size = decisions.merge_delay, k_pages_PSD.shape[1]
    slot_B = positions_B % delay
    leaves_B = positions_B >= delay
    if bool(leaves_B.any()):
        rows, slot = rows_B[leaves_B], slot_B[leaves_B]
        freqs = None if freqs_SF is None else freqs_SF[positions_B[leaves_B] - delay]
        table_CGM = block_table_RGM[rows]
        at_CG1 = slot[:, None, None].expand(*table_CGM.shape[:2], 1)
        places_CG = slots_of_entries(table_CGM, at_CG1, page_size)[..., 0]
        k, v = (load_slots(pages, places_CG, k_BGD.dtype) for pages in (k_pages_PSD, v_pages_PSD))
        cos, sin = rope.cosine_and_sine(freqs, k.dtype)
        torch_append(
            _unrotate(k, freqs), v, decisions.is_merge_XGW[rows, :, slot],
            decisions.omega_XGW[rows, :, slot], cos, sin, k_pages_PSD, v_pages_PSD,
            block_table_RGM, num_entries_RG, segments_RGUA, rows, merge_window, free_pages,
            first_entry=delay,
        )  # fmt: skip
    table_BGM = block_table_RGM[rows_B]
    if free_pages is not None:
        reached_BG = (slot_B + 1)[:, None].expand(table_BGM.shape[:2])
        page_ops.take_for_entries(table_BGM, reached_BG, page_size, free_pages)
        block_table_RGM[rows_B] = table_BGM
    at_BG1 = slot_B[:, None, None].expand(*table_BGM.shape[:2], 1)
    places_BG = slots_of_entries(table_BGM, at_BG1, page_size)[..., 0]
    freqs = None if freqs_SF is None else freqs_SF[positions_B]
    key = rope.rotate_by(gates.zero_borrowed_channel(k_BGD), freqs)
    write_entries(
        k_pages_PSD, v_pages_PSD, places_BG.flatten(), key.flatten(0, 1), v_BGD.flatten(0, 1)
    )
    num_entries_RG[rows_B] = torch.where(
        leaves_B[:, None], num_entries_RG[rows_B], positions_B[:, None] + 1
    )
    decisions.is_merge_XGW[rows_B, :, slot_B] = is_merge_BG
    decisions.omega_XGW[rows_B, :, slot_B] = omega_BG.to(decisions.omega_XGW.dtype)


def prefill_delayed(
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    is_merge_TG: Tensor,
    omega_TG: Tensor,
    freqs_SF: Tensor | None,
    position: int,
    k_pages_PSD: Pages,
    v_pages_PSD: Pages,
    block_table_GM: Tensor,
    num_entries_G: Tensor,
    segments_GUA: Tensor,
    decisions: DelayedDecisions,
    *,
    softmax_scale: float,
    merge_window: int = 0,
    free_pages: FreePages | None = None,
) -> Tensor:
    """A chunk of one request's tokens in parallel: any chunking gives what decoding the tokens one at
    a time gives.

    Mutates `k_pages_PSD, v_pages_PSD`, `num_entries_G`, `segments_GUA` and `decisions` (G, W); with
    `free_pages` also `block_table_GM` and `free_pages.state`.

    Args:
        q_TND, k_TGD: unrotated, their borrowed channel ignored. v_TGD: values.
        is_merge_TG, omega_TG: the chunk's decisions and importances.
        freqs_SF: RoPE angles of positions 0 to S-1, or None.
        position: of the chunk's first token.
        block_table_GM: without `free_pages` it holds a page for every slot that the chunk may write.

    Returns:
        out_TND in the queries' dtype.
    """
    num_tokens, num_kv_heads = is_merge_TG.shape
    if num_tokens == 0:
        return torch.zeros_like(q_TND)
    delay, page_size, device = decisions.merge_delay, k_pages_PSD.shape[1], q_TND.device
    end = position + num_tokens

    def angles(start: int, stop: int) -> Tensor | None:
        return None if freqs_SF is None else freqs_SF[start:stop]

    # the tokens of the ring, oldest first, and the chunk's behind them, as the cache gives them back
    num_old = min(position, delay)
    first = position - num_old
    old_slots = torch.arange(first, position, device=device) % delay
    places_GX = slots_of_entries(block_table_GM, old_slots.expand(num_kv_heads, -1), page_size)
    key = rope.rotate_by(gates.zero_borrowed_channel(k_TGD), angles(position, end))
    k, v = (
        torch.cat([load_slots(pages, places_GX.T, x.dtype), as_stored(x, pages)])
        for pages, x in ((k_pages_PSD, key), (v_pages_PSD, v_TGD))
    )
    is_merge = torch.cat([decisions.is_merge_XGW[:, old_slots].T, is_merge_TG])
    omega_CG = torch.cat(
        [decisions.omega_XGW[:, old_slots].T, omega_TG.to(decisions.omega_XGW.dtype)]
    )
    num_leaving = max(0, end - delay - first)
    if free_pages is not None:
        has_entries = num_entries_G > delay
        appends = ~is_merge[:num_leaving]
        appends[:1] |= ~has_entries
        slots_G = num_entries_G.clamp_min(min(end, delay)) + appends.sum(0)
        page_ops.take_for_entries(block_table_GM, slots_G, page_size, free_pages)

    q = rope.rotate_by(q_TND, angles(position, end), compress=True)
    out, lse = recent_attention(q, k, v, num_recent=delay, softmax_scale=softmax_scale)
    if num_leaving:
        freqs = angles(first, first + num_leaving)
        written = write_chunk(
            _unrotate(k[:num_leaving], freqs), v[:num_leaving], is_merge[:num_leaving],
            omega_CG[:num_leaving], freqs, k_pages_PSD, v_pages_PSD, block_table_GM, num_entries_G,
            segments_GUA, merge_window=merge_window, first_entry=delay,
        )  # fmt: skip
        # the last of the queries see the states of the tokens w before them, and what came before
        far = slice(num_tokens - num_leaving, None)
        far_out, far_lse = attend_chunk(
            q_TND[far], written, angles(end - num_leaving, end), k_pages_PSD, v_pages_PSD,
            block_table_GM, softmax_scale=softmax_scale, first_entry=delay,
        )  # fmt: skip
        joined, _ = join_by_lse(out[far], lse[far], far_out, far_lse)
        out[far] = joined
    else:
        num_entries_G.fill_(end)

    num_kept = min(num_tokens, delay)
    slots = torch.arange(end - num_kept, end, device=device) % delay
    places = slots_of_entries(block_table_GM, slots.expand(num_kv_heads, -1), page_size).T
    write_entries(
        k_pages_PSD, v_pages_PSD, places.flatten(), key[-num_kept:].flatten(0, 1),
        v_TGD[-num_kept:].flatten(0, 1),
    )  # fmt: skip
    decisions.is_merge_XGW[:, slots] = is_merge_TG[-num_kept:].T
    decisions.omega_XGW[:, slots] = omega_TG[-num_kept:].T.to(decisions.omega_XGW.dtype)
    return out
