"""`megatron_dmc.ops.training.near` as Triton kernels: the near tokens, the open state and the far part's results go
through memory once, scores not at all.

A program has a tile of I tokens of one key/value head, and all of its query heads. A query of the tile sees raw keys
of the tile itself and of the blocks before it; in the backward, a key of the tile is seen by the queries of the blocks
behind it, too, whose scores are computed again instead of being added up in memory: the same bits in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dmc.ops.refusals import gpu_refusal
from megatron_dmc.ops.tensors import dense_channels, empty_tokens_first
from megatron_dmc.ops.training.near import KeyValue
from megatron_dmc.ops.triton.launch import INTERPRETED, is_content, on_device

MAX_NEAR = 65
"""Most raw tokens that a query sees in these kernels: its own and the 64 before it."""


@triton.jit
def _load(p_x, o_t, s_t, m_t, o_d, D: tl.constexpr):
    """Rows of a head, [rows, F]; 0 where there are none."""
    m_td = m_t[:, None] & (o_d < D)[None, :]
    return tl.load(p_x + o_t[:, None] * s_t + o_d[None, :], mask=m_td, other=0.0)


@triton.jit
def _store(p_x, b_x, o_t, s_t, m_t, o_d, D: tl.constexpr):
    m_td = m_t[:, None] & (o_d < D)[None, :]
    p_x += o_t[:, None] * s_t + o_d[None, :]
    tl.store(p_x, b_x.to(p_x.dtype.element_ty), mask=m_td)


@triton.jit
def _without_borrowed(b_x, o_d, D: tl.constexpr):
    return tl.where(is_content(o_d, D)[None, :], b_x, 0.0).to(b_x.dtype)


@triton.jit
def _dot(b_a, b_b, b_sum, INTERPRET: tl.constexpr):
    """b_sum + b_a b_b, in float32."""
    if INTERPRET:
        return b_sum + tl.dot(b_a.to(tl.float32), b_b.to(tl.float32))
    else:
        return tl.dot(b_a, b_b, b_sum, input_precision="tf32x3")


@triton.jit
def _product(b_a, b_b, INTERPRET: tl.constexpr):
    """b_a [I, F] times the transpose of b_b [J, F]: [I, J]."""
    return _dot(b_a, tl.trans(b_b), tl.zeros([b_a.shape[0], b_b.shape[0]], tl.float32), INTERPRET)


@triton.jit
def _in_band(o_distance, m_pair, n):
    return (o_distance >= 0) & (o_distance < n) & m_pair


@triton.jit
def _join_one(b_out, b_max, b_sum, b_score, b_value):
    """One more key for each query: b_out [I, F] is sum(exp(s - b_max) v) and b_sum [I] the sum of the weights."""
    b_new = tl.maximum(b_max, b_score)
    b_keep, b_weight = tl.exp(b_max - b_new), tl.exp(b_score - b_new)
    b_out = b_out * b_keep[:, None] + b_value.to(tl.float32) * b_weight[:, None]
    return b_out, b_new, b_sum * b_keep + b_weight


@triton.jit
def join_kernel(
    p_q, p_nk, p_nv, p_ok, p_ov, p_far, p_far_lse, p_out, p_lse,
    T, past, far, n, scale,
    s_qb, s_qn, s_qt, s_nkb, s_nkg, s_nkt, s_nvb, s_nvg, s_nvt, s_okb, s_okg, s_okt, s_ovb, s_ovg, s_ovt,
    s_fb, s_fn, s_ft, s_lb, s_ln, s_lt, s_ob, s_on, s_ot,
    R, D: tl.constexpr, I: tl.constexpr, F: tl.constexpr,
    NEAR: tl.constexpr, OPEN: tl.constexpr, FAR: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """T queries, the first of which is token `past`; the first `far` of them have no far part."""
    i_t, i_g, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_groups = tl.num_programs(1)
    o_d = tl.arange(0, F)
    o_q = (i_t * I + tl.arange(0, I)).to(tl.int64)
    m_q = o_q < T
    o_t = o_q + past
    m_e = m_q & (o_t >= n)
    p_nk += i_b * s_nkb + i_g * s_nkg
    p_nv += i_b * s_nvb + i_g * s_nvg
    p_ok += i_b * s_okb + i_g * s_okg
    p_ov += i_b * s_ovb + i_g * s_ovg
    num_blocks = 1 + tl.cdiv(n - 1, I)
    for i_r in range(R):
        i_n = i_g * R + i_r
        b_q = _load(p_q + i_b * s_qb + i_n * s_qn, o_q, s_qt, m_q, o_d, D)
        if NEAR:
            b_max = tl.full([I], float("-inf"), tl.float32)
            b_sum = tl.zeros([I], tl.float32)
            b_out = tl.zeros([I, F], tl.float32)
            for i_h in range(num_blocks):
                o_k = o_t - i_h * I
                m_k = (o_k >= 0) & (o_k < past + T) & (o_k > past + i_t * I - n)
                b_k = _without_borrowed(_load(p_nk, o_k, s_nkt, m_k, o_d, D), o_d, D)
                b_v = _load(p_nv, o_k, s_nvt, m_k, o_d, D)
                # [I, I]; a query sees itself, in the first block, so no maximum is infinite
                m_s = _in_band(o_t[:, None] - o_k[None, :], (o_k >= 0)[None, :], n)
                b_s = tl.where(m_s, _product(b_q, b_k, INTERPRET) * scale, float("-inf"))
                b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
                b_keep = tl.exp(b_max - b_new)
                b_s = tl.exp(b_s - b_new[:, None])
                b_sum = b_sum * b_keep + tl.sum(b_s, axis=1)
                b_out = _dot(b_s.to(b_v.dtype), b_v, b_out * b_keep[:, None], INTERPRET)
                b_max = b_new
        if OPEN:
            b_k = _without_borrowed(_load(p_ok, o_t - n, s_okt, m_e, o_d, D), o_d, D)
            b_v = _load(p_ov, o_t - n, s_ovt, m_e, o_d, D)
            b_open = tl.sum(b_q.to(tl.float32) * b_k.to(tl.float32), axis=1) * scale
            if NEAR:
                b_open = tl.where(m_e, b_open, float("-inf"))
                b_out, b_max, b_sum = _join_one(b_out, b_max, b_sum, b_open, b_v)
            else:
                b_out, b_max, b_sum = b_v.to(tl.float32), b_open, tl.full([I], 1.0, tl.float32)
        if FAR:
            m_f = m_q & (o_q >= far)
            p_l = p_far_lse + i_b * s_lb + i_n * s_ln + (o_q - far) * s_lt
            b_far_lse = tl.load(p_l, mask=m_f, other=float("-inf"))
            b_far = _load(p_far + i_b * s_fb + i_n * s_fn, o_q - far, s_ft, m_f, o_d, D)
            b_out, b_max, b_sum = _join_one(b_out, b_max, b_sum, b_far_lse, b_far)
        b_out = b_out / b_sum[:, None]
        _store(p_out + i_b * s_ob + i_n * s_on, b_out, o_q, s_ot, m_q, o_d, D)
        o_bnt = (i_b * num_groups * R + i_n) * T + o_q
        tl.store(p_lse + o_bnt, b_max + tl.log(b_sum), mask=m_q)


@triton.jit
def add_gradients_kernel(
    p_g, p_q, p_out, p_lse, p_nk, p_nv, p_ok, p_ov, p_fq, p_fk, p_fv, p_dq, p_dnk, p_dnv, p_dok, p_dov,
    T, K, past, far, num_far, n, scale,
    s_gb, s_gn, s_gt, s_qb, s_qn, s_qt, s_ob, s_on, s_ot,
    s_nkb, s_nkg, s_nkt, s_nvb, s_nvg, s_nvt, s_okb, s_okg, s_okt, s_ovb, s_ovg, s_ovt,
    s_fqb, s_fqn, s_fqt, s_fkb, s_fkg, s_fkt, s_fvb, s_fvg, s_fvt, s_dqb, s_dqn, s_dqt, s_dkb, s_dkg, s_dkt,
    R, D: tl.constexpr, I: tl.constexpr, F: tl.constexpr,
    NEAR: tl.constexpr, OPEN: tl.constexpr, FAR: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Tokens of the K keys, and n more: the queries t, the raw keys t and the states t - n. T queries from token
    `past` on, of which the first `far` have no far part; the first `num_far` far keys have a gradient."""
    i_t, i_g, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_groups = tl.num_programs(1)
    o_d = tl.arange(0, F)
    o_t = (i_t * I + tl.arange(0, I)).to(tl.int64)
    o_q = o_t - past
    m_q = (o_q >= 0) & (o_q < T)
    m_k = o_t < K
    m_e = m_q & (o_t >= n)
    p_q += i_b * s_qb + i_g * R * s_qn
    p_g += i_b * s_gb + i_g * R * s_gn
    p_out += i_b * s_ob + i_g * R * s_on
    p_lse += (i_b * num_groups + i_g) * R * T
    p_nk += i_b * s_nkb + i_g * s_nkg
    p_nv += i_b * s_nvb + i_g * s_nvg
    p_ok += i_b * s_okb + i_g * s_okg
    p_ov += i_b * s_ovb + i_g * s_ovg
    p_fq += i_b * s_fqb + i_g * R * s_fqn
    p_fk += i_b * s_fkb + i_g * s_fkg
    p_fv += i_b * s_fvb + i_g * s_fvg
    p_dq += i_b * s_dqb + i_g * R * s_dqn
    i_x = i_b * s_dkb + i_g * s_dkg
    num_blocks = 1 + tl.cdiv(n - 1, I)
    # tokens long before the first query have gradients of the far part alone
    num_heads = tl.where(i_t * I + I + n > past, R, 0)

    # Three walks over the heads, each of whose tiles comes from the cache after the first walk: fewer values are live.
    # [I, F]
    b_dk = tl.zeros([I, F], tl.float32)
    b_dv = tl.zeros([I, F], tl.float32)
    if OPEN:
        for i_r in range(num_heads):
            b_q = _load(p_q + i_r * s_qn, o_q, s_qt, m_q, o_d, D).to(tl.float32)
            b_g = _load(p_g + i_r * s_gn, o_q, s_gt, m_q, o_d, D).to(tl.float32)
            b_o = _load(p_out + i_r * s_on, o_q, s_ot, m_q, o_d, D).to(tl.float32)
            b_k = _without_borrowed(_load(p_ok, o_t - n, s_okt, m_e, o_d, D), o_d, D).to(tl.float32)
            b_v = _load(p_ov, o_t - n, s_ovt, m_e, o_d, D).to(tl.float32)
            b_lse = tl.load(p_lse + i_r * T + o_q, mask=m_q, other=0.0)
            # [I]
            b_p = tl.where(m_e, tl.exp(tl.sum(b_q * b_k, axis=1) * scale - b_lse), 0.0)
            b_ds = b_p * tl.sum(b_g * (b_v - b_o), axis=1) * scale
            b_dk += b_ds[:, None] * b_q
            b_dv += b_p[:, None] * b_g
            if not NEAR:
                b_dq = b_ds[:, None] * b_k
                if FAR:
                    m_f = m_q & (o_q >= far)
                    b_dq += _load(p_fq + i_r * s_fqn, o_q - far, s_fqt, m_f, o_d, D).to(tl.float32)
                b_dq = _without_borrowed(b_dq, o_d, D)
                _store(p_dq + i_r * s_dqn, b_dq, o_q, s_dqt, m_q, o_d, D)
    if FAR:
        o_f = o_t - n if OPEN else o_t
        m_f = (o_f >= 0) & (o_f < num_far)
        b_dk += _load(p_fk, o_f, s_fkt, m_f, o_d, D).to(tl.float32)
        b_dv += _load(p_fv, o_f, s_fvt, m_f, o_d, D).to(tl.float32)
    if OPEN:
        m_e = (o_t >= n) & (o_t - n < K)
        _store(p_dok + i_x, _without_borrowed(b_dk, o_d, D), o_t - n, s_dkt, m_e, o_d, D)
        _store(p_dov + i_x, b_dv, o_t - n, s_dkt, m_e, o_d, D)

    if NEAR:
        for i_r in range(num_heads):
            b_q = _load(p_q + i_r * s_qn, o_q, s_qt, m_q, o_d, D)
            b_g = _load(p_g + i_r * s_gn, o_q, s_gt, m_q, o_d, D)
            b_o = _load(p_out + i_r * s_on, o_q, s_ot, m_q, o_d, D)
            b_lse = tl.load(p_lse + i_r * T + o_q, mask=m_q, other=0.0)
            b_delta = tl.sum(b_g.to(tl.float32) * b_o.to(tl.float32), axis=1)
            b_dq = tl.zeros([I, F], tl.float32)
            for i_h in range(num_blocks):
                o_k = o_t - i_h * I
                m_h = (o_k >= 0) & (o_k < K) & (o_k > i_t * I - n)
                b_k = _without_borrowed(_load(p_nk, o_k, s_nkt, m_h, o_d, D), o_d, D)
                b_v = _load(p_nv, o_k, s_nvt, m_h, o_d, D)
                # [I, I]: queries, keys
                b_s = _product(b_q, b_k, INTERPRET) * scale - b_lse[:, None]
                m_s = _in_band(o_t[:, None] - o_k[None, :], m_q[:, None] & m_h[None, :], n)
                b_p = tl.where(m_s, tl.exp(b_s), 0.0)
                b_ds = b_p * (_product(b_g, b_v, INTERPRET) - b_delta[:, None]) * scale
                b_dq = _dot(b_ds.to(b_k.dtype), b_k, b_dq, INTERPRET)
            if OPEN:
                b_k = _without_borrowed(_load(p_ok, o_t - n, s_okt, m_e, o_d, D), o_d, D).to(
                    tl.float32
                )
                b_v = _load(p_ov, o_t - n, s_ovt, m_e, o_d, D).to(tl.float32)
                b_p = tl.exp(tl.sum(b_q.to(tl.float32) * b_k, axis=1) * scale - b_lse)
                b_ds = b_p * (tl.sum(b_g.to(tl.float32) * b_v, axis=1) - b_delta) * scale
                b_dq += tl.where(m_e, b_ds, 0.0)[:, None] * b_k
            if FAR:
                m_f = m_q & (o_q >= far)
                b_dq += _load(p_fq + i_r * s_fqn, o_q - far, s_fqt, m_f, o_d, D).to(tl.float32)
            b_dq = _without_borrowed(b_dq, o_d, D)
            _store(p_dq + i_r * s_dqn, b_dq, o_q, s_dqt, m_q, o_d, D)

        if OPEN:  # their gradients are written
            b_dk = tl.zeros([I, F], tl.float32)
            b_dv = tl.zeros([I, F], tl.float32)
        b_k = _without_borrowed(_load(p_nk, o_t, s_nkt, m_k, o_d, D), o_d, D)
        b_v = _load(p_nv, o_t, s_nvt, m_k, o_d, D)
        for i_r in range(num_heads):
            for i_l in range(num_blocks):
                o_l = o_t + i_l * I
                m_l = (o_l >= past) & (o_l < past + T) & (o_l < i_t * I + I + n - 1)
                b_q = _load(p_q + i_r * s_qn, o_l - past, s_qt, m_l, o_d, D)
                b_g = _load(p_g + i_r * s_gn, o_l - past, s_gt, m_l, o_d, D)
                b_o = _load(p_out + i_r * s_on, o_l - past, s_ot, m_l, o_d, D)
                b_delta = tl.sum(b_g.to(tl.float32) * b_o.to(tl.float32), axis=1)
                b_lse = tl.load(p_lse + i_r * T + o_l - past, mask=m_l, other=0.0)
                # [I, I]: keys, queries
                b_s = _product(b_k, b_q, INTERPRET) * scale - b_lse[None, :]
                m_s = _in_band(o_l[None, :] - o_t[:, None], m_l[None, :], n)
                b_p = tl.where(m_s, tl.exp(b_s), 0.0)
                b_ds = b_p * (_product(b_v, b_g, INTERPRET) - b_delta[None, :]) * scale
                b_dv = _dot(b_p.to(b_g.dtype), b_g, b_dv, INTERPRET)
                b_dk = _dot(b_ds.to(b_q.dtype), b_q, b_dk, INTERPRET)
        _store(p_dnk + i_x, _without_borrowed(b_dk, o_d, D), o_t, s_dkt, m_k, o_d, D)
        _store(p_dnv + i_x, b_dv, o_t, s_dkt, m_k, o_d, D)


