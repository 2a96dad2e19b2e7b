"""What attention does with a paged cache in decoding; `ops.paged.prefill` has the rest. docs/method.md,
section 6.

Dimension letters: T tokens of a chunk, B requests that decode together, R rows of per-request
storage (request slots), N query heads, G key/value heads, D head dim, E cache entries, P pages,
S slots per page, M block-table width, F rotary channels, U weighted tokens kept for an open segment,
A = 2 D + 1 components of an accumulator (`[omega k, omega v, omega]`).

A pool `k_pages_PSD, v_pages_PSD` serves all layers and heads: tensors in the model's dtype, or
`kv_pages.ScaledPages` (8 bits with scales). The other storage is one layer's:
`block_table_RGM` (page ids), `num_entries_RG`, `segments_RGUA` (the open segments; float32, or
float64 for a float64 model). Entry e of a head lies in page `block_table[e // S]`, slot `e % S`.
What lies in slots that hold no entry is never used, be it NaN.
"""

import torch
from torch import Tensor

from megatron_dmc.ops import gates, rope
from megatron_dmc.ops.backends import choose_backend, kernels
from megatron_dmc.ops.paged import pages as page_ops
from megatron_dmc.ops.paged.kv_pages import Pages, load, store
from megatron_dmc.ops.paged.pages import FreePages
from megatron_dmc.ops.tensors import accumulator_dtype


