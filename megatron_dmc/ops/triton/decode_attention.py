"""Decode attention over pages and per-head lengths as Triton kernels. docs/method.md, section 6.

Local letters: X = B x G heads.

All heads' work forms one line, head after head: a head with entries is HEAD_COST units and then one unit
for each of its tiles. A plan is that line: `plan_Y` (Y = X + 1), the number of units before each head. Every
worker takes an equal stretch of the line, so the work is balanced by true length, the grid does not depend
on the lengths, and the host never sees them. A head whose tiles lie inside one stretch is written at once; of
others each worker leaves a part, and a second kernel joins the parts by their log-sum-exp. A worker has at
most two such heads: that of its first and of its last tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dmc.ops.paged.layer_cache import LayerCache
from megatron_dmc.ops.tensors import dense_channels
from megatron_dmc.ops.triton.launch import INTERPRETED, on_device
from megatron_dmc.ops.triton.stored import decode, parts

TILE = 32
"""Entries of a tile: what the plan counts."""
HEAD_COST = tl.constexpr(1)
"""Units of a change of heads, in tiles."""
WORKERS_PER_MULTIPROCESSOR = 8


@triton.jit
def plan_kernel(
    p_entries, p_rows, p_plan, X, G, ahead,
    s_el, s_er, s_eg,
    I: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The plan of one layer."""
    i_l = tl.program_id(0).to(tl.int64)
    p_entries += i_l * s_el
    p_plan += i_l * (X + 1)
    o_x = tl.arange(0, BLOCK)
    before = 0
    tl.store(p_plan, 0)
    for i_x in range(0, X, BLOCK):
        m_x = i_x + o_x < X
        # [BLOCK]
        b_row = tl.load(p_rows + (i_x + o_x) // G, mask=m_x, other=-1)
        m_row = m_x & (b_row >= 0)
        o_e = b_row * s_er + (i_x + o_x) % G * s_eg
        b_entries = tl.load(p_entries + o_e, mask=m_row, other=0)
        b_tiles = tl.where(m_row, (b_entries + ahead + I - 1) // I, 0).to(tl.int32)
        b_units = tl.where(b_tiles > 0, b_tiles + HEAD_COST, 0)
        tl.store(p_plan + 1 + i_x + o_x, before + tl.cumsum(b_units, axis=0), mask=m_x)
        before += tl.sum(b_units, axis=0)


@triton.jit
def _first_unit(i_c, num_units, num_workers):
    """The first unit of worker i_c; the first `num_units % num_workers` workers have one more."""
    num_workers = tl.maximum(num_workers, 1)
    return i_c * (num_units // num_workers) + tl.minimum(i_c, num_units % num_workers)


@triton.jit
def _worker_of_unit(i_u, num_units, num_workers):
    """The inverse."""
    num_workers = tl.maximum(num_workers, 1)
    own = tl.maximum(num_units // num_workers, 1)
    longer = num_units % num_workers
    in_shorter = tl.maximum(i_u - longer * (own + 1), 0)
    return tl.where(i_u < longer * (own + 1), i_u // (own + 1), longer + in_shorter // own)


@triton.jit
def _head_of_unit(p_plan, X, i_u, BLOCK: tl.constexpr):
    """The head to which a unit belongs: the last one with `plan[x] <= i_u`."""
    o_x = tl.arange(0, BLOCK)
    step = tl.cdiv(X, BLOCK)
    b_before = tl.load(p_plan + o_x * step, mask=o_x * step < X, other=2147483647)
    i_x = (tl.sum((b_before <= i_u).to(tl.int32), axis=0) - 1) * step
    count = 0
    for i in range(0, step, BLOCK):
        m_x = (i + o_x < step) & (i_x + i + o_x < X)
        b_before = tl.load(p_plan + i_x + i + o_x, mask=m_x, other=2147483647)
        count += tl.sum((b_before <= i_u).to(tl.int32), axis=0)
    return i_x + count - 1


@triton.jit
def attend_kernel(
    p_q, p_k_pages, p_v_pages, p_k_scales, p_v_scales, p_table, p_entries, p_rows, p_plan, p_out,
    p_part, p_part_lse, X, G, scale,
    s_qb, s_qn, s_tr, s_tg, s_er, s_eg, s_ob, s_on,
    R: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, F: tl.constexpr, S: tl.constexpr,
    I: tl.constexpr, BLOCK: tl.constexpr, INTERPRET: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    """One worker. Scores are kept in base 2: `scale` contains log2(e). Entries of 8 bits are widened
    to the queries' dtype, which is exact; their scales multiply scores and weights."""
    i_c, num_units = tl.program_id(0), tl.load(p_plan + X)
    num_workers = tl.minimum(tl.num_programs(0), num_units)
    begin = tl.minimum(_first_unit(i_c, num_units, num_workers), num_units)
    end = tl.minimum(_first_unit(i_c + 1, num_units, num_workers), num_units)
    o_i, o_d, o_r = tl.arange(0, I), tl.arange(0, F), tl.arange(0, Q)
    m_d = o_d < D
    m_rd = (o_r < R)[:, None] & m_d[None, :]
    i_x = _head_of_unit(p_plan, X, begin, BLOCK)
    i_u = begin
    while i_u < end:
        first, last = tl.load(p_plan + i_x) + HEAD_COST, tl.load(p_plan + i_x + 1)
        i_tile, stop = tl.maximum(i_u, first), tl.minimum(last, end)
        i_b, i_g = (i_x // G).to(tl.int64), i_x % G
        i_row = tl.load(p_rows + i_b)
        if stop > i_tile:
            num_entries = tl.load(p_entries + i_row * s_er + i_g * s_eg)
            p_row = p_table + i_row * s_tr + i_g * s_tg
            # [Q, F]
            o_q = i_b * s_qb + (i_g * R + o_r)[:, None] * s_qn + o_d[None, :]
            b_q = tl.load(p_q + o_q, mask=m_rd, other=0.0)
            b_out = tl.zeros([Q, F], tl.float32)
            # [Q]
            b_max = tl.full([Q], float("-inf"), tl.float32)
            b_sum = tl.zeros([Q], tl.float32)
            for i_t in range(i_tile - first, stop - first):
                # [I]
                o_e = i_t * I + o_i
                m_e = o_e < num_entries
                b_page = tl.load(p_row + o_e // S, mask=m_e, other=0).to(tl.int64)
                # [I, F]
                o_slot = b_page * S + o_e % S
                o_kv = o_slot[:, None] * D + o_d[None, :]
                m_kv = m_e[:, None] & m_d[None, :]
                b_k = tl.load(p_k_pages + o_kv, mask=m_kv, other=0)
                b_v = tl.load(p_v_pages + o_kv, mask=m_kv, other=0)
                if STORED > 0:
                    b_k = decode(b_k, STORED).to(b_q.dtype)
                    b_v = decode(b_v, STORED).to(b_q.dtype)
                # [Q, I]
                if Q == 1:
                    b_s = tl.sum(b_q.to(tl.float32) * b_k.to(tl.float32), axis=1)[None, :]
                elif INTERPRET:
                    b_s = tl.dot(b_q.to(tl.float32), tl.trans(b_k.to(tl.float32)))
                else:
                    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="tf32x3")
                if STORED > 0:
                    b_s *= tl.load(p_k_scales + o_slot, mask=m_e, other=0.0)[None, :]
                b_s = tl.where(m_e[None, :], b_s * scale, float("-inf"))
                # [Q]; a tile of a plan made ahead may lie behind the last entry
                b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
                b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
                b_p = tl.exp2(b_s - b_base[:, None])
                b_decay = tl.exp2(b_max - b_base)
                b_sum = b_sum * b_decay + tl.sum(b_p, axis=1)
                b_out = b_out * b_decay[:, None]
                if STORED > 0:
                    b_p *= tl.load(p_v_scales + o_slot, mask=m_e, other=0.0)[None, :]
                if Q == 1:
                    b_pv = tl.sum(tl.trans(b_p) * b_v.to(tl.float32), axis=0)[None, :]
                elif INTERPRET:
                    b_pv = tl.dot(b_p, b_v.to(tl.float32))
                else:
                    b_pv = tl.dot(b_p.to(b_v.dtype), b_v, input_precision="tf32x3")
                b_out += b_pv
                b_max = b_new
            b_out = b_out / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
            if (first >= begin) & (last <= end):
                o_out = i_b * s_ob + (i_g * R + o_r)[:, None] * s_on + o_d[None, :]
                tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_rd)
            else:
                # a worker's first head leaves part 0, another one part 1
                i_part = i_c * 2 + tl.where(i_tile > begin, 1, 0)
                o_part = (i_part * R + o_r)[:, None] * D + o_d[None, :]
                tl.store(p_part + o_part, b_out, mask=m_rd)
                tl.store(p_part_lse + i_part * R + o_r, b_max + tl.log2(b_sum), mask=o_r < R)
        i_u = stop
        i_x += 1


@triton.jit
def join_kernel(
    p_plan, p_part, p_part_lse, p_out, X, G, C, s_ob, s_on,
    R: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
):  # fmt: skip
    """Join the parts of one head, or write zeros for a head without tiles."""
    i_x = tl.program_id(0)
    i_b, i_g = (i_x // G).to(tl.int64), i_x % G
    num_units = tl.load(p_plan + X)
    num_workers = tl.minimum(C, num_units)
    first, last = tl.load(p_plan + i_x) + HEAD_COST, tl.load(p_plan + i_x + 1)
    o_d, o_r = tl.arange(0, F), tl.arange(0, Q)
    m_rd = (o_r < R)[:, None] & (o_d < D)[None, :]
    i_begin = _worker_of_unit(first, num_units, num_workers)
    i_end = _worker_of_unit(last - 1, num_units, num_workers)
    if (last < first) | (i_end > i_begin):
        # [Q]
        b_max = tl.full([Q], float("-inf"), tl.float32)
        b_sum = tl.zeros([Q], tl.float32)
        # [Q, F]
        b_out = tl.zeros([Q, F], tl.float32)
        for i_c in range(i_begin, tl.where(last < first, i_begin, i_end + 1)):
            m_first = first <= _first_unit(i_c, num_units, num_workers)
            i_part = i_c * 2 + tl.where(m_first, 0, 1)
            o_part = (i_part * R + o_r)[:, None] * D + o_d[None, :]
            b_part = tl.load(p_part + o_part, mask=m_rd, other=0.0)
            b_lse = tl.load(p_part_lse + i_part * R + o_r, mask=o_r < R, other=float("-inf"))
            b_new = tl.maximum(b_max, b_lse)
            b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
            b_decay, b_weight = tl.exp2(b_max - b_base), tl.exp2(b_lse - b_base)
            b_out = b_out * b_decay[:, None] + b_part * b_weight[:, None]
            b_sum = b_sum * b_decay + b_weight
            b_max = b_new
        b_out = b_out / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
        o_out = i_b * s_ob + (i_g * R + o_r)[:, None] * s_on + o_d[None, :]
        tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_rd)


def _multiprocessors(x: Tensor) -> int:
    if not x.is_cuda:
        return 1  # the interpreter
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def plan(num_entries_LRG: Tensor, rows_B: Tensor, *, ahead: int = 0) -> Tensor:
    """As `megatron_dmc.ops.paged.decode.plan_decode_attention`: plan_LY, int32."""
    num_layers, _, num_kv_heads = num_entries_LRG.shape
    heads = rows_B.shape[0] * num_kv_heads
    out = torch.empty(num_layers, heads + 1, dtype=torch.int32, device=rows_B.device)
    with on_device(out):
        plan_kernel[(num_layers,)](
            num_entries_LRG, rows_B, out, heads, num_kv_heads, ahead, *num_entries_LRG.stride(),
            I=TILE, BLOCK=1024, num_warps=8,
        )  # fmt: skip
    return out


def paged_decode_attention(
    cache: LayerCache,
    rows_B: Tensor,
    q_BND: Tensor,
    plan_Y: Tensor | None,
    *,
    softmax_scale: float,
    num_workers: int | None = None,
) -> Tensor:
    """As `megatron_dmc.ops.paged.decode.paged_decode_attention`.

    Args:
        num_workers: default: `WORKERS_PER_MULTIPROCESSOR` for each multiprocessor.
    """
    k_pages, k_scales, stored = parts(cache.k_pages_PSD)
    v_pages, v_scales, _ = parts(cache.v_pages_PSD)
    table, entries, num_kv_heads = cache.block_table_RGM, cache.num_entries_RG, cache.num_kv_heads
    q = dense_channels(q_BND)
    batch, num_heads, dim = q.shape
    group, heads = num_heads // num_kv_heads, batch * num_kv_heads
    if plan_Y is None:
        plan_Y = plan(entries[None], rows_B)[0]
    if num_workers is None:
        num_workers = WORKERS_PER_MULTIPROCESSOR * _multiprocessors(q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    part = torch.empty(num_workers, 2, group, dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(num_workers, 2, group, dtype=torch.float32, device=q.device)
    queries = 1 if group == 1 else max(16, triton.next_power_of_2(group))
    sizes = dict(R=group, D=dim, F=max(16, triton.next_power_of_2(dim)))
    if batch:
        with on_device(q):
            attend_kernel[(num_workers,)](
                q, k_pages, v_pages, k_scales, v_scales, table, entries, rows_B, plan_Y,
                out, part, part_lse, heads, num_kv_heads, softmax_scale * 1.4426950408889634,
                *q.stride()[:2], *table.stride()[:2], *entries.stride(),
                *out.stride()[:2], Q=queries, S=cache.page_size, I=TILE, BLOCK=128,
                INTERPRET=INTERPRETED, STORED=stored, num_warps=4, **sizes,
            )  # fmt: skip
            join_kernel[(heads,)](
                plan_Y, part, part_lse, out, heads, num_kv_heads, num_workers, *out.stride()[:2],
                Q=triton.next_power_of_2(group), num_warps=4, **sizes,
            )  # fmt: skip
    return out
