"""Rotary position embeddings (RoPE), half-split layout, on the first F channels of a head.

Cosines and sines are rounded to the model's dtype before use, as Megatron does. None in place of angles
or tables is a model without RoPE. `reference.rotate` is the independent specification.
"""

import torch
from torch import Tensor

from megatron_dmc.ops.gates import zero_borrowed_channel


def cosine_and_sine(
    freqs_XF: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The tables of cosines and sines of angles, (X, F) each in the model's dtype."""
    if freqs_XF is None:
        return None, None
    return freqs_XF.cos().to(dtype), freqs_XF.sin().to(dtype)


def rotate(
    x_XHD: Tensor, cos_XF: Tensor | None, sin_XF: Tensor | None, *, compress: bool = False
) -> Tensor:
    """Rotate X tokens or requests of H heads of any kind by the tables of `cosine_and_sine`.

    Args:
        compress: zero the borrowed channel before and after.
    """
    if compress:
        return zero_borrowed_channel(rotate(zero_borrowed_channel(x_XHD), cos_XF, sin_XF))
    if cos_XF is None or sin_XF is None:
        return x_XHD
    num_rotary = cos_XF.shape[1]
    rotary, passed = x_XHD[..., :num_rotary], x_XHD[..., num_rotary:]
    first, second = rotary.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return torch.cat([rotary * cos_XF[:, None] + turned * sin_XF[:, None], passed], dim=-1)


def rotate_by(x_XHD: Tensor, freqs_XF: Tensor | None, *, compress: bool = False) -> Tensor:
    """`rotate` by each row's angles instead of tables."""
    return rotate(x_XHD, *cosine_and_sine(freqs_XF, x_XHD.dtype), compress=compress)
