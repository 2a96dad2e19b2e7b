"""Top-k, top-p and min-p: the Triton kernel keeps what PyTorch keeps."""

import os

import pytest
import torch
import triton_interpreter  # noqa: F401

from megatron_dmc.ops.triton import truncate as kernels
from megatron_dmc.ops.truncate import truncate

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def check(scores, top_k, top_p, min_p):
    cut = [
        torch.tensor(x, dtype=d, device=DEVICE)
        for x, d in ((top_k, torch.int64), (top_p, torch.float64), (min_p, torch.float64))
    ]
    want, is_done = truncate(scores, *cut, most=scores.shape[1])
    assert is_done.all()
    # rows in another order, between others that stay as they are, in a wider buffer
    count, vocab = scores.shape
    buffer = torch.full((count + 2, vocab + 5), 7.0, device=DEVICE)
    rows = torch.arange(count, device=DEVICE).flip(0) + 1
    buffer[rows, :vocab] = scores
    kernels.truncate(buffer[:, :vocab], rows, *cut)
    assert torch.equal(buffer[rows, :vocab], want)
    buffer[rows, :vocab] = 7.0
    assert (buffer == 7).all()
    return want


@pytest.mark.parametrize("vocab", [2, 300, 2500])
def test_keeps_what_pytorch_keeps(vocab):
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(12, vocab, generator=generator)
    scores[1] = scores[1].round()  # many of one value
    scores[2] = -scores[2].abs() - 1  # none above 0
    scores[3, ::2] = float("-inf")
    scores[4] = 0.0
    scores[4, 1::2] = -0.0
    scores[5] *= 30  # most masses are 0
    top_k = [0, 3, vocab, 2 * vocab, 1, -1, 7, 0, 40, 0, 1000, 5]
    top_p = [0.5, 0.9, 1.0, 0.3, 0.7, 0.999, 1e-9, 1.0, 0.95, 0.2, 0.8, 1.0]
    min_p = [0.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.0, 1.0, 0.01, 0.0, 0.0, 0.0]
    want = check(scores.to(DEVICE), top_k, top_p, min_p)
    kept = want.isfinite().sum(1).tolist()
    assert min(kept) >= 1 and kept[6] == kept[7] == 1 and (vocab < 300 or max(kept) > 100)


def test_rows_that_are_not_finite_end():
    scores = torch.randn(3, 50, device=DEVICE)
    scores[0, 3], scores[1, 4], scores[2] = float("nan"), float("inf"), float("-inf")
    k, p = torch.tensor([5] * 3, device=DEVICE), torch.full((3,), 0.9, dtype=torch.float64)
    kernels.truncate(scores, torch.arange(3, device=DEVICE), k, p.to(DEVICE), p.to(DEVICE))
