"""Prefill's merge scan and page write as Triton kernels. docs/method.md, sections 2 and 6.

Local letters: X tiles of all chunks, C tiles of a block, HALF half of the rotary channels.

Every tile of every chunk is worked on at once: with hard decisions a tile needs of all before it only
the sums of the segment that is open where it begins. Three launches:

1. `tails_kernel`: each tile's sums of the tokens behind its last append, and how often it appends;
2. `carry_kernel`: the scan of these over the tiles of a chunk, from the open segment on. It is the merge
   recurrence again, tiles for tokens;
3. `write_kernel`: the tile's states, RoPE, and the page slots of those that are the last of a segment.

The first FIRST slots of a head are its ring, with a merge delay, and hold no entries.

A merge window needs no sums: its tiles overlap by W - 1 tokens, as in training, and a chunk's first tile
looks at the kept tokens. `kept_kernel` then puts the chunk's last W tokens in their place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dmc.ops.paged.chunks import Chunks
from megatron_dmc.ops.paged.decode import Angles, Gates
from megatron_dmc.ops.paged.layer_cache import LayerCache
from megatron_dmc.ops.paged.prefill import ChunkStates
from megatron_dmc.ops.tensors import dense_channels
from megatron_dmc.ops.triton.launch import INTERPRETED, is_content, on_device
from megatron_dmc.ops.triton.scan import last_row, products, weighted_sum

TILE = 32
WINDOWED_TILE = 64
"""Tokens that a tile reads; with a window W - 1 of them belong to the tile before."""
TILES_OF_BLOCK = 32
COMPONENTS = 32
"""Of an accumulator, scanned by one program."""


@triton.jit
def _decisions(p_is_merge, o_t, m_t, has_entry, s_mt):
    """alpha of tokens o_t [I] of a chunk, 0 where masked. Where the head has no entry yet, the chunk's
    first token opens one, whatever it says."""
    b_alpha = tl.load(p_is_merge + o_t * s_mt, mask=m_t, other=0).to(tl.float32)
    return tl.where((o_t > 0) | has_entry, b_alpha, 0.0)


@triton.jit
def tails_kernel(
    p_k, p_v, p_is_merge, p_omega, p_chunks, p_tiles, p_entries, p_appends, p_keep, p_tails,
    s_kt, s_kg, s_vt, s_vg, s_mt, s_mg, s_ot, s_og, s_er, s_eg,
    D: tl.constexpr, I: tl.constexpr, OWN: tl.constexpr, F: tl.constexpr, SUM: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """One tile of one head: appends, and (SUM) whether all merge, and the sums of its open end."""
    i_x, i_g, num_groups = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    i_chunk, first = tl.load(p_tiles + 2 * i_x), tl.load(p_tiles + 2 * i_x + 1)
    row = tl.load(p_chunks + 3 * i_chunk).to(tl.int64)
    start = tl.load(p_chunks + 3 * i_chunk + 1).to(tl.int64)
    num_tokens = tl.load(p_chunks + 3 * i_chunk + 2)
    has_entry = tl.load(p_entries + row * s_er + i_g * s_eg) > FIRST
    o_i = tl.arange(0, I)
    o_t = (first + o_i).to(tl.int64)
    m_t = (o_i < OWN) & (o_t < num_tokens)
    b_alpha = _decisions(p_is_merge + start * s_mt + i_g * s_mg, o_t, m_t, has_entry, s_mt)
    num_appends = tl.sum((m_t & (b_alpha == 0.0)).to(tl.int32), axis=0)
    tl.store(p_appends + i_x * num_groups + i_g, num_appends)
    if SUM:
        tl.store(p_keep + i_x * num_groups + i_g, tl.where(num_appends == 0, 1.0, 0.0))
        # [I]: 1 for the tokens that everything behind them merged with
        b_open = last_row(products(tl.where(m_t, b_alpha, 1.0), o_i, 0), o_i, I)
        m_open = m_t & (b_open > 0.0)
        b_omega = tl.load(p_omega + (start + o_t) * s_ot + i_g * s_og, mask=m_open, other=0.0)
        b_omega = b_omega.to(tl.float32)
        p_tails += (i_x * num_groups + i_g) * (2 * D + 1)
        p_k += start * s_kt + i_g * s_kg
        p_v += start * s_vt + i_g * s_vg
        for i_d in range(0, D, F):
            o_d = i_d + tl.arange(0, F)
            m_d = o_d < D
            # [I, F]
            m_k = m_open[:, None] & is_content(o_d, D)[None, :]
            b_k = tl.load(p_k + o_t[:, None] * s_kt + o_d[None, :], mask=m_k, other=0.0)
            m_v = m_open[:, None] & m_d[None, :]
            b_v = tl.load(p_v + o_t[:, None] * s_vt + o_d[None, :], mask=m_v, other=0.0)
            b_k, b_v = b_k.to(tl.float32), b_v.to(tl.float32)
            tl.store(p_tails + o_d, tl.sum(b_k * b_omega[:, None], axis=0), mask=m_d)
            tl.store(p_tails + D + o_d, tl.sum(b_v * b_omega[:, None], axis=0), mask=m_d)
        tl.store(p_tails + 2 * D, tl.sum(b_omega, axis=0))


@triton.jit
def carry_kernel(
    p_appends, p_keep, p_tails, p_chunks, p_tile_starts, p_entries, p_segments, p_base, p_carry,
    s_er, s_eg, s_sr, s_sg,
    A: tl.constexpr, C: tl.constexpr, F: tl.constexpr, SUM: tl.constexpr, FIRST: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """One head of one chunk, and a block of its accumulator: entries before each tile, and (SUM) the
    sums that it begins with; the last ones are the open segment's."""
    i_b, i_g, i_f = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_groups = tl.num_programs(1)
    row = tl.load(p_chunks + 3 * i_b).to(tl.int64)
    begin, end = tl.load(p_tile_starts + i_b), tl.load(p_tile_starts + i_b + 1)
    num_entries = tl.maximum(tl.load(p_entries + row * s_er + i_g * s_eg).to(tl.int32), FIRST)
    o_c, o_a = tl.arange(0, C), i_f * F + tl.arange(0, F)
    m_a = o_a < A
    p_segments += row * s_sr + i_g * s_sg
    # [F]
    b_state = tl.zeros([F], tl.float32)
    if SUM:
        b_state = tl.load(p_segments + o_a, mask=m_a & (num_entries > FIRST), other=0.0)
    for i_x in range(begin, end, C):
        o_x = (i_x + o_c).to(tl.int64)
        m_x = o_x < end
        o_xg = o_x * num_groups + i_g
        # [C]
        b_appends = tl.load(p_appends + o_xg, mask=m_x, other=0)
        b_base = num_entries + tl.cumsum(b_appends, axis=0) - b_appends
        tl.store(p_base + o_xg, b_base, mask=m_x & (i_f == 0))
        num_entries += tl.sum(b_appends, axis=0)
        if SUM:
            b_keep = tl.load(p_keep + o_xg, mask=m_x, other=1.0)
            # [C, F]
            m_xa = m_x[:, None] & m_a[None, :]
            b_tails = tl.load(p_tails + o_xg[:, None] * A + o_a[None, :], mask=m_xa, other=0.0)
            b_after = weighted_sum(products(b_keep, o_c, 0), b_tails, INTERPRET)
            b_after += tl.cumprod(b_keep, axis=0)[:, None] * b_state[None, :]
            # what stands after a tile is what the next one begins with
            p_rows = p_carry + o_xg[:, None] * A + o_a[None, :]
            b_first = tl.zeros([C, F], tl.float32) + b_state[None, :]
            tl.store(p_rows, b_first, mask=m_xa & (o_c == 0)[:, None])
            tl.store(p_rows + num_groups * A, b_after, mask=m_xa & (o_x + 1 < end)[:, None])
            b_state = last_row(b_after, o_c, C)
    if SUM:
        tl.store(p_segments + o_a, b_state, mask=m_a)


