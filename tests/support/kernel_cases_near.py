"""The kernels of near tokens, open states and their join against the specifications; see kernel_cases_merge.py."""

from functools import partial

import pytest
import torch
from kernel_cases_merge import BACKEND, DEVICE, assert_within_twice_the_yardstick  # patches Triton

from megatron_dmc import ops
from megatron_dmc.ops import gates, reference

# the interpreter cuts bfloat16 off instead of rounding it
HALF = torch.float16 if DEVICE == "cpu" and BACKEND == "triton" else torch.bfloat16
ODD = 48 if BACKEND == "triton" else 96
"""Channels of a head: not a power of two."""


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(num_tokens, heads, *, num_keys=2, dim=ODD, dtype=HALF, batch=2, seed=0):
    """Queries, as many keys as asked for in total with values, and log_keep: parts of one tensor."""
    generator = torch.Generator().manual_seed(seed)
    n, g = heads
    shape = (num_tokens, batch)
    split = [n, *[g] * num_keys]
    parts = torch.randn(*shape, sum(split), dim, generator=generator).to(dtype).to(DEVICE)
    logit = 4 * torch.randn(*shape, g, generator=generator).to(DEVICE)
    log_keep = gates.soft_gate(logit, None, temperature=0.7)[1]
    return [*parts.split(split, dim=2), log_keep]


def check(op, spec, inputs, monkeypatch, *, keys):
    """The op by the kernels and in PyTorch against the specification.

    Args:
        keys: positions of the keys among the inputs; their borrowed channel's gradient is 0, like the queries'.
    """
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(inputs[0].shape, generator=generator).to(inputs[0].dtype).to(DEVICE)

    def both_ways(op, *tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = op(*leaves)
        found = torch.autograd.grad(out, leaves, grad.to(out.dtype), allow_unused=True)
        return [
            out,
            *(torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)),
        ]

    exact = both_ways(spec, *(x.double() for x in inputs))
    results = []
    for backend in (BACKEND, "torch"):
        monkeypatch.setenv("DMC_NEAR_BACKEND", backend)
        results.append(both_ways(op, *inputs))
    names = ("out", *(f"grad {i}" for i in range(len(inputs) - 1)), "grad log_keep")
    ours, honest = results
    assert_within_twice_the_yardstick(ours, exact, honest, names=names)
    for i in (0, *keys):
        assert (gates.borrowed(ours[1 + i]) == 0).all()
    return ours


@pytest.mark.parametrize("num_tokens", [1, 2, 150])
@pytest.mark.parametrize("heads", [(2, 2), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_the_diagonal_equals_the_specification(num_tokens, heads, dtype, monkeypatch):
    inputs = make_inputs(num_tokens, heads, dtype=dtype)
    check(ops.training_attention, reference.training_attention, inputs, monkeypatch, keys=[1])


DELAYS = [
    # w, T, query and key/value heads, D, dtype
    (1, 75, (2, 2), 64, HALF),
    (4, 67, (4, 1), 128, HALF),
    (16, 75, (4, 2), 64, torch.float32),
    (16, 140, (1, 1), 128, HALF),
    (64, 140, (2, 1), 64, HALF),
    (64, 60, (2, 2), ODD, torch.float32),
    (5, 3, (2, 1), 64, HALF),
]


@pytest.mark.parametrize("case", range(len(DELAYS)))
def test_a_merge_delay_equals_the_specification(case, monkeypatch):
    delay, num_tokens, heads, dim, dtype = DELAYS[case]
    inputs = make_inputs(num_tokens, heads, num_keys=4, dim=dim, dtype=dtype, batch=1 + case % 2)
    op, spec = (partial(x.delayed_attention, merge_delay=delay) for x in (ops, reference))
    check(op, spec, inputs, monkeypatch, keys=[1, 3])


@pytest.mark.parametrize("case", range(len(DELAYS)))
def test_eviction_equals_the_specification(case, monkeypatch):
    delay, num_tokens, heads, dim, dtype = DELAYS[case]
    delay = delay if case else 0
    inputs = make_inputs(num_tokens, heads, dim=dim, dtype=dtype, batch=1 + case % 2)
    op, spec = (partial(x.eviction_attention, delay=delay) for x in (ops, reference))
    check(op, spec, inputs, monkeypatch, keys=[1])


@pytest.mark.parametrize("cut", [1, 30, 64, 90])
def test_queries_of_the_last_tokens(cut, monkeypatch):
    """A sequence whose queries are split, as by context parallelism, and a document within a packed one."""

    def split(attend, q, *keys):
        ends = [(0, cut), (cut, q.shape[0])]
        return torch.cat([attend(q[a:b], *(x[:b] for x in keys)) for a, b in ends])

    inputs = make_inputs(101, (2, 1), num_keys=4, dim=32, dtype=torch.float32, batch=1)
    for first in (0, 9):
        document = [x[first:] for x in inputs]
        op, spec = (partial(x.delayed_attention, merge_delay=16) for x in (ops, reference))
        check(partial(split, op), spec, document, monkeypatch, keys=[1, 3])
        document = [*document[:3], document[5]]
        op, spec = (partial(x.eviction_attention, delay=3) for x in (ops, reference))
        check(partial(split, op), spec, document, monkeypatch, keys=[1])
        op, spec = ops.training_attention, reference.training_attention
        check(partial(split, op), spec, document, monkeypatch, keys=[1])


def test_a_longer_delay_is_pytorchs(monkeypatch):
    inputs = make_inputs(80, (2, 2), num_keys=4, dim=32)
    monkeypatch.setenv("DMC_NEAR_BACKEND", BACKEND)
    with pytest.raises(ValueError, match="a query sees 66 raw tokens, more than 65"):
        ops.delayed_attention(*inputs, merge_delay=66)
    monkeypatch.delenv("DMC_NEAR_BACKEND")
    spec = partial(reference.delayed_attention, merge_delay=66)
    torch.testing.assert_close(
        ops.delayed_attention(*inputs, merge_delay=66).float(),
        spec(*(x.float() for x in inputs)), rtol=5e-3, atol=5e-3,
    )  # fmt: skip