def refusal(q_BNTD: Tensor, n: int) -> str:
    """See `ops.backends`."""
    if not (q_BNTD.is_cuda or INTERPRETED):
        return "only tensors on a GPU"
    if n > MAX_NEAR:
        return f"a query sees {n} raw tokens, more than {MAX_NEAR}"
    return gpu_refusal(q_BNTD, (torch.float32, torch.bfloat16, torch.float16))


def tiling(head_dim: int, n: int) -> dict[str, int]:
    """I and F of the kernels, and their warps: by the compiler's registers and spills (docs/performance.md)."""
    channels = max(16, triton.next_power_of_2(head_dim))
    tile = max(1, 4096 // channels)  # 16 values of a tensor for each of 256 threads
    return dict(I=min(tile, 64) if n else tile, F=channels, num_warps=8)


def _strides(*tensors: Tensor) -> list[int]:
    return [s for x in tensors for s in x.stride()[:3]]


def _dense(keys: KeyValue | None, missing: Tensor) -> KeyValue:
    """For the kernel's arguments, which need a tensor where there is none."""
    if keys is None:
        return KeyValue(missing, missing)
    return KeyValue(dense_channels(keys.k), dense_channels(keys.v))


def join(q_BNTD, near, opened, far, n, scale):
    """As `megatron_dmc.ops.training.near.join`."""
    q = dense_channels(q_BNTD)
    num_keys = (near or opened).k.shape[2]
    batch, heads, tokens, dim = q.shape
    near_, open_ = _dense(near, q), _dense(opened, q)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    out = empty_tokens_first(q)
    far_out, far_lse = (q, lse) if far is None else (dense_channels(far[0]), far[1].float())
    sizes = tiling(dim, n)
    groups = (near or opened).k.shape[1]
    with on_device(q):
        join_kernel[triton.cdiv(tokens, sizes["I"]), groups, batch](
            q, *near_, *open_, far_out, far_lse, out, lse,
            tokens, num_keys - tokens, tokens - far_out.shape[2], n, scale,
            *_strides(q, *near_, *open_, far_out, far_lse, out), heads // groups, D=dim,
            NEAR=near is not None, OPEN=opened is not None, FAR=far is not None,
            INTERPRET=INTERPRETED, num_stages=1, **sizes,
        )  # fmt: skip
    return out, lse, None


def add_gradients(
    grad_out_BNTD, q_BNTD, out_BNTD, lse_BNT, near, opened, far_grads, n, scale, state
):
    """As `megatron_dmc.ops.training.near.add_gradients`."""
    g, q, out = (dense_channels(x) for x in (grad_out_BNTD, q_BNTD, out_BNTD))
    keys = near or opened
    batch, heads, tokens, dim = q.shape
    groups, num_keys = keys.k.shape[1:3]
    near_, open_ = _dense(near, q), _dense(opened, q)
    far_q, far_k, far_v = (q, q, q) if far_grads is None else map(dense_channels, far_grads)
    dq = empty_tokens_first(q)
    d_near, d_open = (
        None if x is None else KeyValue(*(empty_tokens_first(keys.k) for _ in "kv"))
        for x in (near, opened)
    )
    written = [*(d_near or (q, q)), *(d_open or (q, q))]
    sizes = tiling(dim, n)
    num_tokens = num_keys + (n if opened is not None else 0)
    with on_device(q):
        add_gradients_kernel[triton.cdiv(num_tokens, sizes["I"]), groups, batch](
            g, q, out, lse_BNT.contiguous(), *near_, *open_, far_q, far_k, far_v, dq, *written,
            tokens, num_keys, num_keys - tokens, tokens - far_q.shape[2], far_k.shape[2], n, scale,
            *_strides(g, q, out, *near_, *open_, far_q, far_k, far_v, dq, (d_near or d_open).k),
            heads // groups, D=dim, NEAR=near is not None, OPEN=opened is not None,
            FAR=far_grads is not None, INTERPRET=INTERPRETED, num_stages=1, **sizes,
        )  # fmt: skip
    return dq, d_near, d_open
