"""Training's CPU kernels: the merge, by the cases of the other back ends, and SwiGLU in Megatron's place."""

from types import SimpleNamespace

import pytest
import torch
from kernel_tools import run_cases

from megatron_dmc import ops
from megatron_dmc.ops import cpu
from megatron_dmc.ops.backends import MERGE
from megatron_dmc.ops.cpu import swiglu

pytestmark = pytest.mark.skipif(bool(cpu.absence()), reason=cpu.absence() or "-")


def test_merge_cases():
    pytest.importorskip("triton")  # shares Triton's file of cases
    run_cases("kernel_cases_merge.py", TRITON_INTERPRET="1", DMC_TESTED_BACKEND="cpu")


def test_merge_is_the_default_on_a_cpu():
    x = torch.zeros(3, 1, 2, 32)
    assert MERGE.choose(x, x, 0) == "cpu"
    for other, reason in (
        (x.double(), "dtype torch.float64"),
        (x[..., :16], "head_dim=16; the kernels take multiples of 32"),
    ):
        assert MERGE.choose(other, other, 0) == "torch"
        with pytest.raises(ValueError, match=reason):
            ops.merge(other, other, x[..., 0], x[..., 0], backend="cpu")


def test_merge_is_the_same_for_any_threads():
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(70, 3, 5, 64, generator=generator, requires_grad=True) for _ in range(2))
    alpha, omega = (torch.rand(70, 3, 5, generator=generator, requires_grad=True) for _ in range(2))

    def results(threads, merge_window):
        torch.set_num_threads(threads)
        merged = ops.merge(k, v, alpha, omega, merge_window=merge_window, backend="cpu")
        return *merged, *torch.autograd.grad((merged[0] * merged[1]).sum(), (k, v, alpha, omega))

    before = torch.get_num_threads()
    try:
        for merge_window in (0, 12):
            one, three = results(1, merge_window), results(3, merge_window)
            assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
    finally:
        torch.set_num_threads(before)


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
