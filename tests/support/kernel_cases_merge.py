"""Merge kernels against the specification: Triton's, and with DMC_TESTED_BACKEND=cpu those for CPUs.
test_training_kernels.py and test_cpu_training.py run this file in a process of its own.

On a GPU where there is one, otherwise in Triton's interpreter: TRITON_INTERPRET=1 has to be set
before Triton is imported, so the cases cannot share a process with other tests.
"""

import itertools
import os

import pytest
import torch
import triton_interpreter  # noqa: F401
from torch import Tensor

from megatron_dmc import ops
from megatron_dmc.ops import gates, reference
from megatron_dmc.ops.backends import MERGE
from megatron_dmc.ops.triton.launch import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
BACKEND = os.environ.get("DMC_TESTED_BACKEND", "triton")
kernels = MERGE.kernels(BACKEND if BACKEND in MERGE.backends else "triton")
only_triton = pytest.mark.skipif(BACKEND != "triton", reason="about Triton's tiles")
NAMES = ("merged k", "merged v", "grad k", "grad v", "grad alpha", "grad omega")


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(num_tokens, dim, *, hard, dtype, batch=2, heads=3, seed=0) -> list[Tensor]:
    """k, v, alpha, omega and the outputs' two gradients; keys and values are parts of one tensor."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, batch, heads)
    logit = 4 * torch.randn(shape, generator=generator)
    alpha, _, _ = gates.hard_gate(logit) if hard else gates.soft_gate(logit, None, temperature=0.7)
    omega = torch.sigmoid(3 * torch.randn(shape, generator=generator))
    qkv = torch.randn(*shape, 3 * dim, generator=generator).to(dtype)
    gy = torch.randn(*shape, 2 * dim, generator=generator).to(dtype)
    _, k, v = (x.to(DEVICE) for x in qkv.split(dim, dim=-1))
    return [k, v, alpha.to(DEVICE), omega.to(DEVICE), *(x.to(DEVICE) for x in gy.split(dim, -1))]


def run(op, inputs, **options) -> list[Tensor]:
    """Outputs and the gradients of k, v, alpha, omega."""
    *leaves, gy_k, gy_v = inputs
    leaves = [x.detach().requires_grad_() for x in leaves]
    outs = op(*leaves, **options)
    grads = torch.autograd.grad(
        outs, leaves, (gy_k.to(outs[0].dtype), gy_v.to(outs[1].dtype)), allow_unused=True
    )
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    return [*outs, *grads]


def assert_within_twice_the_yardstick(ours, exact, honest, names=NAMES):
    """Error at most twice that of an honest version in the same dtype."""
    for name, a, b, c in zip(names, ours, exact, honest, strict=True):
        assert torch.isfinite(a).all(), f"{name} is not finite"
        error, yardstick = ((x.double() - b).norm().item() for x in (a, c))
        floor = 2e-7 * b.norm().item() + 1e-30
        if name in ("grad omega", "grad log_keep"):
            # differences of numbers as large as the terms of another gradient
            floor += 1e-6 * exact[3].norm().item()
        assert error <= 2 * yardstick + floor, (name, error, yardstick)


def check(inputs, *, merge_window, **options):
    exact = run(reference.merge, [x.double() for x in inputs], merge_window=merge_window)
    honest = run(
        reference.merge, [x.to(inputs[0].dtype) for x in inputs], merge_window=merge_window
    )
    ours = run(kernels.merge, inputs, merge_window=merge_window, **options)
    for ours_, input_ in zip(ours[2:], inputs[:4], strict=True):
        assert ours_.dtype == input_.dtype and ours_.shape == input_.shape
    assert_within_twice_the_yardstick(ours, exact, honest)


CASES = list(itertools.product((0, 1, 3, 12), (1, 2, 17, 67), (False, True)))


@pytest.mark.parametrize("case", range(len(CASES)))
def test_kernels_equal_the_specification(case):
    merge_window, num_tokens, hard = CASES[case]
    # dtype and head dim take turns so that each meets every other setting
    dtype = (torch.float32, torch.bfloat16)[(case + case // 8) % 2]
    dim = (32, 48 if BACKEND == "triton" else 96)[(case // 2 + case // 8) % 2]
    check(make_inputs(num_tokens, dim, hard=hard, dtype=dtype), merge_window=merge_window)


@only_triton
@pytest.mark.parametrize("merge_window", [0, 3])
def test_several_blocks_of_channels_and_half_precision(merge_window):
    """Partial sums of the gates' gradients from three blocks, the last one not full."""
    inputs = make_inputs(40, 72, hard=False, dtype=torch.float16, batch=1, heads=2)
    small = kernels.Tiling(tokens=16, channels=32, num_warps=4, num_stages=2)
    default = kernels.default_tiling
    kernels.default_tiling = lambda *args, **kwargs: small
    try:
        check(inputs, merge_window=merge_window, tiling=small)
    finally:
        kernels.default_tiling = default