@triton.jit
def write_kernel(
    p_k, p_v, p_is_merge, p_omega, p_cos, p_sin, p_chunks, p_tiles, p_base, p_carry, p_segments,
    p_k_pages, p_v_pages, p_table, p_entries, p_own_k, p_own_v, p_entry,
    M,
    s_kt, s_kg, s_vt, s_vg, s_mt, s_mg, s_ot, s_og, s_ct, s_nt, s_tr, s_tg, s_er, s_eg, s_sr, s_sg,
    D: tl.constexpr, I: tl.constexpr, W: tl.constexpr, F: tl.constexpr, S: tl.constexpr,
    HALF: tl.constexpr, COMPRESS: tl.constexpr, FIRST: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile of one head and a block of channels: states, RoPE, entries. W is 0 for no window."""
    BACK: tl.constexpr = W - 1 if W > 0 else 0
    i_x, i_g, i_f = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    num_groups = tl.num_programs(1)
    i_chunk, first = tl.load(p_tiles + 2 * i_x), tl.load(p_tiles + 2 * i_x + 1)
    row = tl.load(p_chunks + 3 * i_chunk).to(tl.int64)
    start = tl.load(p_chunks + 3 * i_chunk + 1).to(tl.int64)
    num_tokens = tl.load(p_chunks + 3 * i_chunk + 2)
    o_i, o_d = tl.arange(0, I), i_f * F + tl.arange(0, F)
    o_t = (first + o_i - BACK).to(tl.int64)
    m_t = (o_t >= 0) & (o_t < num_tokens)
    m_own = m_t & (o_i >= BACK)
    m_d = o_d < D
    # the channel that RoPE turns a channel with
    o_pair = tl.where(o_d < HALF, o_d + HALF, tl.where(o_d < 2 * HALF, o_d - HALF, o_d))
    m_k, m_pair = m_d, m_d
    if COMPRESS:
        m_k, m_pair = is_content(o_d, D), m_d & is_content(o_pair, D)
    p_k += start * s_kt + i_g * s_kg
    p_v += start * s_vt + i_g * s_vg
    # [I, F]
    b_k = tl.load(p_k + o_t[:, None] * s_kt + o_d[None, :], mask=m_t[:, None] & m_k, other=0.0)
    b_v = tl.load(p_v + o_t[:, None] * s_vt + o_d[None, :], mask=m_t[:, None] & m_d, other=0.0)
    b_pair = tl.zeros([I, F], b_k.dtype)
    if HALF > 0:
        p_pair = p_k + o_t[:, None] * s_kt + o_pair[None, :]
        b_pair = tl.load(p_pair, mask=m_t[:, None] & m_pair, other=0.0)

    if COMPRESS:
        base = tl.load(p_base + i_x * num_groups + i_g)
        # only a chunk's first tile has its first token
        has_entry = (base > FIRST) | (first > 0)
        p_is_merge += start * s_mt + i_g * s_mg
        b_alpha = _decisions(p_is_merge, o_t, m_t, has_entry, s_mt)
        b_next = tl.load(
            p_is_merge + (o_t + 1) * s_mt, mask=m_own & (o_t + 1 < num_tokens), other=0
        )
        m_last = m_own & (b_next == 0)
        b_entry = base - 1 + tl.cumsum((m_own & (b_alpha == 0.0)).to(tl.int32), axis=0)
        p_omega += start * s_ot + i_g * s_og
        b_omega = tl.load(p_omega + o_t * s_ot, mask=m_t, other=0.0).to(tl.float32)
        # [I, I]
        b_w = products(b_alpha, o_i, W) * b_omega[None, :]
        # [I], [I, F]
        b_z = tl.sum(b_w, axis=1)
        b_k = weighted_sum(b_w, b_k, INTERPRET)
        b_v = weighted_sum(b_w, b_v, INTERPRET)
        if HALF > 0:
            b_pair = weighted_sum(b_w, b_pair, INTERPRET)
        if W > 0:
            # kept token u stands at u - W and counts up to token u - 1, while all merge
            b_open = tl.cumprod(tl.where(m_own, b_alpha, 1.0), axis=0)
            p_old = p_segments + row * s_sr + i_g * s_sg
            m_old = (first == 0) & has_entry
            for i_u in range(1, W):
                b_in = tl.where(m_own & (o_t < i_u), b_open, 0.0)
                b_z += b_in * tl.load(p_old + i_u * (2 * D + 1) + 2 * D, mask=m_old, other=0.0)
                b_ck = tl.load(p_old + i_u * (2 * D + 1) + o_d, mask=m_d & m_old, other=0.0)
                b_cv = tl.load(p_old + i_u * (2 * D + 1) + D + o_d, mask=m_d & m_old, other=0.0)
                b_k += b_in[:, None] * b_ck[None, :]
                b_v += b_in[:, None] * b_cv[None, :]
                if HALF > 0:
                    p_cp = p_old + i_u * (2 * D + 1) + o_pair
                    b_cp = tl.load(p_cp, mask=m_d & m_old, other=0.0)
                    b_pair += b_in[:, None] * b_cp[None, :]
        else:
            b_in = tl.cumprod(b_alpha, axis=0)
            p_carry += (i_x * num_groups + i_g) * (2 * D + 1)
            b_z += b_in * tl.load(p_carry + 2 * D)
            b_k += b_in[:, None] * tl.load(p_carry + o_d, mask=m_d, other=0.0)[None, :]
            b_v += b_in[:, None] * tl.load(p_carry + D + o_d, mask=m_d, other=0.0)[None, :]
            if HALF > 0:
                b_cp = tl.load(p_carry + o_pair, mask=m_d, other=0.0)
                b_pair += b_in[:, None] * b_cp[None, :]
        b_scale = 1.0 / tl.where(b_z > 0, b_z, 1.0)
        b_k, b_v, b_pair = (
            b_k * b_scale[:, None],
            b_v * b_scale[:, None],
            b_pair * b_scale[:, None],
        )
    else:
        b_k, b_pair = b_k.to(tl.float32), b_pair.to(tl.float32)
        m_last = m_own
        b_entry = (tl.load(p_base + i_chunk * num_groups + i_g) + o_t).to(tl.int32)

    if HALF > 0:
        m_turn = m_t[:, None] & (o_d < 2 * HALF)[None, :]
        p_cos += (start + o_t)[:, None] * s_ct + o_d[None, :]
        p_sin += (start + o_t)[:, None] * s_nt + o_d[None, :]
        b_cos = tl.load(p_cos, mask=m_turn, other=1.0).to(tl.float32)
        b_sin = tl.load(p_sin, mask=m_turn, other=0.0).to(tl.float32)
        b_k = b_k * b_cos + tl.where(o_d < HALF, -1.0, 1.0)[None, :] * b_pair * b_sin
    if COMPRESS:
        b_k = tl.where(is_content(o_d, D)[None, :], b_k, 0.0)
    b_k, b_v = b_k.to(p_k_pages.dtype.element_ty), b_v.to(p_v_pages.dtype.element_ty)

    o_tg = (start + o_t) * num_groups + i_g
    if COMPRESS:
        m_own_d = m_own[:, None] & m_d[None, :]
        tl.store(p_own_k + o_tg[:, None] * D + o_d[None, :], b_k, mask=m_own_d)
        tl.store(p_own_v + o_tg[:, None] * D + o_d[None, :], b_v, mask=m_own_d)
    b_column = b_entry // S
    p_page = p_table + row * s_tr + i_g * s_tg + b_column
    b_page = tl.load(p_page, mask=m_last & (b_column < M), other=-1).to(tl.int64)
    m_write = (m_last & (b_page >= 0))[:, None] & m_d[None, :]
    o_slot = (b_page * S + b_entry % S)[:, None] * D + o_d[None, :]
    tl.store(p_k_pages + o_slot, b_k, mask=m_write)
    tl.store(p_v_pages + o_slot, b_v, mask=m_write)
    if i_f == 0:
        tl.store(p_entry + o_tg, b_entry, mask=m_own)
        if first + I - BACK >= num_tokens:
            m_end = m_own & (o_t == num_tokens - 1)
            num_entries = tl.sum(tl.where(m_end, b_entry + 1, 0), axis=0)
            p_count = p_entries + row * s_er + i_g * s_eg
            tl.store(p_count, num_entries.to(p_entries.dtype.element_ty))


@triton.jit
def kept_kernel(
    p_k, p_v, p_is_merge, p_omega, p_chunks, p_tile_starts, p_base, p_segments,
    s_kt, s_kg, s_vt, s_vg, s_mt, s_mg, s_ot, s_og, s_sr, s_sg,
    D: tl.constexpr, W: tl.constexpr, C: tl.constexpr, F: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """The kept tokens of one head after one chunk, and a block of components; C is W padded."""
    i_b, i_g, i_f = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.load(p_chunks + 3 * i_b).to(tl.int64)
    start = tl.load(p_chunks + 3 * i_b + 1).to(tl.int64)
    num_tokens = tl.load(p_chunks + 3 * i_b + 2)
    base = tl.load(p_base + tl.load(p_tile_starts + i_b).to(tl.int64) * tl.num_programs(1) + i_g)
    o_u, o_a = tl.arange(0, C), i_f * F + tl.arange(0, F)
    o_t = (num_tokens - W + o_u).to(tl.int64)
    m_t = (o_u < W) & (o_t >= 0)
    p_is_merge += start * s_mt + i_g * s_mg
    b_alpha = _decisions(p_is_merge, o_t, m_t, base > FIRST, s_mt)
    # [C]: 1 if all behind it merged; what was kept before the chunk merges among itself
    b_open = last_row(products(tl.where(m_t, b_alpha, 1.0), o_u, 0), o_u, C)
    p_k += start * s_kt + i_g * s_kg
    p_v += start * s_vt + i_g * s_vg
    p_segments += row * s_sr + i_g * s_sg
    m_a = o_a < 2 * D + 1
    for i_u in range(W):
        i_t = (num_tokens - W + i_u).to(tl.int64)
        is_open = tl.sum(((o_u == i_u) & (b_open > 0.0)).to(tl.int32), axis=0) > 0
        m_new = m_a & is_open & (i_t >= 0)
        m_old = m_a & is_open & (i_t < 0) & (base > FIRST)
        b_omega = tl.load(
            p_omega + (start + i_t) * s_ot + i_g * s_og + 0 * o_a, mask=m_new, other=0.0
        )
        # [F]; the borrowed channel is 0
        b_x = tl.load(p_k + i_t * s_kt + o_a, mask=is_content(o_a, D) & m_new, other=0.0)
        m_v = (o_a >= D) & (o_a < 2 * D) & m_new
        b_x += tl.load(p_v + i_t * s_vt + o_a - D, mask=m_v, other=0.0)
        b_x = tl.where(o_a == 2 * D, 1.0, b_x.to(tl.float32)) * b_omega.to(tl.float32)
        p_old = p_segments + (i_u + num_tokens) * (2 * D + 1) + o_a
        b_x += tl.load(p_old, mask=m_old, other=0.0)
        tl.store(p_segments + i_u * (2 * D + 1) + o_a, b_x, mask=m_a)


def channels_of(head_dim: int, merge_window: int) -> int:
    """Channels of a block, chosen by the compiler's registers and spills."""
    return min(32 if merge_window else 64, max(16, triton.next_power_of_2(head_dim)))


def write_chunks(
    cache: LayerCache,
    chunks: Chunks,
    k_TGD: Tensor,
    v_TGD: Tensor,
    gates_TG: Gates | None,
    angles_TF: Angles,
    *,
    merge_window: int,
) -> ChunkStates:
    """The part of `megatron_dmc.ops.paged.prefill.prefill` that mutates; its arguments.

    Args:
        angles_TF: of the tokens.

    Returns:
        each token's own state and entry, int32.
    """
    num_tokens, num_kv_heads, dim = k_TGD.shape
    k, v, device = dense_channels(k_TGD), dense_channels(v_TGD), k_TGD.device
    compress, window = gates_TG is not None, 0 if gates_TG is None else merge_window
    num_entries_RG, table = cache.num_entries_RG, cache.block_table_RGM
    tile = WINDOWED_TILE if window else TILE
    own = tile - max(window - 1, 0)
    tiles = chunks.tiles(own)
    num_tiles, num_chunks = tiles.table_X2.shape[0], len(chunks.rows)
    entry = torch.empty(num_tokens, num_kv_heads, dtype=torch.int32, device=device)
    channels = channels_of(dim, window)
    blocks = triton.cdiv(dim, channels)
    half = 0 if angles_TF[0] is None else angles_TF[0].shape[1] // 2
    cos, sin = (k if x is None else dense_channels(x) for x in angles_TF)
    states: tuple[Tensor | None, Tensor | None] = (None, None)
    with on_device(k):
        if gates_TG is None:
            base = num_entries_RG[chunks.table_B3[:, 0].long()].contiguous()
            merges, omegas, segments, carry = (k,) * 4
            own_k = own_v = k
        else:
            assert cache.segments_RGUA is not None
            merges, omegas = gates_TG[0].view(torch.uint8), gates_TG[1]
            segments = cache.segments_RGUA
            rows = (num_tiles, num_kv_heads)
            appends, base = (torch.empty(rows, dtype=torch.int32, device=device) for _ in range(2))
            keep = torch.empty(rows, dtype=torch.float32, device=device)
            sums = (0, 0, 0) if window else (*rows, 2 * dim + 1)
            tails, carry = (torch.empty(sums, dtype=torch.float32, device=device) for _ in range(2))
            own_k, own_v = (torch.empty(k.shape, dtype=k.dtype, device=device) for _ in range(2))
            states = (own_k, own_v)
            tails_kernel[num_tiles, num_kv_heads](
                k, v, merges, omegas, chunks.table_B3, tiles.table_X2, num_entries_RG, appends, keep,
                tails, *k.stride()[:2], *v.stride()[:2], *merges.stride(), *omegas.stride(),
                *num_entries_RG.stride(), D=dim, I=tile, OWN=own, F=channels, SUM=not window,
                FIRST=cache.delay, num_warps=4,
            )  # fmt: skip
            parts = 1 if window else triton.cdiv(2 * dim + 1, COMPONENTS)
            carry_kernel[num_chunks, num_kv_heads, parts](
                appends, keep, tails, chunks.table_B3, tiles.starts_Y, num_entries_RG, segments,
                base, carry, *num_entries_RG.stride(), *segments.stride()[:2], A=2 * dim + 1,
                C=TILES_OF_BLOCK, F=COMPONENTS, SUM=not window, FIRST=cache.delay,
                INTERPRET=INTERPRETED, num_warps=4,
            )  # fmt: skip
        write_kernel[num_tiles, num_kv_heads, blocks](
            k, v, merges, omegas, cos, sin, chunks.table_B3, tiles.table_X2, base, carry, segments,
            cache.k_pages_PSD, cache.v_pages_PSD, table, num_entries_RG, own_k, own_v, entry,
            table.shape[2], *k.stride()[:2], *v.stride()[:2], *merges.stride()[:2],
            *omegas.stride()[:2], cos.stride(0), sin.stride(0), *table.stride()[:2],
            *num_entries_RG.stride(), *segments.stride()[:2], D=dim, I=tile, W=window, F=channels,
            S=cache.page_size, HALF=half, COMPRESS=compress, FIRST=cache.delay,
            INTERPRET=INTERPRETED, num_warps=4,
        )  # fmt: skip
        if window:
            kept_kernel[num_chunks, num_kv_heads, triton.cdiv(2 * dim + 1, 128)](
                k, v, merges, omegas, chunks.table_B3, tiles.starts_Y, base, segments,
                *k.stride()[:2], *v.stride()[:2], *merges.stride(), *omegas.stride(),
                *segments.stride()[:2], D=dim, W=window, C=max(16, triton.next_power_of_2(window)),
                F=128, FIRST=cache.delay, num_warps=4,
            )  # fmt: skip
    return *states, entry
