"""Prefill's attention over pages as a Triton kernel. docs/method.md, section 6.

Local letters: X tiles of tokens, HALF half of the rotary channels.

A program is one tile of tokens of a chunk and one key/value head. Its keys are the head's entries, old
and new, in their pages. A token whose segment is entry e sees the entries below e, and its own state,
with which the softmax starts. e does not fall from token to token: blocks of entries below
that of the tile's first token need no mask, and those from that of its last token on are not visited. In a
plain cache the token's own entry is its state, so it sees the entries up to e.

With a delay W the state and the entries that a token sees are those of the token W before it, and the
near tokens, itself and the W - 1 before it, lie raw in a tensor; its first tokens see nothing else. Where tokens
are evicted there are no states: a token sees the entries that the tokens up to W before it have become.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dmc.ops.paged.chunks import Chunks
from megatron_dmc.ops.paged.decode import Angles
from megatron_dmc.ops.paged.layer_cache import LayerCache
from megatron_dmc.ops.paged.prefill import ChunkStates, Near
from megatron_dmc.ops.tensors import dense_channels
from megatron_dmc.ops.triton.launch import INTERPRETED, capability, is_content, on_device


@triton.jit
def _scores(b_q, b_k, scale, INTERPRET: tl.constexpr):
    """[Q, I] float32."""
    if INTERPRET:
        return tl.dot(b_q.to(tl.float32), tl.trans(b_k.to(tl.float32))) * scale
    else:
        return tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3") * scale


@triton.jit
def _add(b_s, b_v, b_max, b_base, b_sum, b_out, INTERPRET: tl.constexpr):
    """The softmax's sum and output with a block more: relative to b_max before, to b_base after."""
    b_p = tl.exp2(b_s - b_base[:, None])
    b_decay = tl.exp2(b_max - b_base)
    b_sum = b_sum * b_decay + tl.sum(b_p, axis=1)
    b_out = b_out * b_decay[:, None]
    if INTERPRET:
        b_out += tl.dot(b_p, b_v.to(tl.float32))
    else:
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision="tf32x3")
    return b_sum, b_out


