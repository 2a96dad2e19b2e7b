"""Imposed decisions: the Triton kernel decides what PyTorch decides."""

import os

import pytest
import torch

from megatron_dmc.engine import imposed, imposed_kernel

DEVICE = os.environ["DMC_DEVICE"]


@pytest.mark.parametrize("num_tokens", [1, 5, 300])
def test_kernel_decides_what_pytorch_decides(num_tokens):
    decisions = imposed.ImposedDecisions.of(imposed.spread_weights(3, 4), 3.0, num_tokens=1000)
    limit, salt = decisions.thresholds(torch.device(DEVICE))
    generator = torch.Generator().manual_seed(0)
    # positions and requests from small to beyond 32 bits
    positions = torch.randint(0, 1 << 20, (num_tokens,), generator=generator)
    rows = torch.randint(-1, 8, (num_tokens,), generator=generator)
    seeds = torch.tensor([0, 1, 2, 77, 2**31, 2**32 - 1, 2**40 + 5, 2**62])
    inputs = [x.to(DEVICE) for x in (positions, rows, seeds)]
    results = []
    for decide in (imposed.decide, imposed_kernel.decide):
        # a part of longer buffers
        is_merge = torch.zeros(3, num_tokens + 9, 4, dtype=torch.bool, device=DEVICE)
        omega = torch.zeros(3, num_tokens + 9, 4, device=DEVICE)
        part = slice(2, 2 + num_tokens)
        decide(*inputs, limit, salt, is_merge[:, part], omega[:, part], 2.0**-7)
        results.append((is_merge, omega))
    (is_merge, omega), (is_merge_k, omega_k) = results
    assert torch.equal(is_merge, is_merge_k)
    torch.testing.assert_close(omega, omega_k, atol=1e-6, rtol=1e-6)
    assert (omega[:, 2 : 2 + num_tokens] > 0.1).all() and not omega[:, :2].any()
    if num_tokens == 300:
        assert 0.5 < is_merge[:, 2:302].float().mean() < 0.8
