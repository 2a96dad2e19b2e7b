"""Attention within a band: its two back ends. Exactness of gradients is tested where they are used
(test_delayed.py, test_eviction.py)."""

import pytest
import torch
from test_ops import randn

from megatron_dmc.ops.training import band, flash_check


@pytest.mark.parametrize("num_queries", [1, 7, 70])
@pytest.mark.parametrize("n", [1, 5, 33, 100])
def test_matrix_products_equal_a_dense_mask(n, num_queries):
    num_keys, scale = 70, 0.3
    q, k, v = (
        randn(2, h, t, 6, seed=h) for h, t in ((4, num_queries), (2, num_keys), (2, num_keys))
    )
    out, lse, _ = band.Matmul.forward(q, k, v, n, scale)
    distance = torch.arange(num_keys - num_queries, num_keys)[:, None] - torch.arange(num_keys)
    k, v = (x.repeat_interleave(2, 1) for x in (k, v))
    scores = scale * q @ k.transpose(2, 3)
    scores = scores.masked_fill((distance < 0) | (distance >= n), float("-inf"))
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(out, scores.softmax(-1) @ v)


@pytest.mark.parametrize("num_queries", [40, 145])
def test_flash_calls_pytorch_with_the_window(monkeypatch, num_queries):
    """PyTorch's own signature, shapes and layout on tensors without storage; its window is the band."""
    calls, aten = [], band.aten

    class Recorder:
        @staticmethod
        def _flash_attention_forward(*args, **kwargs):
            calls.append((kwargs["window_size_left"], kwargs["window_size_right"]))
            return aten._flash_attention_forward(*args, **kwargs)

        @staticmethod
        def _flash_attention_backward(*args, **kwargs):
            calls.append((kwargs["window_size_left"], kwargs["window_size_right"]))
            return aten._flash_attention_backward(*args, **kwargs)

    monkeypatch.setattr(band, "aten", Recorder)
    options = dict(dtype=torch.bfloat16, device="meta")
    q = torch.empty(2, 4, num_queries, 64, **options)
    k, v = (torch.empty(2, 2, 145, 64, **options) for _ in range(2))
    out, lse, state = band.Flash.forward(q, k, v, 17, 0.125)
    assert out.shape == q.shape and lse.shape == (2, 4, num_queries)
    grads = band.Flash.backward(out, q, k, v, out, lse, state, 17, 0.125)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    assert calls == [(16, 0), (16, 0)]


def test_a_window_that_is_off_by_one_is_refused(monkeypatch):
    """The check that a GPU's first call makes, on a CPU: the kernel against matrix products."""
    kind = (torch.device("cpu"), torch.float32, 4, 2, 16)
    right, wrong = band._of_checked_band(band.Matmul), type("Wrong", (), {})
    wrong.forward = lambda q, k, v, n, scale: band.Matmul.forward(q, k, v, n - 1, scale)
    wrong.backward = band.Matmul.backward
    assert flash_check.fault(right, right, *kind, True) == ""
    assert "output differs" in flash_check.fault(band._of_checked_band(wrong), right, *kind, True)


def test_choice_names_its_reasons(monkeypatch):
    x = torch.zeros(1, 1, 4, 8)
    assert band.choose_band(x, x, x) is band.Matmul
    monkeypatch.setenv("DMC_BAND_BACKEND", "flash")
    with pytest.raises(ValueError, match="only half precision on a GPU"):
        band.choose_band(x, x, x)
