"""8-bit entries in Triton: `ops.paged.kv_pages` in integer arithmetic, alike on every GPU and in the interpreter.

`STORED` says what pages hold: 0 the model's dtype, 1 float8_e4m3fn (as bytes, since compute capability
8.0 has no conversions of it), 2 int8.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dmc.ops.paged.kv_pages import Pages


def parts(pages: Pages) -> tuple[Tensor, Tensor, int]:
    """Values, scales (the values again where there are none) and `STORED`."""
    if isinstance(pages, Tensor):
        return pages, pages, 0
    values = pages.values_PSD
    if values.dtype == torch.int8:
        return values, pages.scales_PS, 2
    return values.view(torch.uint8), pages.scales_PS, 1


@triton.jit
def scale_of(most, STORED: tl.constexpr):
    """An entry's scale from the bits of its largest |x|: as integers NaN is larger than any number."""
    amax = tl.maximum(most, 0x0D800000).to(tl.float32, bitcast=True)  # 2**-100
    if STORED == 1:
        return amax * (1.0 / 448.0)
    return amax * (1.0 / 127.0)


@triton.jit
def encode(b_x, scale, STORED: tl.constexpr):
    """Numbers as stored bytes. A quotient of `div_rn` cannot be fused with the sums that round it."""
    b_y = tl.div_rn(b_x, scale + tl.zeros_like(b_x))
    if STORED == 2:
        # adding 1.5 * 2**23 rounds to a whole number, which then is in the low bits
        return ((b_y + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int8)
    b_bits = b_y.to(tl.int32, bitcast=True)
    b_abs = b_bits & 0x7FFFFFFF
    # exponent bias 127 to 7, and 20 of 23 bits rounded away; below 2**-6 steps of 2**-9
    b_normal = ((b_abs + 0x7FFFF + ((b_abs >> 20) & 1)) >> 20) - 960
    b_small = (b_abs.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    b_code = tl.where(b_abs < 0x3C800000, b_small, tl.minimum(b_normal, 0x7F))
    return (b_code | ((b_bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def decode(b_x, STORED: tl.constexpr):
    """Stored bytes as float32, without their scale."""
    if STORED == 1:
        b_i = b_x.to(tl.int32)
        b_bits = ((b_i & 0x7F) << 20) | ((b_i & 0x80) << 24)
        return (
            b_bits.to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0
        )  # 2**120
    return b_x.to(tl.float32)
