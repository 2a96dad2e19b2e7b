"""The merge of keys and values as Triton kernels, forward and backward. docs/method.md, section 2.

Local letters: X = B x G sequences of a head, C tiles of a sequence, N blocks of channels.

Within a tile the merge is a product with a small triangular matrix. It is made of products of
decisions, never of quotients or logarithms, so that decisions of exactly 0 and 1 are exact:

    M_ij = prod_{j < l <= i} alpha_l  (j <= i)    z_i = sum_j M_ij omega_j    y_i = sum_j M_ij omega_j x_j / z_i

Unlimited merging walks through the tiles of a segment of a sequence in order and carries one token that represents
everything before: x = y_{t-1} with omega = z_{t-1}. The carries are kept, one for each tile, so that
the backward need not walk forward first; it walks the other way and carries that token's gradients.
A segment's first carry is what the last tiles before it leave: the walk starts where what came earlier has been
multiplied by less than NEGLIGIBLE, mostly one tile early; its tokens are read twice, and nothing is passed between
programs. Gradients come in the same way from the tiles behind a segment.
Windowed merging needs no carry: its tiles overlap by W - 1 tokens and all run at once. Keys, values
and their gradients are each read once (except for the overlap) and written once.

The gates' gradients need no product over channels but `Q_ij = gy_i . x_j`. With `r_i = gy_i . y_i`:

    gomega_j = sum_i M_ij (Q_ij - r_i) / z_i
    galpha_l = sum_{j < l <= i} M_il M_{l-1,j} omega_j (Q_ij - r_i) / z_i

Both are sums over channels: every block of channels writes its part, and the parts are added.
"""

import triton
import triton.language as tl

from megatron_dmc.ops.triton.scan import last_row, products, weighted_sum


@triton.jit
def _earlier_products(b_before, o_i):
    """M_{l-1,j} at [j, l]: product of alpha over (j, l), 0 for l <= j; b_before [I] is alpha_{l-1}."""
    m_between = o_i[None, :] - 1 > o_i[:, None]
    b_m = tl.cumprod(tl.where(m_between, b_before[None, :], 1.0), axis=1)
    return tl.where(o_i[None, :] > o_i[:, None], b_m, 0.0)


NEGLIGIBLE = tl.constexpr(2.0**-64)
"""A product of decisions that takes from a sum what float32 does not resolve: weights of tokens are at most 1, the
sums at least one importance, more than 2^-24."""


@triton.jit
def _tile_product(p_alpha, i_c, s_at, T, I: tl.constexpr):
    """The product of a tile's decisions."""
    o_t = (i_c * I + tl.arange(0, I)).to(tl.int64)
    m_t = o_t < T
    b_alpha = tl.load(p_alpha + o_t * s_at, mask=m_t & (o_t > 0), other=0.0).to(tl.float32)
    return tl.min(tl.cumprod(tl.where(m_t, b_alpha, 1.0), axis=0), axis=0)


@triton.jit
def _scores(b_gy, b_x, INTERPRET: tl.constexpr):
    """gy_i . x_j over the channels of the block: [I, I] float32."""
    if INTERPRET:
        return tl.dot(b_gy.to(tl.float32), tl.trans(b_x.to(tl.float32)))
    else:
        return tl.dot(b_gy, tl.trans(b_x), input_precision="tf32x3")


@triton.jit
def _gate_product(b_q, b_prev, DTYPE: tl.constexpr):
    """b_q [I, I] times b_prev [I, I] in float32; half-precision keys and values have lost more than
    tf32 loses here."""
    if DTYPE == tl.float32:
        return tl.dot(b_q, b_prev, input_precision="tf32x3")
    else:
        return tl.dot(b_q, b_prev, input_precision="tf32")


