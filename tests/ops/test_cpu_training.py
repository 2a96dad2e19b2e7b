"""Training's CPU kernels: the merge and near tokens, by the cases of the other back ends, and SwiGLU in Megatron's
place."""

from types import SimpleNamespace

import pytest
import torch
from kernel_tools import run_cases

from megatron_dmc import ops
from megatron_dmc.ops import cpu
from megatron_dmc.ops.backends import MERGE, NEAR
from megatron_dmc.ops.cpu import swiglu

pytestmark = pytest.mark.skipif(bool(cpu.absence()), reason=cpu.absence() or "-")


def test_cases():
    pytest.importorskip("triton")  # shares Triton's files of cases
    run_cases(
        "kernel_cases_merge.py", "kernel_cases_near.py", TRITON_INTERPRET="1", DMC_TESTED_BACKEND="cpu"
    )  # fmt: skip


def test_the_kernels_are_the_default_on_a_cpu():
    x = torch.zeros(3, 1, 2, 32)
    assert MERGE.choose(x, x, 0) == NEAR.choose(x, 65) == "cpu"
    assert (
        NEAR.choose(x, 66) == NEAR.choose(x.double(), 16) == NEAR.choose(x[..., :16], 16) == "torch"
    )
    for other, reason in (
        (x.double(), "dtype torch.float64"),
        (x[..., :16], "head_dim=16; the kernels take multiples of 32"),
    ):
        assert MERGE.choose(other, other, 0) == "torch"
        with pytest.raises(ValueError, match=reason):
            ops.merge(other, other, x[..., 0], x[..., 0], backend="cpu")


@pytest.mark.parametrize("merge_window,merge_delay", [(0, 0), (12, 16)])
def test_results_are_the_same_for_any_threads(merge_window, merge_delay):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(70, 3, 5, 64, generator=generator, requires_grad=True) for _ in range(3))
    alpha, omega = (torch.rand(70, 3, 5, generator=generator, requires_grad=True) for _ in range(2))

    def results(threads):
        torch.set_num_threads(threads)
        merged = ops.merge(k, v, alpha, omega, merge_window=merge_window)
        out = ops.delayed_attention(q, k, v, *merged, torch.log1p(-alpha), merge_delay=merge_delay)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v, alpha, omega))

    before = torch.get_num_threads()
    try:
        assert all(torch.equal(a, b) for a, b in zip(results(1), results(3), strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("of", range(4))
def test_what_is_not_a_number_stays_none(of, monkeypatch):
    """Of queries, raw keys and values, and state keys: every query that sees it. Of state values the stock kernel
    makes more of it."""
    monkeypatch.setenv("DMC_NEAR_BACKEND", "cpu")
    inputs = [torch.randn(40, 1, 1, 32) for _ in range(5)]
    inputs[of][20, 0, 0, 3] = float("nan")
    out = ops.delayed_attention(*inputs, torch.zeros(40, 1, 1), merge_delay=4)[:, 0, 0, 3].isnan()
    first, end = (20, 21) if of == 0 else (20, 24) if of < 3 else (24, 40)
    assert out[first:end].all() and not out[:first].any() and not out[end:].any()


@pytest.fixture
def fused():
    """Megatron's functions, as they are without a compiler, and what stands in for them."""

    def forward(y):
        gate, up = y.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    def backward(g, y):
        y = y.detach().requires_grad_()
        return torch.autograd.grad(forward(y), y, g.to(y.dtype))[0]

    module = SimpleNamespace(swiglu=forward, swiglu_back=backward)
    swiglu.install(module)
    return forward, backward, module


@pytest.mark.parametrize("dtype,rtol", [(torch.float32, 1e-5), (torch.bfloat16, 1 / 128)])
def test_swiglu_in_megatrons_place(fused, dtype, rtol):
    forward, backward, module = fused
    generator = torch.Generator().manual_seed(0)
    y = 4 * torch.randn(7, 3, 192, generator=generator).to(dtype)
    g = torch.randn(3, 7, 96, generator=generator).to(dtype).transpose(0, 1)
    exact, exact_grad = forward(y.double()), backward(g.double(), y.double())
    torch.testing.assert_close(module.swiglu(y).double(), exact, rtol=rtol, atol=1e-6)
    grad = module.swiglu_back(g, y)
    assert grad.dtype == dtype and grad.shape == y.shape
    torch.testing.assert_close(grad.double(), exact_grad, rtol=rtol, atol=1e-6)


def test_what_the_swiglu_kernel_does_not_take_is_megatrons(fused):
    forward, backward, module = fused
    for y in (torch.randn(5, 30), torch.randn(5, 64, dtype=torch.float64)):
        g = torch.randn(5, y.shape[1] // 2, dtype=y.dtype)
        assert torch.equal(module.swiglu(y), forward(y))
        assert torch.equal(module.swiglu_back(g, y), backward(g, y))
    y, g = torch.randn(5, 64), torch.randn(5, 32, dtype=torch.float64)
    assert torch.equal(module.swiglu_back(g, y), backward(g, y))
