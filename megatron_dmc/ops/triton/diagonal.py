"""`megatron_dmc.ops.training.diagonal` as Triton kernels: each tensor is read once and written once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dmc.ops.backends import gpu_refusal
from megatron_dmc.ops.tensors import dense_channels
from megatron_dmc.ops.triton.launch import INTERPRETED, is_content, on_device


@triton.jit
def join_kernel(
    p_q, p_k, p_v, p_past, p_past_lse, p_out, p_lse, p_own,
    T, scale,
    s_qb, s_qn, s_qt, s_kb, s_kg, s_kt, s_vb, s_vg, s_vt,
    s_pb, s_pn, s_pt, s_lb, s_ln, s_lt, s_ob, s_on, s_ot,
    R, D: tl.constexpr, I: tl.constexpr, F: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """A tile of tokens of one key/value head, and all of its query heads."""
    i_t, i_g, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_groups = tl.num_programs(1)
    o_t = (i_t * I + tl.arange(0, I)).to(tl.int64)
    o_d = tl.arange(0, F)
    m_t = o_t < T
    m_td = m_t[:, None] & (o_d < D)[None, :]
    # [I, F]
    p_k += i_b * s_kb + i_g * s_kg + o_t[:, None] * s_kt + o_d[None, :]
    p_v += i_b * s_vb + i_g * s_vg + o_t[:, None] * s_vt + o_d[None, :]
    b_k = tl.load(p_k, mask=m_td & is_content(o_d, D)[None, :], other=0.0).to(tl.float32)
    b_v = tl.load(p_v, mask=m_td, other=0.0).to(tl.float32)
    for i_r in range(R):
        i_n = i_g * R + i_r
        o_q = i_b * s_qb + i_n * s_qn + o_t[:, None] * s_qt + o_d[None, :]
        b_q = tl.load(p_q + o_q, mask=m_td, other=0.0).to(tl.float32)
        # [I]
        b_s = tl.sum(b_q * b_k, axis=1) * scale
        b_out, b_lse = b_v, b_s
        b_own = tl.full([I], 1.0, tl.float32)
        if PAST:
            m_past = m_t & (o_t > 0)
            o_l = i_b * s_lb + i_n * s_ln + (o_t - 1) * s_lt
            b_past_lse = tl.load(p_past_lse + o_l, mask=m_past, other=float("-inf"))
            o_p = i_b * s_pb + i_n * s_pn + (o_t - 1)[:, None] * s_pt + o_d[None, :]
            b_past = tl.load(p_past + o_p, mask=m_td & m_past[:, None], other=0.0)
            b_max = tl.maximum(b_s, b_past_lse)
            b_lse = b_max + tl.log(tl.exp(b_s - b_max) + tl.exp(b_past_lse - b_max))
            b_own = tl.exp(b_s - b_lse)
            b_out = b_past.to(tl.float32) * tl.exp(b_past_lse - b_lse)[:, None]
            b_out += b_v * b_own[:, None]
        o_o = i_b * s_ob + i_n * s_on + o_t[:, None] * s_ot + o_d[None, :]
        tl.store(p_out + o_o, b_out.to(p_out.dtype.element_ty), mask=m_td)
        o_bnt = (i_b * num_groups * R + i_n) * T + o_t
        tl.store(p_lse + o_bnt, b_lse, mask=m_t)
        tl.store(p_own + o_bnt, b_own, mask=m_t)


@triton.jit
def add_gradients_kernel(
    p_g, p_q, p_k, p_v, p_out, p_own, p_pq, p_pk, p_pv, p_dq, p_dk, p_dv,
    T, scale,
    s_gb, s_gn, s_gt, s_qb, s_qn, s_qt, s_kb, s_kg, s_kt, s_vb, s_vg, s_vt, s_ob, s_on, s_ot,
    s_pqb, s_pqn, s_pqt, s_pkb, s_pkg, s_pkt, s_pvb, s_pvg, s_pvt,
    s_dqb, s_dqn, s_dqt, s_dkb, s_dkg, s_dkt, s_dvb, s_dvg, s_dvt,
    R, D: tl.constexpr, I: tl.constexpr, F: tl.constexpr, PAST: tl.constexpr,
):  # fmt: skip
    """A tile of tokens of one key/value head, and all of its query heads."""
    i_t, i_g, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    num_groups = tl.num_programs(1)
    o_t = (i_t * I + tl.arange(0, I)).to(tl.int64)
    o_d = tl.arange(0, F)
    m_t = o_t < T
    m_td = m_t[:, None] & (o_d < D)[None, :]
    m_counts = m_td & is_content(o_d, D)[None, :]
    # [I, F]
    p_k += i_b * s_kb + i_g * s_kg + o_t[:, None] * s_kt + o_d[None, :]
    p_v += i_b * s_vb + i_g * s_vg + o_t[:, None] * s_vt + o_d[None, :]
    b_k = tl.load(p_k, mask=m_counts, other=0.0).to(tl.float32)
    b_v = tl.load(p_v, mask=m_td, other=0.0).to(tl.float32)
    b_dk = tl.zeros([I, F], tl.float32)
    b_dv = tl.zeros([I, F], tl.float32)
    if PAST:
        m_next = (o_t < T - 1)[:, None]
        o_p = i_b * s_pkb + i_g * s_pkg + o_t[:, None] * s_pkt + o_d[None, :]
        b_dk += tl.load(p_pk + o_p, mask=m_counts & m_next, other=0.0).to(tl.float32)
        o_p = i_b * s_pvb + i_g * s_pvg + o_t[:, None] * s_pvt + o_d[None, :]
        b_dv += tl.load(p_pv + o_p, mask=m_td & m_next, other=0.0).to(tl.float32)
    for i_r in range(R):
        i_n = i_g * R + i_r
        o_g = i_b * s_gb + i_n * s_gn + o_t[:, None] * s_gt + o_d[None, :]
        o_q = i_b * s_qb + i_n * s_qn + o_t[:, None] * s_qt + o_d[None, :]
        o_o = i_b * s_ob + i_n * s_on + o_t[:, None] * s_ot + o_d[None, :]
        b_g = tl.load(p_g + o_g, mask=m_td, other=0.0).to(tl.float32)
        b_q = tl.load(p_q + o_q, mask=m_counts, other=0.0).to(tl.float32)
        b_o = tl.load(p_out + o_o, mask=m_td, other=0.0).to(tl.float32)
        # [I]
        o_bnt = (i_b * num_groups * R + i_n) * T + o_t
        b_own = tl.load(p_own + o_bnt, mask=m_t, other=0.0)
        b_ds = b_own * tl.sum(b_g * (b_v - b_o), axis=1) * scale
        # [I, F]
        b_dq = b_ds[:, None] * b_k
        if PAST:
            o_p = i_b * s_pqb + i_n * s_pqn + (o_t - 1)[:, None] * s_pqt + o_d[None, :]
            m_past = m_counts & (o_t > 0)[:, None]
            b_dq += tl.load(p_pq + o_p, mask=m_past, other=0.0).to(tl.float32)
        o_d_ = i_b * s_dqb + i_n * s_dqn + o_t[:, None] * s_dqt + o_d[None, :]
        tl.store(p_dq + o_d_, b_dq.to(p_dq.dtype.element_ty), mask=m_td)
        b_dk += b_ds[:, None] * b_q
        b_dv += b_own[:, None] * b_g
    o_d_ = i_b * s_dkb + i_g * s_dkg + o_t[:, None] * s_dkt + o_d[None, :]
    tl.store(p_dk + o_d_, b_dk.to(p_dk.dtype.element_ty), mask=m_td)
    o_d_ = i_b * s_dvb + i_g * s_dvg + o_t[:, None] * s_dvt + o_d[None, :]
    tl.store(p_dv + o_d_, b_dv.to(p_dv.dtype.element_ty), mask=m_td)


def refusal(q_BNTD: Tensor) -> str:
    """See `ops.backends`."""
    if not (q_BNTD.is_cuda or INTERPRETED):
        return "only tensors on a GPU"
    return gpu_refusal(q_BNTD, (torch.float32, torch.bfloat16, torch.float16))


def _empty_tokens_first(x_BHTD: Tensor) -> Tensor:
    """Like `x`, but tokens lead in memory: what the projection behind attention wants."""
    batch, heads, tokens, dim = x_BHTD.shape
    return x_BHTD.new_empty(tokens, batch, heads, dim).permute(1, 2, 0, 3)


def _launch(kernel, tensors, strided, q: Tensor, k: Tensor, *, past: bool, scale: float) -> None:
    batch, heads, tokens, dim = q.shape
    channels = max(16, triton.next_power_of_2(dim))
    tile = max(1, 4096 // channels)  # 16 values of a tensor for each of 256 threads
    strides = [s for x in strided for s in x.stride()[:3]]
    with on_device(q):
        kernel[triton.cdiv(tokens, tile), k.shape[1], batch](
            *tensors, tokens, scale, *strides, heads // k.shape[1], D=dim, I=tile, F=channels,
            PAST=past, num_warps=8,
        )  # fmt: skip


def join(q_BNTD, k_BGTD, v_BGTD, past_out_BNTD, past_lse_BNT, scale):
    """As `megatron_dmc.ops.training.diagonal.join`."""
    q, k, v = dense_channels(q_BNTD), dense_channels(k_BGTD), dense_channels(v_BGTD)
    past = past_out_BNTD is not None
    past_out = dense_channels(past_out_BNTD) if past else q
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    p_own = torch.empty_like(lse)
    past_lse = past_lse_BNT.float() if past else lse
    out = _empty_tokens_first(q)
    _launch(
        join_kernel, (q, k, v, past_out, past_lse, out, lse, p_own),
        (q, k, v, past_out, past_lse, out), q, k, past=past, scale=scale,
    )  # fmt: skip
    return out, lse, p_own


def add_gradients(grad_out_BNTD, q_BNTD, k_BGTD, v_BGTD, out_BNTD, p_own_BNT, past_grads, scale):
    """As `megatron_dmc.ops.training.diagonal.add_gradients`."""
    inputs = [dense_channels(x) for x in (grad_out_BNTD, q_BNTD, k_BGTD, v_BGTD, out_BNTD)]
    q, k, v = inputs[1:4]
    past = [dense_channels(x) for x in past_grads] if past_grads is not None else [q, k, v]
    grads = [_empty_tokens_first(x) for x in (q, k, v)]
    _launch(
        add_gradients_kernel, (*inputs, p_own_BNT.contiguous(), *past, *grads),
        (*inputs, *past, *grads), q, k, past=past_grads is not None, scale=scale,
    )  # fmt: skip
    return tuple(grads)