@triton.jit
def unlimited_forward_kernel(
    p_k, p_v, p_alpha, p_omega, p_yk, p_yv, p_carry, p_carry_z,
    T, G, X, segment,
    s_kt, s_kb, s_kg, s_vt, s_vb, s_vg, s_at, s_ab, s_ag, s_ot, s_ob, s_og,
    D: tl.constexpr, I: tl.constexpr, F: tl.constexpr,
    STAGES: tl.constexpr, SAVE: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """A segment of one sequence of one head and one block of channels, tile after tile; `segment` tiles each."""
    i_f, i_x = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = tl.program_id(2) * segment
    end = tl.minimum(first + segment, tl.cdiv(T, I))
    i_b, i_g = i_x // G, i_x % G
    o_i = tl.arange(0, I)
    o_d = i_f * F + tl.arange(0, F)
    m_d = o_d < D
    p_k += i_b * s_kb + i_g * s_kg
    p_v += i_b * s_vb + i_g * s_vg
    p_alpha += i_b * s_ab + i_g * s_ag
    p_omega += i_b * s_ob + i_g * s_og

    start = first
    left = 1.0
    while (start > 0) & (left > NEGLIGIBLE):
        start -= 1
        left *= _tile_product(p_alpha, start, s_at, T, I)
    # [F]
    b_ck = tl.zeros([F], tl.float32)
    b_cv = tl.zeros([F], tl.float32)
    b_cz = 0.0
    for i_c in tl.range(start, end, num_stages=STAGES):
        o_t = (i_c * I + o_i).to(tl.int64)
        m_t = o_t < T
        is_own = i_c >= first
        m_td = m_t[:, None] & m_d[None, :]
        # [I]
        b_alpha = tl.load(p_alpha + o_t * s_at, mask=m_t & (o_t > 0), other=0.0).to(tl.float32)
        b_omega = tl.load(p_omega + o_t * s_ot, mask=m_t, other=1.0).to(tl.float32)
        # [I, F]
        b_k = tl.load(p_k + o_t[:, None] * s_kt + o_d[None, :], mask=m_td, other=0.0)
        b_v = tl.load(p_v + o_t[:, None] * s_vt + o_d[None, :], mask=m_td, other=0.0)
        if SAVE:
            p_row = p_carry + (i_c * X + i_x) * (2 * D) + o_d
            tl.store(p_row, b_ck, mask=m_d & is_own)
            tl.store(p_row + D, b_cv, mask=m_d & is_own)
            tl.store(p_carry_z + i_c * X + i_x, b_cz, mask=(i_f == 0) & is_own)

        # [I, I]
        b_w = products(b_alpha, o_i, 0) * b_omega[None, :]
        # [I]: the carried token's product, and its share
        b_in = tl.cumprod(b_alpha, axis=0) * b_cz
        b_z = tl.sum(b_w, axis=1) + b_in
        b_w = b_w / b_z[:, None]
        b_in = b_in / b_z
        # [I, F]
        b_yk = weighted_sum(b_w, b_k, INTERPRET) + b_in[:, None] * b_ck[None, :]
        b_yv = weighted_sum(b_w, b_v, INTERPRET) + b_in[:, None] * b_cv[None, :]
        o_y = (o_t * X + i_x)[:, None] * D + o_d[None, :]
        tl.store(p_yk + o_y, b_yk.to(p_yk.dtype.element_ty), mask=m_td & is_own)
        tl.store(p_yv + o_y, b_yv.to(p_yv.dtype.element_ty), mask=m_td & is_own)

        b_share = last_row(b_w, o_i, I)
        b_keep = last_row(b_in, o_i, I)
        b_ck = tl.sum(b_share[:, None] * b_k.to(tl.float32), axis=0) + b_keep * b_ck
        b_cv = tl.sum(b_share[:, None] * b_v.to(tl.float32), axis=0) + b_keep * b_cv
        b_cz = last_row(b_z, o_i, I)


@triton.jit
def unlimited_backward_kernel(
    p_k, p_v, p_alpha, p_omega, p_gyk, p_gyv, p_carry, p_carry_z,
    p_gk, p_gv, p_galpha, p_gomega,
    T, G, X, segment,
    s_kt, s_kb, s_kg, s_vt, s_vb, s_vg, s_at, s_ab, s_ag, s_ot, s_ob, s_og,
    s_gkt, s_gkb, s_gkg, s_gvt, s_gvb, s_gvg,
    D: tl.constexpr, I: tl.constexpr, F: tl.constexpr,
    STAGES: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """A segment of one sequence of one head and one block of channels, from the last tile to the first."""
    i_f, i_x = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_tiles = tl.cdiv(T, I)
    first = tl.program_id(2) * segment
    end = tl.minimum(first + segment, num_tiles)
    i_b, i_g = i_x // G, i_x % G
    o_i = tl.arange(0, I)
    o_d = i_f * F + tl.arange(0, F)
    m_d = o_d < D
    p_k += i_b * s_kb + i_g * s_kg
    p_v += i_b * s_vb + i_g * s_vg
    p_alpha += i_b * s_ab + i_g * s_ag
    p_omega += i_b * s_ob + i_g * s_og
    p_gyk += i_b * s_gkb + i_g * s_gkg
    p_gyv += i_b * s_gvb + i_g * s_gvg
    p_galpha += i_f.to(tl.int64) * T * X + i_x
    p_gomega += i_f.to(tl.int64) * T * X + i_x

    last = end
    left = 1.0
    while (last < num_tiles) & (left > NEGLIGIBLE):
        left *= _tile_product(p_alpha, last, s_at, T, I)
        last += 1
    # [F]: alpha_n gA_n of the next tile's first token n, and alpha_n gz_n
    b_gak = tl.zeros([F], tl.float32)
    b_gav = tl.zeros([F], tl.float32)
    b_gaz = 0.0
    for i_r in tl.range(0, last - first, num_stages=STAGES):
        i_c = last - 1 - i_r
        o_t = (i_c * I + o_i).to(tl.int64)
        m_t = o_t < T
        is_own = i_c < end
        m_td = m_t[:, None] & m_d[None, :]
        # [I]; b_before is alpha_{t-1} within the tile and 1 for its first token
        b_alpha = tl.load(p_alpha + o_t * s_at, mask=m_t & (o_t > 0), other=0.0).to(tl.float32)
        m_before = m_t & (o_i > 0) & (o_t > 1)
        b_before = tl.load(p_alpha + (o_t - 1) * s_at, mask=m_before, other=0.0).to(tl.float32)
        b_omega = tl.load(p_omega + o_t * s_ot, mask=m_t, other=1.0).to(tl.float32)
        # [I, F]
        b_k = tl.load(p_k + o_t[:, None] * s_kt + o_d[None, :], mask=m_td, other=0.0)
        b_v = tl.load(p_v + o_t[:, None] * s_vt + o_d[None, :], mask=m_td, other=0.0)
        b_gyk = tl.load(p_gyk + o_t[:, None] * s_gkt + o_d[None, :], mask=m_td, other=0.0)
        b_gyv = tl.load(p_gyv + o_t[:, None] * s_gvt + o_d[None, :], mask=m_td, other=0.0)
        # [F]
        p_row = p_carry + (i_c * X + i_x) * (2 * D) + o_d
        b_ck = tl.load(p_row, mask=m_d, other=0.0)
        b_cv = tl.load(p_row + D, mask=m_d, other=0.0)
        b_cz = tl.load(p_carry_z + i_c * X + i_x)

        # products over channels with the carried token and its gradient: [I], [I], scalar
        b_gyc = tl.sum(b_gyk.to(tl.float32) * b_ck[None, :], axis=1)
        b_gyc += tl.sum(b_gyv.to(tl.float32) * b_cv[None, :], axis=1)
        b_gax = tl.sum(b_k.to(tl.float32) * b_gak[None, :], axis=1)
        b_gax += tl.sum(b_v.to(tl.float32) * b_gav[None, :], axis=1) + b_gaz
        b_gac = tl.sum(b_gak * b_ck, axis=0) + tl.sum(b_gav * b_cv, axis=0) + b_gaz

        # [I, I]
        b_m = products(b_alpha, o_i, 0)
        b_w = b_m * b_omega[None, :]
        # [I]
        b_in = tl.cumprod(b_alpha, axis=0)
        b_z = tl.sum(b_w, axis=1) + b_in * b_cz
        b_w = b_w / b_z[:, None]
        b_out = last_row(b_m, o_i, I)
        # [I, I]: Q, then (Q - r) / z
        b_q = _scores(b_gyk, b_k, INTERPRET) + _scores(b_gyv, b_v, INTERPRET)
        b_r = tl.sum(b_w * b_q, axis=1) + b_in * b_cz / b_z * b_gyc
        b_q = (b_q - b_r[:, None]) / b_z[:, None]

        b_gomega = tl.sum(b_m * b_q, axis=0) + b_out * b_gax

        # omega_j M_{l-1,j} at [j, l], and the product from the tile's start to l - 1
        b_first = tl.where(o_i == 0, 1.0, b_before)
        b_prev = _earlier_products(b_before, o_i) * b_omega[:, None]
        b_in_prev = tl.cumprod(b_first, axis=0) * b_cz
        # [I, I]: row i is the token whose output changes, column l the decision
        b_q = tl.where(o_i[:, None] >= o_i[None, :], b_q, 0.0)
        b_h = _gate_product(b_q, b_prev, p_k.dtype.element_ty)
        b_h += ((b_gyc - b_r) / b_z)[:, None] * b_in_prev[None, :]
        b_galpha = tl.sum(b_m * b_h, axis=0)
        b_future = tl.sum(b_prev * b_gax[:, None], axis=0) + b_in_prev * b_gac
        b_galpha += b_out * b_future
        tl.store(p_galpha + o_t * X, b_galpha, mask=m_t & is_own)
        tl.store(p_gomega + o_t * X, b_gomega, mask=m_t & is_own)

        # [I, F]
        b_wt = tl.trans(b_w)
        b_out = b_out * b_omega
        b_gk = weighted_sum(b_wt, b_gyk, INTERPRET) + b_out[:, None] * b_gak[None, :]
        b_gv = weighted_sum(b_wt, b_gyv, INTERPRET) + b_out[:, None] * b_gav[None, :]
        o_x = (o_t * X + i_x)[:, None] * D + o_d[None, :]
        tl.store(p_gk + o_x, b_gk.to(p_gk.dtype.element_ty), mask=m_td & is_own)
        tl.store(p_gv + o_x, b_gv.to(p_gv.dtype.element_ty), mask=m_td & is_own)

        b_keep = last_row(b_in, o_i, I)
        b_in = b_in / b_z
        b_gak = tl.sum(b_in[:, None] * b_gyk.to(tl.float32), axis=0) + b_keep * b_gak
        b_gav = tl.sum(b_in[:, None] * b_gyv.to(tl.float32), axis=0) + b_keep * b_gav
        b_gaz = b_keep * b_gaz - tl.sum(b_in * b_r, axis=0)


@triton.jit
def windowed_forward_kernel(
    p_k, p_v, p_alpha, p_omega, p_yk, p_yv,
    T, G, X,
    s_kt, s_kb, s_kg, s_vt, s_vb, s_vg, s_at, s_ab, s_ag, s_ot, s_ob, s_og,
    D: tl.constexpr, I: tl.constexpr, F: tl.constexpr, W: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile: I tokens are read, of which the first W - 1 belong to the tile before."""
    i_f, i_x, i_c = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    i_b, i_g = i_x // G, i_x % G
    o_i = tl.arange(0, I)
    o_d = i_f * F + tl.arange(0, F)
    o_t = (i_c * (I - W + 1) + o_i - (W - 1)).to(tl.int64)
    m_t = (o_t >= 0) & (o_t < T)
    m_td = m_t[:, None] & (o_d < D)[None, :]
    p_k += i_b * s_kb + i_g * s_kg
    p_v += i_b * s_vb + i_g * s_vg
    p_alpha += i_b * s_ab + i_g * s_ag
    p_omega += i_b * s_ob + i_g * s_og
    # [I]
    b_alpha = tl.load(p_alpha + o_t * s_at, mask=m_t & (o_t > 0), other=0.0).to(tl.float32)
    b_omega = tl.load(p_omega + o_t * s_ot, mask=m_t, other=1.0).to(tl.float32)
    # [I, F]
    b_k = tl.load(p_k + o_t[:, None] * s_kt + o_d[None, :], mask=m_td, other=0.0)
    b_v = tl.load(p_v + o_t[:, None] * s_vt + o_d[None, :], mask=m_td, other=0.0)
    # [I, I]
    b_w = products(b_alpha, o_i, W) * b_omega[None, :]
    b_w = b_w / tl.sum(b_w, axis=1)[:, None]
    # [I, F]
    b_yk = weighted_sum(b_w, b_k, INTERPRET)
    b_yv = weighted_sum(b_w, b_v, INTERPRET)
    m_td = m_td & (o_i >= W - 1)[:, None]
    o_y = (o_t * X + i_x)[:, None] * D + o_d[None, :]
    tl.store(p_yk + o_y, b_yk.to(p_yk.dtype.element_ty), mask=m_td)
    tl.store(p_yv + o_y, b_yv.to(p_yv.dtype.element_ty), mask=m_td)


@triton.jit
def windowed_backward_kernel(
    p_k, p_v, p_alpha, p_omega, p_gyk, p_gyv,
    p_gk, p_gv, p_galpha, p_gomega,
    T, G, X,
    s_kt, s_kb, s_kg, s_vt, s_vb, s_vg, s_at, s_ab, s_ag, s_ot, s_ob, s_og,
    s_gkt, s_gkb, s_gkg, s_gvt, s_gvb, s_gvg,
    D: tl.constexpr, I: tl.constexpr, F: tl.constexpr, W: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile: I tokens are read, of which W - 1 at either end belong to the neighbours."""
    i_f, i_x, i_c = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    i_b, i_g = i_x // G, i_x % G
    o_i = tl.arange(0, I)
    o_d = i_f * F + tl.arange(0, F)
    o_t = (i_c * (I - 2 * (W - 1)) + o_i - (W - 1)).to(tl.int64)
    m_t = (o_t >= 0) & (o_t < T)
    m_td = m_t[:, None] & (o_d < D)[None, :]
    p_k += i_b * s_kb + i_g * s_kg
    p_v += i_b * s_vb + i_g * s_vg
    p_alpha += i_b * s_ab + i_g * s_ag
    p_omega += i_b * s_ob + i_g * s_og
    p_gyk += i_b * s_gkb + i_g * s_gkg
    p_gyv += i_b * s_gvb + i_g * s_gvg
    p_galpha += i_f.to(tl.int64) * T * X + i_x
    p_gomega += i_f.to(tl.int64) * T * X + i_x
    # [I]
    b_alpha = tl.load(p_alpha + o_t * s_at, mask=m_t & (o_t > 0), other=0.0).to(tl.float32)
    m_before = m_t & (o_t > 1)
    b_before = tl.load(p_alpha + (o_t - 1) * s_at, mask=m_before, other=0.0).to(tl.float32)
    b_omega = tl.load(p_omega + o_t * s_ot, mask=m_t, other=1.0).to(tl.float32)
    # [I, F]
    b_k = tl.load(p_k + o_t[:, None] * s_kt + o_d[None, :], mask=m_td, other=0.0)
    b_v = tl.load(p_v + o_t[:, None] * s_vt + o_d[None, :], mask=m_td, other=0.0)
    b_gyk = tl.load(p_gyk + o_t[:, None] * s_gkt + o_d[None, :], mask=m_td, other=0.0)
    b_gyv = tl.load(p_gyv + o_t[:, None] * s_gvt + o_d[None, :], mask=m_td, other=0.0)
    # [I, I]
    b_m = products(b_alpha, o_i, W)
    b_w = b_m * b_omega[None, :]
    b_z = tl.sum(b_w, axis=1)
    b_w = b_w / b_z[:, None]
    # [I, I]: Q, then (Q - r) / z
    b_q = _scores(b_gyk, b_k, INTERPRET) + _scores(b_gyv, b_v, INTERPRET)
    b_q = (b_q - tl.sum(b_w * b_q, axis=1)[:, None]) / b_z[:, None]
    b_gomega = tl.sum(b_m * b_q, axis=0)
    # omega_j M_{l-1,j} at [j, l]
    b_prev = _earlier_products(b_before, o_i) * b_omega[:, None]
    m_counts = (o_i[:, None] >= o_i[None, :]) & (o_i[:, None] - o_i[None, :] < W)
    b_q = tl.where(m_counts, b_q, 0.0)
    b_h = _gate_product(b_q, b_prev, p_k.dtype.element_ty)
    # nothing stands before token 0, whatever the padding before it says
    b_galpha = tl.where(o_t > 0, tl.sum(b_m * b_h, axis=0), 0.0)

    m_own = (o_i >= W - 1) & (o_i < I - (W - 1))
    tl.store(p_galpha + o_t * X, b_galpha, mask=m_t & m_own)
    tl.store(p_gomega + o_t * X, b_gomega, mask=m_t & m_own)
    # [I, F]
    b_wt = tl.trans(b_w)
    b_gk = weighted_sum(b_wt, b_gyk, INTERPRET)
    b_gv = weighted_sum(b_wt, b_gyv, INTERPRET)
    m_td = m_td & m_own[:, None]
    o_x = (o_t * X + i_x)[:, None] * D + o_d[None, :]
    tl.store(p_gk + o_x, b_gk.to(p_gk.dtype.element_ty), mask=m_td)
    tl.store(p_gv + o_x, b_gv.to(p_gv.dtype.element_ty), mask=m_td)
