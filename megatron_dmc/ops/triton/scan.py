"""Parts of the merge scan that training's kernels and prefill's share. docs/method.md, section 2."""

import triton
import triton.language as tl


@triton.jit
def products(b_alpha, o_i, BAND: tl.constexpr):
    """M_ij [I, I]: product of alpha over (j, i], 0 where token j does not count for token i."""
    m_after = o_i[:, None] > o_i[None, :]
    b_m = tl.cumprod(tl.where(m_after, b_alpha[:, None], 1.0), axis=0)
    m_counts = o_i[:, None] >= o_i[None, :]
    if BAND > 0:
        m_counts = m_counts & (o_i[:, None] - o_i[None, :] < BAND)
    return tl.where(m_counts, b_m, 0.0)


@triton.jit
def weighted_sum(b_w, b_x, INTERPRET: tl.constexpr):
    """b_w [I, I] float32 times b_x [I, F], to float32's precision."""
    if INTERPRET:
        return tl.dot(b_w, b_x.to(tl.float32))
    elif b_x.dtype == tl.float32:
        return tl.dot(b_w, b_x, input_precision="tf32x3")
    else:
        # two half-precision parts of a weight hold as much of it as float32 sums resolve
        b_high = b_w.to(b_x.dtype)
        b_low = (b_w - b_high.to(tl.float32)).to(b_x.dtype)
        return tl.dot(b_low, b_x, tl.dot(b_high, b_x))


@triton.jit
def last_row(b_x, o_i, I: tl.constexpr):
    """The last element of b_x [I], or the last row of b_x [I, I]."""
    if len(b_x.shape) == 1:
        return tl.sum(tl.where(o_i == I - 1, b_x, 0.0), axis=0)
    else:
        return tl.sum(tl.where(o_i[:, None] == I - 1, b_x, 0.0), axis=0)
