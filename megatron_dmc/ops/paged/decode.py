"""Append and attention of decoding on a paged cache; `ops.paged.prefill` has the rest. docs/method.md, section 6.
Dimension letters: docs/architecture.md.
"""

import torch
from torch import Tensor

from megatron_dmc.ops import gates, rope
from megatron_dmc.ops.backends import DECODE
from megatron_dmc.ops.paged.layer_cache import LayerCache
from megatron_dmc.ops.paged.pages import take_where
from megatron_dmc.ops.tensors import accumulator_dtype

Gates = tuple[Tensor, Tensor]
"""Decisions (bool) and importances (float32 or float64) of tokens and KV heads, as `gates.decide` returns them."""
Angles = tuple[Tensor | None, Tensor | None]
"""Cosines and sines, as `rope.cosine_and_sine` returns them."""


def decode_append(
    cache: LayerCache,
    rows_B: Tensor,
    k_BGD: Tensor,
    v_BGD: Tensor,
    gates_BG: Gates | None,
    freqs_BF: Tensor | None,
    *,
    merge_window: int = 0,
    backend: str | None = None,
) -> None:
    """One new token for each of B requests: every head merges it into its open segment or opens a
    new one, and writes the segment's entry, rotated at the token's position.

    Mutates of `cache` one slot per request and head, the rows' segments, and `num_entries_RG` (plus 1 where a
    head appended); with `free_pages` also `block_table_RGM` (a page where the entry's page is -1) and
    `free_pages.state`. A head that finds no page is left as it was.

    Args:
        rows_B: int64, each request's row; distinct; -1 for padding of a fixed batch: nothing of it is
            written.
        k_BGD, v_BGD: unrotated keys and values; the borrowed channel is ignored when compressing.
        gates_BG: a decision is ignored where a head has no entry yet. None: plain cache, every token is
            appended as it is and every channel counts.
        freqs_BF: RoPE angles of each request's position, or None.
        merge_window: W; 0 is unlimited.
        backend: of `ops.backends.DECODE`; None: the first that can.

    Raises:
        ValueError: the backend does not exist or does not take these tensors.
    """
    assert cache.delayed is None, "a delay needs tables of angles: gate_and_append"
    angles = rope.cosine_and_sine(freqs_BF, k_BGD.dtype)
    chosen = DECODE.choose(k_BGD, cache.page_size, backend=backend)
    positions = torch.arange(k_BGD.shape[0], device=k_BGD.device)
    if chosen == "torch":
        _append_live(cache, rows_B, k_BGD, v_BGD, gates_BG, angles, positions, merge_window)
        return
    DECODE.kernels(chosen).decode_append(
        cache, rows_B, None, k_BGD, v_BGD, gates_BG, angles, positions,
        compress=gates_BG is not None, may_merge=True, alpha_offset=0.0, merge_window=merge_window,
    )  # fmt: skip


