"""Top-k, top-p and min-p as one Triton kernel without sorting; `ops.truncate.truncate` has the contract.

What stays of a row is given by a score that all of it reaches: for top-k the largest t with at least k scores of t or
more, for top-p the largest t below which no more than 1 - top_p of the mass lies. Both are found digit by digit in
the float's bits, in an order that is the floats': a pass over the row compares with `PIVOTS` values of the next digit.

Dimension letters: B rows that are cut, V vocabulary, P pivots.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dmc.ops.triton.launch import INTERPRETED, on_device

BITS = 3
"""Of a digit; a float32 has 11 of them."""
PIVOTS = 1 << BITS
BLOCK = 2048
"""Scores that are compared with all pivots at a time."""
NUM_WARPS = 16


@triton.jit
def _keys(b_x):
    """Integers in the order of the floats, from 0: int64. Both zeros are one."""
    b_bits = (b_x + 0.0).to(tl.int32, bitcast=True)
    b_key = b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)
    return b_key.to(tl.int64) + 2147483648


@triton.jit
def _search(
    p_row, V, most, least, limit, COUNTS: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest key that at least `limit` scores reach; or, without COUNTS, below which the scores from `least`
    on have at most the mass `limit`. Sums are added up at the end of a row, not with every block."""
    o_v, o_p = tl.arange(0, BLOCK), tl.arange(0, 1 << BITS)
    NUM_DIGITS: tl.constexpr = (32 + BITS - 1) // BITS
    found = least * 0
    for i_d in range(NUM_DIGITS):
        shift = (NUM_DIGITS - 1 - i_d) * BITS
        b_pivot = found + (o_p.to(tl.int64) << shift)
        if COUNTS:
            b_sum = tl.zeros([BLOCK, 1 << BITS], tl.int32)
        else:
            b_sum = tl.zeros([BLOCK, 1 << BITS], tl.float64)
        for i_v in range(0, V, BLOCK):
            m_v = i_v + o_v < V
            b_x = tl.load(p_row + i_v + o_v, mask=m_v, other=float("-inf"))
            b_key = _keys(b_x)
            if COUNTS:
                b_sum += (m_v[:, None] & (b_key[:, None] >= b_pivot[None, :])).to(tl.int32)
            else:
                b_mass = tl.where(m_v & (b_key >= least), tl.exp(b_x - most), 0.0)
                b_is_below = b_key[:, None] < b_pivot[None, :]
                b_sum += tl.where(b_is_below, b_mass[:, None], 0.0).to(tl.float64)
        b_sums = tl.sum(b_sum, axis=0)
        if COUNTS:
            digit = tl.max(tl.where(b_sums >= limit, o_p, 0), axis=0)
        else:
            digit = tl.max(tl.where(b_sums <= limit, o_p, 0), axis=0)
        found += digit.to(tl.int64) << shift
    return found


@triton.jit
def truncate_kernel(
    p_scores, p_rows, p_top_k, p_top_p, p_min_p, V, s_scores, BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row: its largest score, a search each where top-k and top-p cut something off, the mass for top-p."""
    i_b = tl.program_id(0)
    p_row = p_scores + tl.load(p_rows + i_b) * s_scores
    top_k = tl.load(p_top_k + i_b)
    top_p = tl.load(p_top_p + i_b)
    min_p = tl.load(p_min_p + i_b)
    o_v = tl.arange(0, BLOCK)

    b_max = tl.full([BLOCK], float("-inf"), tl.float32)
    for i_v in range(0, V, BLOCK):
        b_max = tl.maximum(
            b_max, tl.load(p_row + i_v + o_v, mask=i_v + o_v < V, other=float("-inf"))
        )
    most = tl.max(b_max, axis=0)

    # the smallest key that stays
    least = most.to(tl.int64) * 0
    if (top_k > 0) & (top_k < V):
        least = _search(p_row, V, most, least, top_k, True, BITS, BLOCK)
    if top_p < 1.0:  # of the mass that is left
        b_total = tl.zeros([BLOCK], tl.float64)
        for i_v in range(0, V, BLOCK):
            m_v = i_v + o_v < V
            b_x = tl.load(p_row + i_v + o_v, mask=m_v, other=float("-inf"))
            b_mass = tl.where(m_v & (_keys(b_x) >= least), tl.exp(b_x - most), 0.0)
            b_total += b_mass.to(tl.float64)
        to_go = (1.0 - top_p) * tl.sum(b_total, axis=0)
        least = tl.maximum(least, _search(p_row, V, most, least, to_go, False, BITS, BLOCK))

    for i_v in range(0, V, BLOCK):
        m_v = i_v + o_v < V
        b_x = tl.load(p_row + i_v + o_v, mask=m_v, other=float("-inf"))
        b_stays = (_keys(b_x) >= least) & (tl.exp(b_x - most) >= min_p)
        tl.store(p_row + i_v + o_v, float("-inf"), mask=m_v & ~(b_stays | (b_x == most)))


def refusal(scores_BV: Tensor) -> str:
    """The reason why the kernel cannot cut these scores; "" if it can."""
    if scores_BV.dtype != torch.float32:
        return f"dtype {scores_BV.dtype}"
    if not (scores_BV.is_cuda or INTERPRETED):
        return "only tensors on a GPU"
    return ""


def truncate(
    scores_XV: Tensor, rows_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor
) -> None:
    """Cut off the unlikely tokens of some rows, in place; masses are float32, their sums float64.

    Args:
        scores_XV: float32, mutated; a row's scores lie one after the other.
        rows_B: int64, the rows, each once.
        top_k_B, top_p_B, min_p_B: of these rows; int64, float64, float64.
    """
    with on_device(scores_XV):
        truncate_kernel[(len(rows_B),)](
            scores_XV, rows_B, top_k_B, top_p_B, min_p_B, scores_XV.shape[1], scores_XV.stride(0),
            BITS=BITS, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
