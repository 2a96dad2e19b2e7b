"""One decoded token of every request into the cache, as one Triton kernel. docs/method.md, section 6.

Local letters: X rows of a table of angles, H half of the rotary channels, Z channels that pass.

A program is one (request, key/value head). A head's channels are held in three parts, so that a
thread has both channels of a rotated pair: `lo` [H], `hi` [H] and `rest` [Z], padded to powers of two.
The open segment has three verbs, as in the reference: open, merge, emit. With a delay they are about
the token that leaves the head's ring, whose slot the new token takes. Where tokens are evicted, it becomes an
entry as it is stored, or is gone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dmc.ops.paged.decode import Angles, Gates
from megatron_dmc.ops.paged.layer_cache import LayerCache
from megatron_dmc.ops.tensors import dense_channels
from megatron_dmc.ops.triton.launch import borrowed_channel, is_content, on_device
from megatron_dmc.ops.triton.stored import decode, encode, parts, scale_of


@triton.jit
def _load(p_x, o_h, o_z, m_lo, m_hi, m_rest, HALF: tl.constexpr):
    """The three parts of a head as float32; 0 where masked."""
    b_lo = tl.load(p_x + o_h, mask=m_lo, other=0.0).to(tl.float32)
    b_hi = tl.load(p_x + HALF + o_h, mask=m_hi, other=0.0).to(tl.float32)
    b_rest = tl.load(p_x + 2 * HALF + o_z, mask=m_rest, other=0.0).to(tl.float32)
    return b_lo, b_hi, b_rest


@triton.jit
def _store(p_x, b_lo, b_hi, b_rest, o_h, o_z, m_lo, m_hi, m_rest, HALF: tl.constexpr):
    dtype = p_x.dtype.element_ty
    tl.store(p_x + o_h, b_lo.to(dtype), mask=m_lo)
    tl.store(p_x + HALF + o_h, b_hi.to(dtype), mask=m_hi)
    tl.store(p_x + 2 * HALF + o_z, b_rest.to(dtype), mask=m_rest)


@triton.jit
def _store_entry(
    p_pages, p_scales, i_slot, b_lo, b_hi, b_rest, o_h, o_z, m_lo, m_hi, m_rest, m_write,
    D: tl.constexpr, HALF: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """Write an entry, rounded as the pages store it; channels that are masked must be 0."""
    if STORED > 0:
        b_most = tl.maximum(
            tl.max(tl.abs(b_lo).to(tl.int32, bitcast=True), axis=0),
            tl.max(tl.abs(b_hi).to(tl.int32, bitcast=True), axis=0),
        )
        b_most = tl.maximum(b_most, tl.max(tl.abs(b_rest).to(tl.int32, bitcast=True), axis=0))
        scale = scale_of(b_most, STORED)
        tl.store(p_scales + i_slot, scale, mask=m_write)
        b_lo, b_hi, b_rest = (
            encode(b_lo, scale, STORED),
            encode(b_hi, scale, STORED),
            encode(b_rest, scale, STORED),
        )
    _store(
        p_pages + i_slot * D, b_lo, b_hi, b_rest,
        o_h, o_z, m_lo & m_write, m_hi & m_write, m_rest & m_write, HALF,
    )  # fmt: skip


@triton.jit
def _load_entry(
    p_pages, p_scales, i_slot, o_h, o_z, m_lo, m_hi, m_rest, m_read,
    D: tl.constexpr, HALF: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """The inverse of `_store_entry`."""
    p_entry = p_pages + i_slot * D
    if STORED == 0:
        return _load(p_entry, o_h, o_z, m_lo & m_read, m_hi & m_read, m_rest & m_read, HALF)
    scale = tl.load(p_scales + i_slot, mask=m_read, other=0.0)
    b_lo = decode(tl.load(p_entry + o_h, mask=m_lo & m_read, other=0), STORED)
    b_hi = decode(tl.load(p_entry + HALF + o_h, mask=m_hi & m_read, other=0), STORED)
    b_rest = decode(tl.load(p_entry + 2 * HALF + o_z, mask=m_rest & m_read, other=0), STORED)
    return b_lo * scale, b_hi * scale, b_rest * scale


@triton.jit
def _copy_entry(
    p_pages, p_scales, i_from, i_to, o_h, o_z, m_lo, m_hi, m_rest, m_copy,
    D: tl.constexpr, HALF: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """An entry from one slot to another, as it is stored."""
    p_from, p_to = p_pages + i_from * D, p_pages + i_to * D
    b_lo = tl.load(p_from + o_h, mask=m_lo & m_copy)
    b_hi = tl.load(p_from + HALF + o_h, mask=m_hi & m_copy)
    b_rest = tl.load(p_from + 2 * HALF + o_z, mask=m_rest & m_copy)
    tl.store(p_to + o_h, b_lo, mask=m_lo & m_copy)
    tl.store(p_to + HALF + o_h, b_hi, mask=m_hi & m_copy)
    tl.store(p_to + 2 * HALF + o_z, b_rest, mask=m_rest & m_copy)
    if STORED > 0:
        tl.store(p_scales + i_to, tl.load(p_scales + i_from, mask=m_copy), mask=m_copy)


@triton.jit
def append_kernel(
    p_q, p_k, p_v, p_is_merge, p_omega, p_cos, p_sin, p_positions, p_rows,
    p_k_pages, p_v_pages, p_k_scales, p_v_scales, p_table, p_entries, p_segments, p_free,
    p_free_state, p_late_merge, p_late_omega, p_q_out,
    M, num_free, alpha_offset, eps,
    s_qb, s_qn, s_kb, s_kg, s_vb, s_vg, s_cx, s_sx,
    s_tr, s_tg, s_er, s_eg, s_sr, s_sg, s_lr, s_lg, s_ob, s_on,
    D: tl.constexpr, S: tl.constexpr, U: tl.constexpr, R: tl.constexpr,
    HALF: tl.constexpr, H: tl.constexpr, Z: tl.constexpr,
    COMPRESS: tl.constexpr, GATES_GIVEN: tl.constexpr, MAY_MERGE: tl.constexpr,
    WINDOWED: tl.constexpr, ROTATE_Q: tl.constexpr, TAKE_PAGES: tl.constexpr,
    STORED: tl.constexpr, DELAY: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Gates, segment, RoPE, page, entry and count of one head; see `decode_append`. DELAY is W, 0 for none; with
    EVICT a token that has decided to merge is evicted instead."""
    i_g, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_groups = tl.num_programs(0)
    i_row = tl.load(p_rows + i_b).to(tl.int64)
    i_position = tl.load(p_positions + i_b).to(tl.int64)
    o_h, o_z = tl.arange(0, H), tl.arange(0, Z)
    m_lo, m_rest = o_h < HALF, o_z < D - 2 * HALF
    m_hi = m_lo
    # channels that carry content: all but the borrowed one
    m_lo_c, m_hi_c, m_rest_c = m_lo, m_hi, m_rest
    if COMPRESS:
        m_lo_c = m_lo & is_content(o_h, D)
        m_hi_c = m_hi & is_content(HALF + o_h, D)
        m_rest_c = m_rest & is_content(2 * HALF + o_z, D)
    # [H]
    b_cos = tl.load(p_cos + i_position * s_cx + o_h, mask=m_lo, other=1.0).to(tl.float32)
    b_sin = tl.load(p_sin + i_position * s_sx + o_h, mask=m_lo, other=0.0).to(tl.float32)

    p_q += i_b * s_qb + i_g * R * s_qn
    p_k += i_b * s_kb + i_g * s_kg
    p_v += i_b * s_vb + i_g * s_vg
    if ROTATE_Q:
        for i_r in range(R):
            b_lo, b_hi, b_rest = _load(p_q + i_r * s_qn, o_h, o_z, m_lo_c, m_hi_c, m_rest_c, HALF)
            b_turned = tl.where(m_hi_c, b_hi * b_cos + b_lo * b_sin, 0.0)
            b_lo = tl.where(m_lo_c, b_lo * b_cos - b_hi * b_sin, 0.0)
            p_o = p_q_out + i_b * s_ob + (i_g * R + i_r) * s_on
            _store(p_o, b_lo, b_turned, b_rest, o_h, o_z, m_lo, m_hi, m_rest, HALF)

    # gates
    m_row = i_row >= 0
    i_row = tl.maximum(i_row, 0)
    p_entries += i_row * s_er + i_g * s_eg
    num_entries = tl.load(p_entries)
    is_merge = num_entries < 0  # false
    omega = 1.0
    if COMPRESS:
        if GATES_GIVEN:
            is_merge = tl.load(p_is_merge + i_b * num_groups + i_g) != 0
            omega = tl.load(p_omega + i_b * num_groups + i_g).to(tl.float32)
        else:
            if MAY_MERGE:
                is_merge = tl.load(p_k + borrowed_channel(D)).to(tl.float32) - alpha_offset > 0
            logit = 0.0
            for i_r in range(R):
                logit += tl.load(p_q + i_r * s_qn + borrowed_channel(D)).to(tl.float32)
            omega = 1.0 / (1.0 + tl.exp(-(logit / R + alpha_offset))) + eps
    if DELAY > 0:
        # the ring decides for the token that leaves it, and keeps what the new one has decided
        i_ring = (i_position % DELAY).to(tl.int32)
        i_late = i_row * s_lr + i_g * s_lg
        new_merge, new_omega = is_merge, omega
        if not (EVICT and DELAY == 1):
            is_merge = tl.load(p_late_merge + i_late + i_ring, mask=m_row, other=0) != 0
        if not EVICT:
            omega = tl.load(p_late_omega + i_late + i_ring, mask=m_row, other=1.0)
    if EVICT:
        is_merge = is_merge & (num_entries >= DELAY)
    else:
        is_merge = is_merge & (num_entries > DELAY)

    # the entry's page: the head's, or one from the free list
    i_entry = tl.where(is_merge, num_entries - 1, num_entries)
    i_column = i_entry // S
    m_column = m_row & (i_column < M)
    p_table += i_row * s_tr + i_g * s_tg
    leaves = num_entries >= DELAY
    if DELAY > 0:
        i_ring_page = tl.load(p_table + i_ring // S, mask=m_row & leaves, other=-1).to(tl.int64)
    p_table += i_column
    i_page = tl.load(p_table, mask=m_column, other=-1).to(tl.int64)
    if TAKE_PAGES:
        m_take = m_column & (i_page < 0)
        i_taken = tl.atomic_add(p_free_state, 1, mask=m_take)
        m_got = m_take & (i_taken < num_free)
        i_new = tl.load(p_free + i_taken, mask=m_got, other=-1)
        tl.store(p_table, i_new.to(p_table.dtype.element_ty), mask=m_got)
        tl.store(p_free_state + 1, 1, mask=m_take & (i_taken >= num_free))
        i_page = tl.where(m_take, i_new.to(tl.int64), i_page)
    m_write = i_page >= 0

    b_klo, b_khi, b_krest = _load(p_k, o_h, o_z, m_lo_c, m_hi_c, m_rest_c, HALF)
    b_vlo, b_vhi, b_vrest = _load(p_v, o_h, o_z, m_lo, m_hi, m_rest, HALF)
    if DELAY > 0:
        # raw into the ring, with what RoPE turns into the borrowed channel: turning back loses nothing
        b_nlo, b_nhi = b_klo * b_cos - b_khi * b_sin, b_khi * b_cos + b_klo * b_sin
        b_nrest, b_nvlo, b_nvhi, b_nvrest = b_krest, b_vlo, b_vhi, b_vrest
        m_stored = m_write
        m_write = m_write & leaves
        i_slot = tl.where(leaves, i_ring_page, i_page) * S + i_ring % S
        if EVICT:
            i_to, m_kept = i_page * S + i_entry % S, m_write & (is_merge == 0)
            _copy_entry(
                p_k_pages, p_k_scales, i_slot, i_to, o_h, o_z, m_lo, m_hi, m_rest, m_kept,
                D, HALF, STORED,
            )  # fmt: skip
            _copy_entry(
                p_v_pages, p_v_scales, i_slot, i_to, o_h, o_z, m_lo, m_hi, m_rest, m_kept,
                D, HALF, STORED,
            )  # fmt: skip
        else:
            b_klo, b_khi, b_krest = _load_entry(
                p_k_pages, p_k_scales, i_slot, o_h, o_z, m_lo, m_hi, m_rest, m_write,
                D, HALF, STORED,
            )  # fmt: skip
            b_vlo, b_vhi, b_vrest = _load_entry(
                p_v_pages, p_v_scales, i_slot, o_h, o_z, m_lo, m_hi, m_rest, m_write,
                D, HALF, STORED,
            )  # fmt: skip
        tl.debug_barrier()
        _store_entry(
            p_k_pages, p_k_scales, i_slot, b_nlo, b_nhi, b_nrest,
            o_h, o_z, m_lo, m_hi, m_rest, m_stored, D, HALF, STORED,
        )  # fmt: skip
        _store_entry(
            p_v_pages, p_v_scales, i_slot, b_nvlo, b_nvhi, b_nvrest,
            o_h, o_z, m_lo, m_hi, m_rest, m_stored, D, HALF, STORED,
        )  # fmt: skip
        # to evict is a decision about the token before
        i_about = ((i_position + DELAY - 1) % DELAY).to(tl.int32) if EVICT else i_ring
        p_late_merge += i_late + i_about
        tl.store(p_late_merge, new_merge.to(p_late_merge.dtype.element_ty), mask=m_stored)
        if not EVICT:
            tl.store(p_late_omega + i_late + i_ring, new_omega, mask=m_stored)
            i_left = tl.maximum(i_position - DELAY, 0)
            b_cos = tl.load(p_cos + i_left * s_cx + o_h, mask=m_lo, other=1.0).to(tl.float32)
            b_sin = tl.load(p_sin + i_left * s_sx + o_h, mask=m_lo, other=0.0).to(tl.float32)
            b_back = b_khi * b_cos - b_klo * b_sin
            b_klo = tl.where(m_lo_c, b_klo * b_cos + b_khi * b_sin, 0.0)
            b_khi = tl.where(m_hi_c, b_back, 0.0)
            b_krest = tl.where(m_rest_c, b_krest, 0.0)
    if COMPRESS and not EVICT:
        p_segments += i_row * s_sr + i_g * s_sg
        b_klo, b_khi, b_krest = b_klo * omega, b_khi * omega, b_krest * omega
        b_vlo, b_vhi, b_vrest = b_vlo * omega, b_vhi * omega, b_vrest * omega
        # open: what was kept is forgotten; merge: it is added
        b_tklo, b_tkhi, b_tkrest = b_klo, b_khi, b_krest
        b_tvlo, b_tvhi, b_tvrest = b_vlo, b_vhi, b_vrest
        total = omega
        m_keep = m_write & is_merge
        for i_u in range(U - 1 if WINDOWED else 1):
            p_old = p_segments + (i_u + 1 if WINDOWED else i_u) * (2 * D + 1)
            b_lo, b_hi, b_rest = _load(
                p_old, o_h, o_z, m_lo & m_keep, m_hi & m_keep, m_rest & m_keep, HALF
            )
            b_tklo, b_tkhi, b_tkrest = b_tklo + b_lo, b_tkhi + b_hi, b_tkrest + b_rest
            b_lo2, b_hi2, b_rest2 = _load(
                p_old + D, o_h, o_z, m_lo & m_keep, m_hi & m_keep, m_rest & m_keep, HALF
            )
            b_tvlo, b_tvhi, b_tvrest = b_tvlo + b_lo2, b_tvhi + b_hi2, b_tvrest + b_rest2
            old_omega = tl.load(p_old + 2 * D, mask=m_keep, other=0.0)
            total += old_omega
            tl.debug_barrier()
            if WINDOWED:
                p_new = p_segments + i_u * (2 * D + 1)
                _store(
                    p_new, b_lo, b_hi, b_rest,
                    o_h, o_z, m_lo & m_write, m_hi & m_write, m_rest & m_write, HALF,
                )  # fmt: skip
                _store(
                    p_new + D, b_lo2, b_hi2, b_rest2,
                    o_h, o_z, m_lo & m_write, m_hi & m_write, m_rest & m_write, HALF,
                )  # fmt: skip
                tl.store(p_new + 2 * D, old_omega, mask=m_write)
        if WINDOWED:
            p_new = p_segments + (U - 1) * (2 * D + 1)
        else:
            p_new = p_segments
            b_klo, b_khi, b_krest = b_tklo, b_tkhi, b_tkrest
            b_vlo, b_vhi, b_vrest = b_tvlo, b_tvhi, b_tvrest
            omega = total
        _store(
            p_new, b_klo, b_khi, b_krest,
            o_h, o_z, m_lo & m_write, m_hi & m_write, m_rest & m_write, HALF,
        )  # fmt: skip
        _store(
            p_new + D, b_vlo, b_vhi, b_vrest,
            o_h, o_z, m_lo & m_write, m_hi & m_write, m_rest & m_write, HALF,
        )  # fmt: skip
        tl.store(p_new + 2 * D, omega, mask=m_write)
        # emit
        b_klo, b_khi, b_krest = b_tklo / total, b_tkhi / total, b_tkrest / total
        b_vlo, b_vhi, b_vrest = b_tvlo / total, b_tvhi / total, b_tvrest / total

    if not EVICT:
        b_turned = tl.where(m_hi_c, b_khi * b_cos + b_klo * b_sin, 0.0)
        b_klo = tl.where(m_lo_c, b_klo * b_cos - b_khi * b_sin, 0.0)
        b_krest = tl.where(m_rest_c, b_krest, 0.0)
        i_slot = i_page * S + i_entry % S
        _store_entry(
            p_k_pages, p_k_scales, i_slot, b_klo, b_turned, b_krest,
            o_h, o_z, m_lo, m_hi, m_rest, m_write, D, HALF, STORED,
        )  # fmt: skip
        _store_entry(
            p_v_pages, p_v_scales, i_slot, b_vlo, b_vhi, b_vrest,
            o_h, o_z, m_lo, m_hi, m_rest, m_write, D, HALF, STORED,
        )  # fmt: skip
    if DELAY > 0:
        m_write = m_stored
    tl.store(p_entries, (i_entry + 1).to(p_entries.dtype.element_ty), mask=m_write)


def decode_append(
    cache: LayerCache,
    rows_B: Tensor,
    q_BND: Tensor | None,
    k_BGD: Tensor,
    v_BGD: Tensor,
    gates_BG: Gates | None,
    angles_XF: Angles,
    positions_B: Tensor,
    *,
    compress: bool,
    may_merge: bool,
    alpha_offset: float,
    merge_window: int,
) -> Tensor | None:
    """The host side of `append_kernel`; `megatron_dmc.ops.paged.decode` has the contract.

    Gates come from `gates_BG` where given, else from the raw q and k.

    Returns:
        the rotated queries, or None where `q_BND` is.
    """
    batch, num_kv_heads, dim = k_BGD.shape
    k_pages, k_scales, stored = parts(cache.k_pages_PSD)
    v_pages, v_scales, _ = parts(cache.v_pages_PSD)
    table, entries, free = cache.block_table_RGM, cache.num_entries_RG, cache.free_pages
    k, v = dense_channels(k_BGD), dense_channels(v_BGD)
    q = k if q_BND is None else dense_channels(q_BND)
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    half = 0 if angles_XF[0] is None else angles_XF[0].shape[1] // 2
    cos, sin = (k if x is None else dense_channels(x) for x in angles_XF)
    segments = k if cache.segments_RGUA is None else cache.segments_RGUA
    is_merge, omega = gates_BG or (None, None)
    free_ids, free_state = (rows_B, rows_B) if free is None else (free.page_ids, free.state)
    late_merge = late_omega = k
    if cache.delayed is not None:
        late_merge = cache.delayed.is_merge_XGW.view(torch.uint8)
        if cache.delayed.omega_XGW is not None:
            late_omega = cache.delayed.omega_XGW
    if batch:
        with on_device(k):
            append_kernel[num_kv_heads, batch](
                q, k, v,
                k if is_merge is None else is_merge.contiguous().view(torch.uint8),
                k if omega is None else omega.contiguous(),
                cos, sin, positions_B, rows_B, k_pages, v_pages, k_scales, v_scales, table, entries,
                segments, free_ids, free_state, late_merge, late_omega, q_out, table.shape[2],
                free_ids.numel(), alpha_offset, torch.finfo(q.dtype).eps,
                *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], cos.stride(0), sin.stride(0),
                *table.stride()[:2], *entries.stride(), *segments.stride()[:2],
                *late_merge.stride()[:2], *q_out.stride()[:2],
                D=dim, S=cache.page_size, U=1 if cache.segments_RGUA is None else segments.shape[2],
                R=1 if q_BND is None else q.shape[1] // num_kv_heads,
                HALF=half, H=max(1, triton.next_power_of_2(half)),
                Z=max(1, triton.next_power_of_2(dim - 2 * half)),
                COMPRESS=compress, GATES_GIVEN=is_merge is not None, MAY_MERGE=may_merge,
                WINDOWED=compress and merge_window > 0, ROTATE_Q=q_BND is not None,
                TAKE_PAGES=free is not None, STORED=stored, DELAY=cache.delay,
                EVICT=cache.evicts,
                num_warps=1,
            )  # fmt: skip
    return None if q_BND is None else q_out