def torch_append(
    cache: LayerCache,
    rows_B: Tensor,
    k_BGD: Tensor,
    v_BGD: Tensor,
    gates_BG: Gates | None,
    angles_BF: Angles,
    *,
    merge_window: int = 0,
) -> Tensor:
    """`decode_append` in PyTorch for rows that are not negative; with a delay for tokens that leave the ring.

    Returns:
        bool (B, G): false for a head that found no page.
    """
    entries = cache.num_entries_RG[rows_B]
    is_merge = torch.zeros_like(entries, dtype=torch.bool)
    if gates_BG is not None:
        is_merge = gates_BG[0] & (entries > cache.delay)
    entry = entries - is_merge.to(entries.dtype)
    _take_page_of(cache, rows_B, entry)
    slots = cache.slots(rows_B, entry[..., None])[..., 0]
    has_page = slots >= 0
    if gates_BG is None:
        key, value = rope.rotate(k_BGD, *angles_BF), v_BGD
    else:
        assert cache.segments_RGUA is not None
        acc = cache.segments_RGUA.dtype
        omega = gates_BG[1].to(acc)[..., None]
        k = gates.zero_borrowed_channel(k_BGD)
        weighted = torch.cat([k.to(acc) * omega, v_BGD.to(acc) * omega, omega], dim=-1)
        old = cache.segments_RGUA[rows_B]
        # a segment opens with what was kept forgotten
        kept = torch.where(is_merge[..., None, None], old, torch.zeros_like(old))
        if merge_window:
            segment = torch.cat([kept[:, :, 1:], weighted[:, :, None]], dim=2)
        else:
            segment = kept + weighted[:, :, None]
        cache.segments_RGUA[rows_B] = torch.where(has_page[..., None, None], segment, old)
        total = segment.sum(2)
        y = (total[..., :-1] / total[..., -1:]).to(k_BGD.dtype)
        y_k, value = y.split([k_BGD.shape[-1], v_BGD.shape[-1]], dim=-1)
        key = gates.zero_borrowed_channel(rope.rotate(y_k, *angles_BF))
    cache.num_entries_RG[rows_B] = torch.where(has_page, entry + 1, entries)
    cache.store(slots.flatten(), key.flatten(0, 1), value.flatten(0, 1))
    return has_page


def _append_after_delay(
    cache: LayerCache,
    rows_B: Tensor,
    k_BGD: Tensor,
    v_BGD: Tensor,
    gates_BG: Gates,
    angles_XF: Angles,
    positions_B: Tensor,
    *,
    merge_window: int,
) -> None:
    """Each new token into its ring, and the token that leaves the ring into its entry, unless it is evicted; for
    rows that are not negative."""
    delayed = cache.delayed
    assert delayed is not None
    delay, heads = delayed.delay, k_BGD.shape[:2]
    slot_B, leaves_B = positions_B % delay, positions_B >= delay
    ring_BG = slot_B[:, None].expand(heads)
    fits_BG = torch.ones(heads, dtype=torch.bool, device=k_BGD.device)
    # the slots of the tokens that these decisions are about
    about_B = (positions_B - 1) % delay if cache.evicts else slot_B
    if cache.evicts and bool(leaves_B.any()):
        rows, slot = rows_B[leaves_B], slot_B[leaves_B]
        is_evicted = delayed.is_merge_XGW[rows, :, slot]
        if delay == 1:  # what the new token says
            is_evicted = gates_BG[0][leaves_B]
        fits_BG[leaves_B] = _keep(cache, rows, slot, is_evicted)
    elif delayed.omega_XGW is not None and bool(leaves_B.any()):
        rows, slot = rows_B[leaves_B], slot_B[leaves_B]
        cos, sin = angles_of(angles_XF, positions_B[leaves_B] - delay)
        k, v = cache.load_slots(cache.slots(rows, ring_BG[leaves_B, :, None])[..., 0], k_BGD.dtype)
        fits_BG[leaves_B] = torch_append(
            cache, rows, rope.rotate(k, cos, None if sin is None else -sin), v,
            (delayed.is_merge_XGW[rows, :, slot], delayed.omega_XGW[rows, :, slot]), (cos, sin),
            merge_window=merge_window,
        )  # fmt: skip
    _take_page_of(cache, rows_B, ring_BG)
    places_BG = cache.slots(rows_B, ring_BG[..., None])[..., 0].masked_fill(~fits_BG, -1)
    key = rope.rotate(gates.zero_borrowed_channel(k_BGD), *angles_of(angles_XF, positions_B))
    cache.store(places_BG.flatten(), key.flatten(0, 1), v_BGD.flatten(0, 1))
    fits_BG = places_BG >= 0
    entries_BG, first_B1 = cache.num_entries_RG[rows_B], ~leaves_B[:, None]
    cache.num_entries_RG[rows_B] = torch.where(
        fits_BG & first_B1, positions_B[:, None] + 1, entries_BG
    )
    for of_ring, new_BG in zip((delayed.is_merge_XGW, delayed.omega_XGW), gates_BG, strict=True):
        if of_ring is not None:
            old_BG = of_ring[rows_B, :, about_B]
            of_ring[rows_B, :, about_B] = torch.where(fits_BG, new_BG.to(of_ring.dtype), old_BG)


