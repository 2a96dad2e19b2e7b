"""Merge and training attention against the reference, forward and every gradient."""

import itertools

import pytest
import torch

from megatron_dmc import ops
from megatron_dmc.ops import gates, reference


def random_gates(shape, *, hard=False, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logit = 6 * torch.randn(shape, generator=generator, dtype=dtype)
    return gates.hard_gate(logit) if hard else gates.soft_gate(logit, None, temperature=1.0)


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("merge_window", [0, 1, 3, 12])
@pytest.mark.parametrize("num_tokens", [1, 2, 16, 17, 53])
@pytest.mark.parametrize("hard", [False, True])
def test_merge_equals_recurrence_with_gradients(merge_window, num_tokens, hard):
    shape = (num_tokens, 2, 3)
    alpha, _, _ = random_gates(shape, hard=hard)
    inputs = [
        randn(*shape, 8, seed=1),
        randn(*shape, 8, seed=2),
        alpha,
        torch.sigmoid(randn(*shape, seed=3)),
    ]
    inputs = [t.clone().requires_grad_() for t in inputs]
    weights = [randn(*shape, 8, seed=4), randn(*shape, 8, seed=5)]
    results = []
    for op in (ops.merge, reference.merge):
        outs = op(*inputs, merge_window=merge_window)
        loss = sum((o * w).sum() for o, w in zip(outs, weights, strict=True))
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
        grads = [
            torch.zeros_like(i) if g is None else g for g, i in zip(grads, inputs, strict=True)
        ]
        results.append([*outs, *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_merge_gradcheck():
    shape = (19, 1, 2)
    alpha, _, _ = random_gates(shape)
    inputs = (
        randn(*shape, 3, seed=1),
        randn(*shape, 3, seed=2),
        alpha.clone(),
        torch.sigmoid(randn(*shape, seed=3)),
    )
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    for window in (0, 4):
        assert torch.autograd.gradcheck(
            lambda *args, w=window: ops.merge(*args, merge_window=w), inputs
        )


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("num_tokens", [1, 2, 33])
@pytest.mark.parametrize("hard", [False, True])
def test_training_attention_equals_dense_with_gradients(heads, num_tokens, hard):
    n, g = heads
    _, log_keep, _ = random_gates((num_tokens, 2, g), hard=hard)
    inputs = [
        randn(num_tokens, 2, n, 8, seed=1),
        randn(num_tokens, 2, g, 8, seed=2),
        randn(num_tokens, 2, g, 8, seed=3),
        log_keep,
    ]
    inputs = [t.clone().requires_grad_() for t in inputs]
    weight = randn(num_tokens, 2, n, 8, seed=4)
    results = []
    for op in (ops.training_attention, reference.training_attention):
        out = op(*inputs)
        grads = torch.autograd.grad((out * weight).sum(), inputs)
        results.append([out, *grads])
    if hard:  # the dense formula's gradient at minus infinity is 0 * inf; only finite ones compare
        keep = torch.isfinite(log_keep)
        for row in results:
            row[4] = torch.where(keep, row[4], 0.0)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("heads", "cuts"), [((4, 2), (0, 7, 8, 20)), ((2, 2), (0, 1, 20))])
def test_queries_of_the_last_tokens_only(heads, cuts, plain):
    """A sequence whose queries are split (as context parallelism does) against the whole."""
    num_heads, num_kv_heads = heads
    inputs = [
        randn(20, 2, num_heads, 8, seed=1),
        randn(20, 2, num_kv_heads, 8, seed=2),
        randn(20, 2, num_kv_heads, 8, seed=3),
        -randn(20, 2, num_kv_heads, seed=4).abs(),
    ]
    weight = randn(20, 2, num_heads, 8, seed=5)

    def attend(q, k, v, log_keep):
        return ops.causal_attention(q, k, v) if plain else ops.training_attention(q, k, v, log_keep)

    def gradients(parts):
        leaves = [x.clone().requires_grad_() for x in inputs]
        q, *keys = leaves
        out = torch.cat([attend(q[a:b], *(x[:b] for x in keys)) for a, b in parts])
        used = leaves[:3] if plain else leaves
        return [out, *torch.autograd.grad((out * weight).sum(), used)]

    whole = gradients([(0, 20)])
    split = gradients(list(itertools.pairwise(cuts)))
    for ours, expected in zip(split, whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_training_attention_gradcheck():
    _, log_keep, _ = random_gates((9, 1, 2))
    inputs = (
        randn(9, 1, 4, 6, seed=1),
        randn(9, 1, 2, 6, seed=2),
        randn(9, 1, 2, 6, seed=3),
        log_keep.clone(),
    )
    inputs = tuple(t.detach().requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(ops.training_attention, inputs)


def test_no_merging_is_plain_attention():
    """All alpha = 0 with the borrowed channel zero is plain causal attention."""
    q, k, v = randn(40, 2, 4, 16, seed=1), randn(40, 2, 2, 16, seed=2), randn(40, 2, 2, 16, seed=3)
    q[..., -1] = 0
    k[..., -1] = 0
    zero = torch.zeros(40, 2, 2, dtype=q.dtype)
    merged_k, merged_v = ops.merge(k, v, zero, torch.rand_like(zero) + 0.1)
    torch.testing.assert_close(merged_k, k, rtol=1e-14, atol=1e-14)
    out = ops.training_attention(q, merged_k, merged_v, zero)
    torch.testing.assert_close(out, ops.causal_attention(q, k, v), rtol=1e-12, atol=1e-12)
    plain = torch.nn.functional.scaled_dot_product_attention(
        *(x.permute(1, 2, 0, 3) for x in (q, k, v)), is_causal=True, enable_gqa=True
    ).permute(2, 0, 1, 3)
    torch.testing.assert_close(out, plain, rtol=1e-12, atol=1e-12)


def test_all_merging_is_one_entry():
    """All alpha = 1: every query sees exactly the running mean, so the output is the mean value."""
    logit = torch.full((20, 1, 2), 7.0, dtype=torch.float64)
    alpha, log_keep, _ = gates.hard_gate(logit)
    k, v = randn(20, 1, 2, 8, seed=1), randn(20, 1, 2, 8, seed=2)
    mk, mv = ops.merge(k, v, alpha, torch.ones_like(alpha))
    out = ops.training_attention(randn(20, 1, 2, 8, seed=3), mk, mv, log_keep)
    mean = v.cumsum(0) / torch.arange(1, 21, dtype=v.dtype)[:, None, None, None]
    torch.testing.assert_close(out, mean, rtol=1e-12, atol=1e-12)


def _peak_saved_elements(num_tokens):
    """Largest tensor that any operator makes in one forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for item in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(item, torch.Tensor):
                    self.size = max(self.size, item.untyped_storage().nbytes())
            return out

    shape = (num_tokens, 1, 1)
    k, v = (randn(*shape, 8, seed=s, dtype=torch.float32).requires_grad_() for s in (1, 2))
    q = randn(*shape, 8, seed=3, dtype=torch.float32).requires_grad_()
    with Largest() as largest:
        alpha, log_keep, _ = random_gates(shape, dtype=torch.float32)
        mk, mv = ops.merge(k, v, alpha, torch.ones_like(alpha))
        ops.training_attention(q, mk, mv, log_keep).sum().backward()
    return largest.size


def test_memory_is_linear_in_tokens():
    small, large = _peak_saved_elements(1024), _peak_saved_elements(4096)
    assert large <= 4.5 * small, (small, large)
    assert large < 4096 * 4096, "a T x T tensor was made"


def test_half_precision_within_twice_the_yardstick():
    """Error against float32 at most twice that of an honest bfloat16 dense version."""
    shape = (64, 2, 2)
    alpha, log_keep, _ = random_gates(shape, dtype=torch.float32)
    k, v = randn(*shape, 32, seed=1).float(), randn(*shape, 32, seed=2).float()
    q = randn(64, 2, 4, 32, seed=3).float()
    exact = reference.training_attention(q, k, v, log_keep)
    half = [x.bfloat16() for x in (q, k, v)]
    ours = ops.training_attention(*half, log_keep).float()
    naive = reference.training_attention(*half, log_keep.bfloat16()).float()
    assert (ours - exact).abs().max() <= 2 * (naive - exact).abs().max()


def test_hard_decision_is_one_function_in_every_dtype():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        k = torch.linspace(4.5, 5.5, 4001, dtype=torch.float64).to(dtype)[:, None, None, None]
        logit = gates.decision_logit(k, alpha_offset=5.0)
        training = gates.hard_gate(logit)[0].bool()[1:]
        assert torch.equal(training, (k.float()[..., 0] > 5.0)[1:])
        assert torch.equal(training, gates.hard_decisions(logit)[1:])


def test_straight_through_and_first_token():
    logit = randn(50, 2, 3, seed=0).requires_grad_()
    alpha, log_keep, alpha_hat = gates.soft_gate(logit, None, temperature=0.1)
    assert set(alpha_hat.detach().unique().tolist()) == {0.0, 1.0}
    assert (alpha[0] == 0).all() and (log_keep[0] == 0).all() and (alpha_hat[0] == 0).all()
    (hat,) = torch.autograd.grad(alpha_hat.sum(), logit, retain_graph=True)
    (soft,) = torch.autograd.grad(alpha.sum(), logit)
    torch.testing.assert_close(hat, soft)
    torch.testing.assert_close(log_keep.exp(), 1 - alpha)


def test_noise_depends_on_global_head_and_sample_only():
    full = gates.logistic_noise(10, 8, seed=1, step=2, samples=[4, 5, 6], layer=3)
    part = gates.logistic_noise(10, 8, seed=1, step=2, samples=[5], layer=3, heads=slice(2, 4))
    torch.testing.assert_close(full[:, 1:2, 2:4], part, rtol=0, atol=0)
    others = [
        gates.logistic_noise(10, 8, seed=s, step=t, samples=[m], layer=la)
        for s, t, m, la in [(2, 2, 4, 3), (1, 3, 4, 3), (1, 2, 5, 3), (1, 2, 4, 4)]
    ]
    for other in others:
        assert not torch.equal(other, full[:, :1])
    many = gates.logistic_noise(20000, 4, seed=0, step=0, samples=[0], layer=0)
    assert abs(many.mean().item()) < 0.05
    assert abs(many.var().item() - torch.pi**2 / 3) < 0.1


def test_bad_shapes_are_named():
    x = torch.zeros(3, 1, 2, 4)
    with pytest.raises(ValueError, match="merge_window=-1"):
        ops.merge(x, x, torch.zeros(3, 1, 2), torch.ones(3, 1, 2), merge_window=-1)
    with pytest.raises(ValueError, match="agree"):
        ops.merge(x, x, torch.zeros(3, 1, 1), torch.ones(3, 1, 2))
    with pytest.raises(ValueError, match="multiple"):
        ops.training_attention(torch.zeros(3, 1, 3, 4), x, x, torch.zeros(3, 1, 2))
