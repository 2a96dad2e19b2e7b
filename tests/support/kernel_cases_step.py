"""Small kernels of a decode step, RMSNorm and SwiGLU: Triton's against PyTorch in float64."""

import os

import pytest
import torch
import triton_interpreter  # noqa: F401
from torch.nn import functional

from megatron_dmc.ops.triton import norm, swiglu

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Of a result that is rounded once; relative."""
if DEVICE == "cpu":
    ROUNDING[torch.bfloat16] *= 2  # the interpreter cuts bits off


def random(*shape, dtype, scale=1.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(*shape, generator=generator)).to(dtype).to(DEVICE)


def assert_rounded_once(got, exact):
    torch.testing.assert_close(got.double(), exact, rtol=1.01 * ROUNDING[got.dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 48, 577, 4096])
def test_rms_norm_is_rounded_once(dtype, channels):
    # rows and tokens apart: parts of wider rows
    x = random(3, 2, 2 * channels, dtype=dtype, scale=3.0)[..., channels:]
    weight = random(channels, dtype=dtype)
    out = norm.rms_norm(x, weight, 1e-5)
    assert out.shape == x.shape and out.dtype == dtype and out.is_contiguous()
    assert_rounded_once(out, functional.rms_norm(x.double(), (channels,), weight.double(), 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [33, 512])
def test_adding_first_is_two_operations(dtype, channels):
    """Bit for bit; in the rows of a wider tensor, and nothing outside of them changes."""
    wide, added = random(5, channels + 7, dtype=dtype), random(5, channels, dtype=dtype)
    if DEVICE == "cpu":  # sums that need no rounding
        wide, added = ((8 * x.clamp(-2, 2)).round() / 8 for x in (wide, added))
    before, x = wide.clone(), wide[:, :channels]
    weight = random(channels, dtype=dtype)
    out = norm.add_rms_norm(x, added, weight, 1e-6)
    want = before[:, :channels] + added
    assert torch.equal(x, want) and torch.equal(wide[:, channels:], before[:, channels:])
    assert torch.equal(out, norm.rms_norm(want, weight, 1e-6))


def test_embedding_of_layer_0():
    """Megatron's embedding of T tokens has the shape (T, 1, C) and the strides (C, T C, 1)."""
    x = random(1, 6, 64, dtype=torch.bfloat16).transpose(0, 1)
    flat = x.flatten(0, 1)
    assert flat.data_ptr() == x.data_ptr()
    weight = random(64, dtype=torch.bfloat16)
    for given in (x, flat):
        out = norm.rms_norm(given, weight, 1e-5)
        assert torch.equal(out.view(6, 64), norm.rms_norm(x.contiguous().view(6, 64), weight, 1e-5))
    norm.add_rms_norm(flat, torch.ones_like(flat), weight, 1e-5)
    assert torch.equal(x[:, 0], flat)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 96, 1027])
def test_swiglu_is_rounded_once(dtype, channels):
    x = random(3, 2 * channels + 3, dtype=dtype, scale=8.0)[:, : 2 * channels]
    out = swiglu.swiglu(x)
    gate, up = x.double().chunk(2, -1)
    assert out.shape == (3, channels) and out.dtype == dtype and out.is_contiguous()
    assert_rounded_once(out, functional.silu(gate) * up)


def test_extremes():
    """Gates beyond what an exponential holds; NaN; no rows."""
    x = torch.tensor([[-200.0, 200.0, float("nan"), 1.0, 1.0, 1.0]], device=DEVICE)
    out = swiglu.swiglu(x)
    assert out[0, :2].tolist() == [0.0, 200.0] and out[0, 2].isnan()
    assert swiglu.swiglu(x[:0]).shape == (0, 3)
    weight = torch.ones(6, device=DEVICE)
    assert norm.rms_norm(x, weight, 1e-5).isnan().all()
    assert norm.rms_norm(x[:0], weight, 1e-5).shape == (0, 6)
    assert (norm.rms_norm(torch.zeros_like(x), weight, 1e-5) == 0).all()