def _keep(cache: LayerCache, rows_B: Tensor, slot_B: Tensor, is_evicted_BG: Tensor) -> Tensor:
    """The tokens in these slots of the rings as new entries, without those that are evicted.

    Returns:
        bool (B, G): false for a head that found no page.
    """
    entries_BG = cache.num_entries_RG[rows_B]
    # an evicted token needs no other page than the head's last
    entry_BG = entries_BG - is_evicted_BG.to(entries_BG.dtype)
    _take_page_of(cache, rows_B, entry_BG)
    to_BG = cache.slots(rows_B, entry_BG[..., None])[..., 0]
    from_BG = cache.slots(rows_B, slot_B[:, None].expand_as(entries_BG)[..., None])[..., 0]
    cache.copy_slots(from_BG.flatten(), to_BG.masked_fill(is_evicted_BG, -1).flatten())
    fits_BG = to_BG >= 0
    cache.num_entries_RG[rows_B] = torch.where(fits_BG, entry_BG + 1, entries_BG)
    return fits_BG


def angles_of(angles_XF: Angles, rows_X: Tensor) -> Angles:
    """Rows of tables of angles."""
    cos_XF, sin_XF = angles_XF
    if cos_XF is None or sin_XF is None:
        return None, None
    return cos_XF[rows_X], sin_XF[rows_X]


def _take_page_of(cache: LayerCache, rows_B: Tensor, entry_BG: Tensor) -> None:
    """A page for each entry that lacks one, with `free_pages`."""
    if cache.free_pages is None:
        return
    table_RGM = cache.block_table_RGM
    rows_B1, heads_G = rows_B[:, None], torch.arange(entry_BG.shape[1], device=entry_BG.device)
    column = entry_BG // cache.page_size
    at = (rows_B1, heads_G, column.clamp_max(table_RGM.shape[2] - 1))
    wants = (table_RGM[at] < 0) & (column < table_RGM.shape[2])
    table_RGM[at] = torch.where(wants, take_where(wants, cache.free_pages), table_RGM[at])


def _append_live(
    cache: LayerCache,
    rows_B: Tensor,
    k_BGD: Tensor,
    v_BGD: Tensor,
    gates_BG: Gates | None,
    angles_XF: Angles,
    positions_B: Tensor,
    merge_window: int,
) -> None:
    """Appending in PyTorch, without padding."""
    live = rows_B >= 0
    rows_B, k_BGD, v_BGD, positions_B = rows_B[live], k_BGD[live], v_BGD[live], positions_B[live]
    if gates_BG is not None:
        gates_BG = gates_BG[0][live], gates_BG[1][live]
    if cache.delayed is None:
        torch_append(
            cache, rows_B, k_BGD, v_BGD, gates_BG, angles_of(angles_XF, positions_B),
            merge_window=merge_window,
        )  # fmt: skip
        return
    assert gates_BG is not None, "a delay without decisions"
    _append_after_delay(
        cache, rows_B, k_BGD, v_BGD, gates_BG, angles_XF, positions_B, merge_window=merge_window
    )


