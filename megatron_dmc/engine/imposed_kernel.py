"""Imposed decisions of a step's tokens in all layers, as one Triton kernel; `engine.imposed.decide` has the
contract.

Dimension letters: L layers, T tokens, R rows of running requests, G key/value heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dmc.ops.triton.launch import on_device

BLOCK = 256


@triton.jit
def _mix(x):
    """`engine.imposed._mix` of uint32, which wraps around."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def decide_kernel(
    p_positions, p_rows, p_seeds, p_limit, p_salt, p_is_merge, p_omega, T, G, s_ml, s_ol, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of one layer's (token, head) pairs."""
    i_l = tl.program_id(0).to(tl.int64)
    o_x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < T * G
    o_t, o_g = o_x // G, i_l * G + o_x % G
    # [BLOCK]
    b_row = tl.maximum(tl.load(p_rows + o_t, mask=m_x, other=0), 0)
    b_seed = tl.load(p_seeds + b_row, mask=m_x, other=0).to(tl.uint32)
    b_position = tl.load(p_positions + o_t, mask=m_x, other=0).to(tl.uint32)
    b_token = _mix(b_position + _mix(b_seed) * 0x9E3779B9)
    b_drawn = _mix(b_token ^ tl.load(p_salt + o_g, mask=m_x, other=0).to(tl.uint32))
    b_limit = tl.load(p_limit + o_g, mask=m_x, other=0)
    b_is_merge = b_drawn.to(tl.int64) >= b_limit
    tl.store(p_is_merge + i_l * s_ml + o_x, b_is_merge.to(tl.uint8), mask=m_x)
    b_logit = (_mix(b_drawn) & 0xFFFF).to(tl.float32) / 16384.0 - 2.0
    b_omega = 1.0 / (1.0 + tl.exp(-b_logit)) + eps
    tl.store(p_omega + i_l * s_ol + o_x, b_omega.to(p_omega.dtype.element_ty), mask=m_x)


def decide(
    positions_T: Tensor,
    rows_T: Tensor,
    seeds_R: Tensor,
    limit_L1G: Tensor,
    salt_L1G: Tensor,
    is_merge_LTG: Tensor,
    omega_LTG: Tensor,
    eps: float,
) -> None:
    """The host side of `decide_kernel`; tokens and heads of the outputs lie one after the other."""
    num_layers, num_tokens, num_heads = is_merge_LTG.shape
    with on_device(positions_T):
        decide_kernel[num_layers, triton.cdiv(num_tokens * num_heads, BLOCK)](
            positions_T, rows_T, seeds_R, limit_L1G, salt_L1G, is_merge_LTG.view(torch.uint8),
            omega_LTG, num_tokens, num_heads, is_merge_LTG.stride(0), omega_LTG.stride(0), eps,
            BLOCK=BLOCK,
        )  # fmt: skip