def test_decisions_on_the_edges():
    """Every token merges; none does; and a merge right across each tile's edge."""
    inputs = make_inputs(70, 32, hard=True, dtype=torch.float32, batch=1, heads=3)
    inputs[2][:, :, 0] = 1.0
    inputs[2][:, :, 1] = 0.0
    inputs[2][:, :, 2] = (torch.arange(70) % 32 == 0).float()[:, None]
    for merge_window in (0, 16):
        check(inputs, merge_window=merge_window)


@only_triton
@pytest.mark.parametrize("segment", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_that_run_at_once(segment, dtype, monkeypatch):
    """Sequences that start again on a segment's edge, merge throughout, forget slowly, or as a gate says: as in
    one walk, whose tiles are 32 tokens."""
    monkeypatch.setattr(kernels, "segment_tiles", lambda *args: segment)
    inputs = make_inputs(213, 32, hard=False, dtype=dtype, batch=1, heads=4)
    alpha = inputs[2]
    alpha[:, :, 0] = (torch.arange(213) % (32 * segment) != 0).float()[:, None]
    alpha[:, :, 1] = 1.0
    alpha[:, :, 2] = 0.9
    check(inputs, merge_window=0)
    results = [run(kernels.merge, inputs, merge_window=0) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@only_triton
def test_number_of_segments():
    """Enough programs for a GPU, and no segment so short that its first carry costs much."""
    assert kernels.segment_tiles(128, 256) == 43  # B = 4, G = 32, D = 128 at T = 4096: 768 programs
    assert kernels.segment_tiles(128, 16) == 8
    assert kernels.segment_tiles(128, 1024) == 128
    assert kernels.segment_tiles(3, 16) == 3


def test_expanded_gradient_and_backend_argument():
    """The gradient of a sum has strides of 0; without gradients nothing is kept."""
    inputs = make_inputs(20, 32, hard=False, dtype=torch.float32, batch=1, heads=2)
    inputs[4:] = [torch.ones((), device=DEVICE).expand(x.shape) for x in inputs[4:]]
    check(inputs, merge_window=0)
    with torch.no_grad():
        ours = ops.merge(*inputs[:4], backend=BACKEND)
        theirs = ops.merge(*inputs[:4], backend="torch")
    torch.testing.assert_close(ours, theirs)
    empty = [x[:0] for x in inputs[:4]]
    assert ops.merge(*empty, backend=BACKEND)[0].shape == empty[0].shape


def test_windows_beyond_the_kernels():
    """Triton's refuse them; those for CPUs take any."""
    inputs = make_inputs(50, 32, hard=False, dtype=torch.float32, batch=1)
    if BACKEND == "triton":
        with pytest.raises(ValueError, match="merge_window=40"):
            ops.merge(*inputs[:4], merge_window=40, backend=BACKEND)
    else:
        for merge_window in (17, 40):
            check(inputs, merge_window=merge_window)