def gate_and_append(
    cache: LayerCache,
    rows_B: Tensor,
    q_BND: Tensor,
    k_BGD: Tensor,
    v_BGD: Tensor,
    angles_XF: Angles,
    positions_B: Tensor,
    *,
    alpha_offset: float | None,
    merge_window: int = 0,
    may_merge: bool = True,
    gates_BG: Gates | None = None,
    backend: str | None = None,
) -> Tensor:
    """Everything between the raw projections of decoded tokens and attention: gates, `decode_append`, and RoPE
    of the queries. On a GPU one kernel, and nothing that the host has to wait for.

    Mutates `cache` as `decode_append` does; with a delay also the new token's slot of the ring and its decision:
    the token that leaves the ring there is the one that merges or is appended, or is evicted.

    Args:
        rows_B: int64, distinct; -1 for padding of a fixed batch: nothing of it is written.
        q_BND, k_BGD, v_BGD: unrotated, the borrowed channel in place (after QK-norm, if any).
        angles_XF: tables of X positions; both halves of F are alike.
        positions_B: int64, each token's row in these tables; with a delay its place in its sequence.
        alpha_offset: docs/method.md, section 1. None: a plain cache (see `decode_append`).
        may_merge: False: every token is appended, though the borrowed channel carries no content.
        gates_BG: used instead of the channels' gates.

    Returns:
        rotated q_BND, the borrowed channel zero when compressing; rows of padding are undefined.
    """
    compress = alpha_offset is not None
    chosen = DECODE.choose(k_BGD, cache.page_size, backend=backend)
    if chosen != "torch":
        rotated: Tensor = DECODE.kernels(chosen).decode_append(
            cache, rows_B, q_BND, k_BGD, v_BGD, gates_BG, angles_XF, positions_B,
            compress=compress, may_merge=may_merge, alpha_offset=alpha_offset or 0.0,
            merge_window=merge_window,
        )  # fmt: skip
        return rotated
    if alpha_offset is not None and gates_BG is None:
        gates_BG = gates.decide(q_BND, k_BGD, alpha_offset=alpha_offset, may_merge=may_merge)
    _append_live(cache, rows_B, k_BGD, v_BGD, gates_BG, angles_XF, positions_B, merge_window)
    return rope.rotate(q_BND, *angles_of(angles_XF, positions_B), compress=compress)


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
    """Divide decode attention among the kernels' workers, for L layers in one launch.

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
    chosen = DECODE.choose(like, page_size, group, backend=backend)
    if chosen == "torch":
        return [None] * num_entries_LRG.shape[0]
    return list(DECODE.kernels(chosen).plan(num_entries_LRG, rows_B, ahead=ahead))


def paged_decode_attention(
    cache: LayerCache,
    rows_B: Tensor,
    q_BND: Tensor,
    *,
    softmax_scale: float,
    plan_Y: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One query token per request over all entries of each head, of which every head has its own
    number.

    Args:
        rows_B: int64, each request's row; -1 is padding, which attends over nothing.
        q_BND: rotated queries, heads ordered by group; the borrowed channel zero when compressing.
        plan_Y: this layer's part of `plan_decode_attention`; None: planned here. PyTorch needs none.

    Returns:
        out_BND in the queries' dtype, computed in float32 (float64); zero for a head without
        entries.
    """
    group = q_BND.shape[1] // cache.num_kv_heads
    chosen = DECODE.choose(q_BND, cache.page_size, group, backend=backend)
    if chosen != "torch":
        attended: Tensor = DECODE.kernels(chosen).paged_decode_attention(
            cache, rows_B, q_BND, plan_Y, softmax_scale=softmax_scale
        )
        return attended
    if rows_B.shape[0] == 0:
        return torch.zeros_like(q_BND)
    acc = accumulator_dtype(q_BND.dtype)
    num_entries_BG = cache.num_entries_RG[rows_B].masked_fill(rows_B[:, None] < 0, 0)
    k, v, is_entry = (x.flatten(0, 1) for x in cache.load(rows_B, acc, num_entries_BG))
    q = q_BND.unflatten(1, (cache.num_kv_heads, -1)).flatten(0, 1).to(acc)
    scores = softmax_scale * (q @ k.transpose(1, 2))
    # a finite mask: a head without entries then averages zeros instead of giving NaN
    scores = scores.masked_fill(~is_entry[:, None], torch.finfo(acc).min)
    out = scores.softmax(-1) @ v
    return out.unflatten(0, num_entries_BG.shape).flatten(1, 2).to(q_BND.dtype)