@triton.jit
def _attend(
    b_q, b_max, b_sum, b_out, p_k_pages, p_v_pages, p_row, first, high, b_bound, scale,
    o_i, o_d, S: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One block of entries, from `first` on."""
    m_d = (o_d < D)[None, :]
    # [I]
    o_e = first + o_i
    if MASKED:
        m_e = o_e < high
        b_page = tl.load(p_row + o_e // S, mask=m_e, other=0).to(tl.int64)
        m_kv = m_e[:, None] & m_d
    else:
        b_page = tl.load(p_row + o_e // S).to(tl.int64)
        m_kv = m_d
    # [I, F]
    o_kv = (b_page * S + o_e % S)[:, None] * D + o_d[None, :]
    b_k = tl.load(p_k_pages + o_kv, mask=m_kv, other=0.0)
    b_v = tl.load(p_v_pages + o_kv, mask=m_kv, other=0.0)
    b_s = _scores(b_q, b_k, scale, INTERPRET)
    if MASKED:
        b_s = tl.where(o_e[None, :] < b_bound[:, None], b_s, float("-inf"))
    # [Q]; finite: every query has seen a key before, or sees entry 0 now
    b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
    b_sum, b_out = _add(b_s, b_v, b_max, b_new, b_sum, b_out, INTERPRET)
    return b_new, b_sum, b_out


@triton.jit
def _attend_near(
    b_q, b_max, b_sum, b_out, p_near_k, p_near_v, i_first, end, lead, b_t, scale, s_near,
    o_i, o_d, D: tl.constexpr, DELAY: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One block of raw tokens; of a chunk's, token t is DELAY + t, behind what its ring held."""
    # [I]
    o_e = i_first + o_i
    m_kv = ((o_e < end) & (o_e >= lead))[:, None] & (o_d < D)[None, :]
    # [I, F]
    o_kv = o_e.to(tl.int64)[:, None] * s_near + o_d[None, :]
    b_k = tl.load(p_near_k + o_kv, mask=m_kv, other=0.0)
    b_v = tl.load(p_near_v + o_kv, mask=m_kv, other=0.0)
    b_s = _scores(b_q, b_k, scale, INTERPRET)
    b_age = b_t[:, None] + DELAY - o_e[None, :]
    b_s = tl.where((b_age >= 0) & (b_age < DELAY) & (o_e >= lead)[None, :], b_s, float("-inf"))
    # [Q]
    b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
    b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
    b_sum, b_out = _add(b_s, b_v, b_max, b_base, b_sum, b_out, INTERPRET)
    return b_new, b_sum, b_out


@triton.jit
def attend_kernel(
    p_q, p_cos, p_sin, p_own_k, p_own_v, p_entry, p_k_pages, p_v_pages, p_table, p_chunks,
    p_tiles, p_near_k, p_near_v, p_far, p_out,
    G, scale,
    s_qt, s_qn, s_ct, s_nt, s_tr, s_tg, s_ot, s_on,
    R: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, F: tl.constexpr, S: tl.constexpr,
    I: tl.constexpr, HALF: tl.constexpr, COMPRESS: tl.constexpr, OWN: tl.constexpr, STAGES: tl.constexpr,
    DELAY: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """One tile and one head. Scores are kept in base 2: `scale` contains log2(e). OWN: tokens have states."""
    TOKENS: tl.constexpr = Q // R
    NONE: tl.constexpr = DELAY if OWN else DELAY - 1
    i_g = tl.program_id(0) % G
    i_x = tl.program_id(0).to(tl.int64) // G
    i_chunk, first = tl.load(p_tiles + 2 * i_x), tl.load(p_tiles + 2 * i_x + 1)
    row = tl.load(p_chunks + 3 * i_chunk).to(tl.int64)
    start = tl.load(p_chunks + 3 * i_chunk + 1).to(tl.int64)
    num_tokens = tl.load(p_chunks + 3 * i_chunk + 2)
    o_q, o_d, o_i = tl.arange(0, Q), tl.arange(0, F), tl.arange(0, I)
    m_d = o_d < D
    # [Q]
    o_t = first + o_q // R
    m_q = (o_q // R < TOKENS) & (o_t < num_tokens)
    o_t = start + o_t.to(tl.int64)
    o_n = i_g * R + o_q % R
    m_qd = m_q[:, None] & m_d[None, :]
    last = tl.minimum(first + TOKENS, num_tokens) - 1
    # the state of token t is that of row o_s; with a delay the first `lead` tokens have none
    o_s, m_s, lead = o_t, m_q, 0
    if DELAY > 0:
        lead = tl.load(p_far + 2 * i_chunk)
        o_s = tl.load(p_far + 2 * i_chunk + 1) + o_t - start - lead
        m_s = m_q & (o_t - start >= lead)
        shift = tl.load(p_far + 2 * i_chunk + 1) - lead
        low = tl.load(p_entry + (shift + first) * G + i_g, mask=first >= lead, other=NONE)
        high = tl.load(p_entry + (shift + last) * G + i_g, mask=last >= lead, other=NONE)
        b_bound = tl.load(p_entry + o_s * G + i_g, mask=m_s, other=NONE)
    else:
        low = tl.load(p_entry + (start + first) * G + i_g)
        high = tl.load(p_entry + (start + last) * G + i_g)
        b_bound = tl.load(p_entry + o_t * G + i_g, mask=m_q, other=0)
    if not OWN:
        low, high, b_bound = low + 1, high + 1, b_bound + 1

    # [Q, F]: rotated queries, in their own dtype as the products want them
    p_q += o_t[:, None] * s_qt + o_n[:, None] * s_qn
    m_content = m_qd
    if COMPRESS:
        m_content = m_q[:, None] & is_content(o_d, D)[None, :]
    b_q = tl.load(p_q + o_d[None, :], mask=m_content, other=0.0)
    if HALF > 0:
        o_pair = tl.where(o_d < HALF, o_d + HALF, tl.where(o_d < 2 * HALF, o_d - HALF, o_d))
        m_pair = m_q[:, None] & (o_d < 2 * HALF)[None, :]
        p_cos += o_t[:, None] * s_ct + o_d[None, :]
        p_sin += o_t[:, None] * s_nt + o_d[None, :]
        b_cos = tl.load(p_cos, mask=m_pair, other=1.0).to(tl.float32)
        b_sin = tl.load(p_sin, mask=m_pair, other=0.0).to(tl.float32)
        if COMPRESS:
            m_pair = m_pair & is_content(o_pair, D)[None, :]
        b_pair = tl.load(p_q + o_pair[None, :], mask=m_pair, other=0.0).to(tl.float32)
        b_turned = tl.where(o_d < HALF, -1.0, 1.0)[None, :] * b_pair * b_sin
        b_turned = b_q.to(tl.float32) * b_cos + b_turned
        if COMPRESS:
            b_turned = tl.where(is_content(o_d, D)[None, :], b_turned, 0.0)
        b_q = b_turned.to(b_q.dtype)

    if OWN:
        o_own = (o_s * G + i_g)[:, None] * D + o_d[None, :]
        m_sd = m_s[:, None] & m_d[None, :]
        b_own = tl.load(p_own_k + o_own, mask=m_sd, other=0.0).to(tl.float32)
        # [Q]
        b_max = tl.sum(b_q.to(tl.float32) * b_own, axis=1) * scale
        b_sum = tl.full([Q], 1.0, tl.float32)
        b_out = tl.load(p_own_v + o_own, mask=m_sd, other=0.0).to(tl.float32)
        if DELAY > 0:
            b_max = tl.where(m_s, b_max, float("-inf"))
            b_sum = tl.where(m_s, b_sum, 0.0)
    else:
        b_max = tl.full([Q], float("-inf"), tl.float32)
        b_sum = tl.zeros([Q], tl.float32)
        b_out = tl.zeros([Q, F], tl.float32)
    if DELAY > 0:
        i_near = (start + i_chunk.to(tl.int64) * DELAY) * G + i_g
        b_t = (o_t - start).to(tl.int32)
        end = last + 1 + DELAY
        for i_e in tl.range(tl.maximum(first + 1, lead), end, I, num_stages=1):
            b_max, b_sum, b_out = _attend_near(
                b_q, b_max, b_sum, b_out, p_near_k + i_near * D, p_near_v + i_near * D, i_e,
                end, lead, b_t, scale, G * D, o_i, o_d, D, DELAY, INTERPRET,
            )  # fmt: skip
        # padding, too, has seen something
        b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
    elif not OWN:
        b_bound = tl.maximum(b_bound, 1)  # padding, too, sees something

    p_row = p_table + row * s_tr + i_g * s_tg
    seen_by_all = DELAY + (low - DELAY) // I * I
    for i_e in tl.range(DELAY, seen_by_all, I, num_stages=STAGES):
        b_max, b_sum, b_out = _attend(
            b_q, b_max, b_sum, b_out, p_k_pages, p_v_pages, p_row, i_e, high, b_bound, scale,
            o_i, o_d, S, D, False, INTERPRET,
        )  # fmt: skip
    for i_e in tl.range(seen_by_all, high, I, num_stages=1):
        b_max, b_sum, b_out = _attend(
            b_q, b_max, b_sum, b_out, p_k_pages, p_v_pages, p_row, i_e, high, b_bound, scale,
            o_i, o_d, S, D, True, INTERPRET,
        )  # fmt: skip
    b_out = b_out / b_sum[:, None]
    p_out += o_t[:, None] * s_ot + o_n[:, None] * s_on + o_d[None, :]
    tl.store(p_out, b_out.to(p_out.dtype.element_ty), mask=m_qd)


def blocks_of(
    head_dim: int, group: int, itemsize: int, capability: int = 9, delay: int = 0
) -> tuple[int, int, int, int]:
    """Queries and entries of a block, warps and stages of the pipeline, chosen by the compiler's registers
    and spills (docs/kernels.md).

    Args:
        capability: major compute capability of the GPU.
        delay: of the cache; its near part takes registers.
    """
    if INTERPRETED:
        return max(16, triton.next_power_of_2(group)), 32, 4, 1
    if itemsize > 2:
        return 64, 32, 8, 1
    if head_dim > 128:
        return (64 if capability >= 9 and not delay else 32), 64, 8, 3
    return 128, (64 if capability >= 9 or head_dim <= 64 else 32), 8, 3


def attend_chunks(
    cache: LayerCache,
    chunks: Chunks,
    q_TND: Tensor,
    states: ChunkStates,
    angles_TF: Angles,
    *,
    softmax_scale: float,
    near: Near | None = None,
) -> Tensor:
    """Attention of all chunks' tokens; what the chunks write is in the pages already.

    Args:
        q_TND: unrotated queries.
        states: what `write_chunks` returns.
        angles_TF: of the tokens.
        near: with a delay; `states` are those of the tokens that leave the rings.

    Returns:
        out_TND.
    """
    q = dense_channels(q_TND)
    num_heads, dim = q.shape[1:]
    own_k_TGD, own_v_TGD, entry_TG = states
    num_kv_heads, has_own = cache.num_kv_heads, own_k_TGD is not None
    group = num_heads // num_kv_heads
    queries, entries, num_warps, num_stages = blocks_of(
        dim, group, q.element_size(), capability(q), cache.delay
    )
    tiles = chunks.tiles(queries // group, latest_first=True)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    cos, sin, own_k, own_v = (q if x is None else x for x in (*angles_TF, own_k_TGD, own_v_TGD))
    near_k, near_v, far = (q, q, q) if near is None else near
    half, table = 0 if angles_TF[0] is None else cos.shape[1] // 2, cache.block_table_RGM
    with on_device(q):
        attend_kernel[(tiles.table_X2.shape[0] * num_kv_heads,)](
            q, cos, sin, own_k, own_v, entry_TG, cache.k_pages_PSD, cache.v_pages_PSD, table,
            chunks.table_B3, tiles.table_X2, near_k, near_v, far, out, num_kv_heads, softmax_scale * 1.4426950408889634,
            *q.stride()[:2], cos.stride(0), sin.stride(0), *table.stride()[:2],
            *out.stride()[:2], R=group, Q=queries, D=dim, F=max(16, triton.next_power_of_2(dim)),
            S=cache.page_size, I=entries, HALF=half,
            COMPRESS=has_own or cache.evicts, OWN=has_own, STAGES=num_stages, DELAY=cache.delay,
            INTERPRET=INTERPRETED, num_warps=num_warps,
        )  # fmt: skip
    return out
