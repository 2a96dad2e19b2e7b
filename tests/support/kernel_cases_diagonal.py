"""The diagonal's kernels against training attention's specification; see kernel_cases_merge.py."""

import pytest
import torch
from kernel_cases_merge import DEVICE, assert_within_twice_the_yardstick  # patches Triton

from megatron_dmc import ops
from megatron_dmc.ops import gates, reference

# the interpreter cuts bfloat16 off instead of rounding it
HALF = torch.float16 if DEVICE == "cpu" else torch.bfloat16


@pytest.mark.parametrize("num_tokens", [1, 2, 150])
@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_diagonal_kernels_equal_the_specification(num_tokens, heads, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    n, g = heads
    shape = (num_tokens, 2)
    qkv = torch.randn(*shape, n + 2 * g, 48, generator=generator).to(dtype).to(DEVICE)
    logit = 4 * torch.randn(*shape, g, generator=generator).to(DEVICE)
    log_keep = gates.soft_gate(logit, None, temperature=0.7)[1]
    inputs = [*qkv.split([n, g, g], dim=2), log_keep]
    grad = torch.randn(*shape, n, 48, generator=generator).to(dtype).to(DEVICE)

    def both_ways(op, *tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = op(*leaves)
        return [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

    exact = both_ways(reference.training_attention, *(x.double() for x in inputs))
    results = []
    torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialised memory is NaN
    for backend in ("triton", "torch"):
        monkeypatch.setenv("DMC_DIAGONAL_BACKEND", backend)
        results.append(both_ways(ops.training_attention, *inputs))
    torch.use_deterministic_algorithms(False)
    names = ("out", "grad q", "grad k", "grad v", "grad log_keep")
    ours, honest = results
    assert_within_twice_the_yardstick(ours, exact, honest, names=names)
    assert (gates.borrowed(ours[1]) == 0).all() and (gates.borrowed(ours[2]) == 0).all()