def slots_of_entries(block_table_XM: Tensor, entries_XE: Tensor, page_size: int) -> Tensor:
    """Physical slots `page_id * S + offset` of entries, int64; -1 where the page is not allocated."""
    page_id = block_table_XM.gather(-1, entries_XE // page_size).long()
    slot = page_id * page_size + entries_XE % page_size
    return torch.where(page_id < 0, -1, slot)


def write_entries(
    k_pages_PSD: Pages, v_pages_PSD: Pages, slots_X: Tensor, k_XD: Tensor, v_XD: Tensor
) -> None:
    """Write entries to their slots; slot -1 is not written. Mutates `k_pages_PSD, v_pages_PSD`."""
    keep = slots_X >= 0
    slots = slots_X[keep]
    store(k_pages_PSD, slots, k_XD[keep])
    store(v_pages_PSD, slots, v_XD[keep])


def read_entries(
    k_pages_PSD: Pages,
    v_pages_PSD: Pages,
    block_table_XM: Tensor,
    num_entries_X: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gather every head's entries up to the longest head's.

    Returns:
        k_XED, v_XED in `dtype` (zero beyond a head's entries) and is_entry_XE.
    """
    page_size = k_pages_PSD.shape[1]
    longest = int(num_entries_X.max()) if num_entries_X.numel() else 0
    num_pages = -(-longest // page_size)
    pages = block_table_XM[:, :num_pages].long().clamp_min(0)
    is_entry = torch.arange(longest, device=pages.device) < num_entries_X[:, None]
    missing = ~is_entry[..., None]
    k = load(k_pages_PSD, pages, dtype).flatten(1, 2)[:, :longest].masked_fill(missing, 0.0)
    v = load(v_pages_PSD, pages, dtype).flatten(1, 2)[:, :longest].masked_fill(missing, 0.0)
    return k, v, is_entry


def decode_append(
    k_BGD: Tensor,
    v_BGD: Tensor,
    is_merge_BG: Tensor | None,
    omega_BG: Tensor | None,
    freqs_BF: Tensor | None,
    k_pages_PSD: Pages,
    v_pages_PSD: Pages,
    block_table_RGM: Tensor,
    num_entries_RG: Tensor,
    segments_RGUA: Tensor | None,
    rows_B: Tensor,
    *,
    merge_window: int = 0,
    free_pages: FreePages | None = None,
    backend: str | None = None,
) -> None:
    """One new token for each of B requests: every head merges it into its open segment or opens a
    new one, and writes the segment's entry, rotated at the token's position.

    Mutates `k_pages_PSD, v_pages_PSD` (one slot per request and head), `segments_RGUA`, and
    `num_entries_RG` (plus 1 where a head appended); with `free_pages` also `block_table_RGM` (a page
    where the entry's page is -1) and `free_pages.state`.

    Args:
        k_BGD, v_BGD: unrotated keys and values; the borrowed channel is ignored when compressing.
        is_merge_BG: bool, ignored where a head has no entry yet. None: plain cache, every token is
            appended as it is and every channel counts.
        omega_BG: importances, float32 or float64; None with `is_merge_BG`.
        freqs_BF: RoPE angles of each request's position, or None.
        block_table_RGM, num_entries_RG, segments_RGUA: this layer's; `segments` may be None in plain
            mode.
        rows_B: which of the R rows each request uses; distinct; -1 for padding of a fixed batch:
            nothing of it is written.
        merge_window: W; 0 is unlimited.
        free_pages: None: the block table must hold the page of the entry that is written already. A
            head that finds no page is left as it was.
        backend: as `ops.backends.choose_backend`.

    Raises:
        ValueError: the backend does not exist or does not take these tensors.
    """
    cos, sin = rope.cosine_and_sine(freqs_BF, k_BGD.dtype)
    chosen = choose_backend(backend, k_BGD, k_pages_PSD.shape[1])
    if chosen == "torch":
        _append_live(
            k_BGD, v_BGD, is_merge_BG, omega_BG, cos, sin, k_pages_PSD, v_pages_PSD,
            block_table_RGM, num_entries_RG, segments_RGUA, rows_B, merge_window, free_pages,
        )  # fmt: skip
        return
    positions = torch.arange(k_BGD.shape[0], device=k_BGD.device)
    kernels(chosen).decode_append(
        None, k_BGD, v_BGD, is_merge_BG, omega_BG, cos, sin, positions, k_pages_PSD, v_pages_PSD,
        block_table_RGM, num_entries_RG, segments_RGUA, rows_B,
        None if free_pages is None else free_pages.page_ids,
        None if free_pages is None else free_pages.state,
        compress=is_merge_BG is not None, may_merge=True, alpha_offset=0.0,
        merge_window=merge_window,
    )  # fmt: skip


def torch_append(
    k_BGD, v_BGD, is_merge_BG, omega_BG, cos_BF, sin_BF, k_pages_PSD, v_pages_PSD,
    block_table_RGM, num_entries_RG, segments_RGUA, rows_B, merge_window, free_pages, first_entry=0,
) -> None:  # fmt: skip
    """`decode_append` in PyTorch: cosines and sines for angles, rows that are not negative, and
    `free_pages` (or None) as in `gate_and_append`. A head's first `first_entry` slots hold no entries."""
    entries = num_entries_RG[rows_B]
    is_merge = torch.zeros_like(entries, dtype=torch.bool)
    if is_merge_BG is not None:
        is_merge = is_merge_BG & (entries > first_entry)
    entry = entries - is_merge.to(entries.dtype)
    if free_pages is not None:
        rows_B1, heads_G = rows_B[:, None], torch.arange(entry.shape[1], device=entry.device)
        column = entry // k_pages_PSD.shape[1]
        at = (rows_B1, heads_G, column.clamp_max(block_table_RGM.shape[2] - 1))
        wants = (block_table_RGM[at] < 0) & (column < block_table_RGM.shape[2])
        taken = page_ops.take_where(wants, free_pages)
        block_table_RGM[at] = torch.where(wants, taken, block_table_RGM[at])
    slots = slots_of_entries(block_table_RGM[rows_B], entry[..., None], k_pages_PSD.shape[1])[
        ..., 0
    ]
    has_page = slots >= 0
    if is_merge_BG is None:
        key, value = rope.rotate(k_BGD, cos_BF, sin_BF), v_BGD
    else:
        assert segments_RGUA is not None and omega_BG is not None
        acc = segments_RGUA.dtype
        omega = omega_BG.to(acc)[..., None]
        k = gates.zero_borrowed_channel(k_BGD)
        weighted = torch.cat([k.to(acc) * omega, v_BGD.to(acc) * omega, omega], dim=-1)
        old = segments_RGUA[rows_B]
        # a segment opens with what was kept forgotten
        kept = torch.where(is_merge[..., None, None], old, torch.zeros_like(old))
        if merge_window:
            segment = torch.cat([kept[:, :, 1:], weighted[:, :, None]], dim=2)
        else:
            segment = kept + weighted[:, :, None]
        segments_RGUA[rows_B] = torch.where(has_page[..., None, None], segment, old)
        total = segment.sum(2)
        y = (total[..., :-1] / total[..., -1:]).to(k_BGD.dtype)
        y_k, value = y.split([k_BGD.shape[-1], v_BGD.shape[-1]], dim=-1)
        key = gates.zero_borrowed_channel(rope.rotate(y_k, cos_BF, sin_BF))
    num_entries_RG[rows_B] = torch.where(has_page, entry + 1, entries)
    write_entries(k_pages_PSD, v_pages_PSD, slots.flatten(), key.flatten(0, 1), value.flatten(0, 1))


def _append_live(
    k_BGD, v_BGD, is_merge_BG, omega_BG, cos_BF, sin_BF, k_pages_PSD, v_pages_PSD,
    block_table_RGM, num_entries_RG, segments_RGUA, rows_B, merge_window, free_pages,
) -> None:  # fmt: skip
    """`torch_append` of what is not padding."""
    live = rows_B >= 0
    k, v, is_merge, omega, cos, sin = (
        None if x is None else x[live]
        for x in (k_BGD, v_BGD, is_merge_BG, omega_BG, cos_BF, sin_BF)
    )
    torch_append(
        k, v, is_merge, omega, cos, sin, k_pages_PSD, v_pages_PSD, block_table_RGM, num_entries_RG,
        segments_RGUA, rows_B[live], merge_window, free_pages,
    )  # fmt: skip


def gate_and_append(
    q_BND: Tensor,
    k_BGD: Tensor,
    v_BGD: Tensor,
    cos_XF: Tensor | None,
    sin_XF: Tensor | None,
    positions_B: Tensor,
    k_pages_PSD: Pages,
    v_pages_PSD: Pages,
    block_table_RGM: Tensor,
    num_entries_RG: Tensor,
    segments_RGUA: Tensor | None,
    rows_B: Tensor,
    *,
    alpha_offset: float,
    merge_window: int = 0,
    compress: bool = True,
    may_merge: bool = True,
    is_merge_BG: Tensor | None = None,
    omega_BG: Tensor | None = None,
    free_pages: FreePages | None = None,
    backend: str | None = None,
) -> Tensor:
    """All that a decoded token does before attention, from the raw projections: gates, `decode_append`,
    and RoPE of the queries. On a GPU one kernel, and nothing that the host has to wait for.

    Mutates what `decode_append` does, and with `free_pages` also `block_table_RGM` (a page where the
    entry's page is -1) and `free_pages.state`.

    Args:
        q_BND, k_BGD, v_BGD: unrotated, the borrowed channel in place (after QK-norm, if any).
        cos_XF, sin_XF: `rope.cosine_and_sine` of X positions; both halves of F are alike. None: no RoPE.
        positions_B: int64, each token's row in these tables.
        rows_B: int64, distinct; -1 for padding of a fixed batch: nothing of it is written.
        alpha_offset: docs/method.md, section 1.
        compress: False: a plain cache (see `decode_append`); the gates are not looked at.
        may_merge: False: every token is appended, though the borrowed channel carries no content.
        is_merge_BG, omega_BG: gates that stand in for those of the channels, as in `decode_append`; for
            benchmarks.
        free_pages: None: the block table must hold the page already.

    Returns:
        rotated q_BND, the borrowed channel zero when compressing; rows of padding are undefined.
    """
    chosen = choose_backend(backend, k_BGD, k_pages_PSD.shape[1])
    if chosen != "torch":
        rotated: Tensor = kernels(chosen).decode_append(
            q_BND, k_BGD, v_BGD, is_merge_BG, omega_BG, cos_XF, sin_XF, positions_B, k_pages_PSD,
            v_pages_PSD,
            block_table_RGM, num_entries_RG, segments_RGUA, rows_B,
            None if free_pages is None else free_pages.page_ids,
            None if free_pages is None else free_pages.state,
            compress=compress, may_merge=may_merge, alpha_offset=alpha_offset,
            merge_window=merge_window,
        )  # fmt: skip
        return rotated
    cos, sin = (None if x is None else x[positions_B] for x in (cos_XF, sin_XF))
    is_merge, omega = is_merge_BG, omega_BG
    if compress and is_merge is None:
        is_merge, omega = gates.decide(q_BND, k_BGD, alpha_offset=alpha_offset, may_merge=may_merge)
    _append_live(
        k_BGD, v_BGD, is_merge, omega, cos, sin, k_pages_PSD, v_pages_PSD, block_table_RGM,
        num_entries_RG, segments_RGUA, rows_B, merge_window, free_pages,
    )  # fmt: skip
    return rope.rotate(q_BND, cos, sin, compress=compress)


def plan_decode_attention(
    num_entries_LRG: Tensor,
    rows_B: Tensor,
    *,
    like: Tensor,
    page_size: int,
    group: int = 1,
    ahead: int = 0,
    backend: str | None = None,
) -> list[Tensor | None]:
    """How the kernels divide decode attention among their workers, for L layers in one launch.

    Made once before a step's first layer, it serves all of them: `ahead` counts the tokens that will be
    appended before attention looks.

    Args:
        num_entries_LRG: int64, as they are now.
        rows_B: int64; -1 is padding.
        like, group: queries or keys (..., D) and query heads for each KV head, which decide about the
            backend as in `paged_decode_attention`.

    Returns:
        one plan for each layer, for `paged_decode_attention` of the same rows and backend; None each
        for PyTorch, which needs none. A plan must not be shorter than the entries then are.
    """
    chosen = choose_backend(backend, like, page_size, group)
    if chosen == "torch":
        return [None] * num_entries_LRG.shape[0]
    return list(kernels(chosen).plan(num_entries_LRG, rows_B, ahead=ahead).unbind(0))


def paged_decode_attention(
    q_BND: Tensor,
    k_pages_PSD: Pages,
    v_pages_PSD: Pages,
    block_table_BGM: Tensor,
    num_entries_BG: Tensor,
    *,
    softmax_scale: float,
    rows_B: Tensor | None = None,
    plan_Y: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One query token per request over all entries of each head, of which every head has its own
    number.

    Args:
        q_BND: rotated queries, heads ordered by group; the borrowed channel zero when compressing.
        block_table_BGM, num_entries_BG: the requests' rows of one layer; with `rows_B` all R rows.
        rows_B: int64, each request's row of both; -1 is padding, which attends over nothing.
        plan_Y: this layer's part of `plan_decode_attention`; None: planned here. PyTorch needs none.

    Returns:
        out_BND in the queries' dtype, computed in float32 (float64); zero for a head without
        entries.
    """
    group = q_BND.shape[1] // block_table_BGM.shape[1]
    chosen = choose_backend(backend, q_BND, k_pages_PSD.shape[1], group)
    if chosen != "torch":
        if rows_B is None:
            rows_B = torch.arange(q_BND.shape[0], device=q_BND.device)
        attended: Tensor = kernels(chosen).paged_decode_attention(
            q_BND, k_pages_PSD, v_pages_PSD, block_table_BGM, num_entries_BG, rows_B, plan_Y,
            softmax_scale=softmax_scale,
        )  # fmt: skip
        return attended
    if rows_B is not None:
        block_table_BGM = block_table_BGM[rows_B]
        num_entries_BG = num_entries_BG[rows_B].masked_fill(rows_B[:, None] < 0, 0)
    batch, num_kv_heads = num_entries_BG.shape
    if batch == 0:
        return torch.zeros_like(q_BND)
    acc = accumulator_dtype(q_BND.dtype)
    k, v, is_entry = read_entries(
        k_pages_PSD, v_pages_PSD, block_table_BGM.flatten(0, 1), num_entries_BG.flatten(), acc
    )
    q = q_BND.unflatten(1, (num_kv_heads, -1)).flatten(0, 1).to(acc)
    scores = softmax_scale * (q @ k.transpose(1, 2))
    # a finite mask: a head without entries then averages zeros instead of giving NaN
    scores = scores.masked_fill(~is_entry[:, None], torch.finfo(acc).min)
    out = scores.softmax(-1) @ v
    return out.unflatten(0, (batch, num_kv_heads)).flatten(1, 2).to(q_BND.dtype)
