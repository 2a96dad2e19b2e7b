"""Dynamic Memory Sparsification: training attention and the cache's slots against the dense formula."""

import itertools

import pytest
import torch
from test_ops import randn, random_gates
from tiny_gpt import check_idle, dmc_config, drain, greedy_params, make_engine, make_prompts

from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.ops import reference
from megatron_dmc.ops.gates import zero_borrowed_channel
from megatron_dmc.ops.paged.chunks import Chunks
from megatron_dmc.ops.paged.decode import gate_and_append, paged_decode_attention
from megatron_dmc.ops.paged.delayed import prefill_delayed
from megatron_dmc.ops.paged.layer_cache import DelayedDecisions, LayerCache
from megatron_dmc.ops.rope import cosine_and_sine
from megatron_dmc.ops.training.delayed import eviction_attention


def inputs_of(num_tokens, heads=(4, 2), *, hard=False, dim=8):
    n, g = heads
    _, log_keep, _ = random_gates((num_tokens, 2, g), hard=hard)
    return [
        randn(num_tokens, 2, n, dim, seed=1),
        randn(num_tokens, 2, g, dim, seed=2),
        randn(num_tokens, 2, g, dim, seed=3),
        log_keep,
    ]


def out_and_gradients(op, inputs, weight):
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = op(*leaves)
    return [out, *torch.autograd.grad((out * weight).sum(), leaves)]


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("delay", [0, 1, 4, 16, 40])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 33])
def test_training_attention_equals_dense_with_gradients(heads, delay, num_tokens):
    for hard in (False, True):
        inputs = inputs_of(num_tokens, heads, hard=hard)
        weight = randn(*inputs[0].shape, seed=4)
        ours, theirs = (
            out_and_gradients(lambda *x, op=op: op(*x, delay=delay), inputs, weight)
            for op in (eviction_attention, reference.eviction_attention)
        )
        if (
            hard
        ):  # the dense formula's gradient at minus infinity is 0 * inf; only finite ones compare
            keep = torch.isfinite(inputs[3])
            for row in (ours, theirs):
                row[4] = torch.where(keep, row[4], 0.0)
        for got, want in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        assert delay >= num_tokens - 1 or hard or ours[4].abs().max() > 0


@pytest.mark.parametrize("delay", [0, 3, 9])
@pytest.mark.parametrize("cuts", [(0, 7, 8, 30), (0, 1, 30), (0, 15, 22, 30)])
def test_queries_of_the_last_tokens_only(delay, cuts):
    """A sequence whose queries are split (as context parallelism does) against the whole."""
    inputs = inputs_of(30)
    weight = randn(*inputs[0].shape, seed=5)

    def split(parts):
        def attend(q, *keys):
            return torch.cat(
                [eviction_attention(q[a:b], *(x[:b] for x in keys), delay=delay) for a, b in parts]
            )

        return out_and_gradients(attend, inputs, weight)

    for got, want in zip(split(list(itertools.pairwise(cuts))), split([(0, 30)]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_memory_is_linear_in_tokens():
    """No T x T tensor: the largest holds a query's scores of two bands."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    num_tokens, dim = 8192, 8
    q = torch.randn(num_tokens, 1, 1, dim, requires_grad=True)
    k, v = (torch.randn(num_tokens, 1, 1, dim) for _ in range(2))
    log_keep = -torch.rand(num_tokens, 1, 1)
    with Watch():
        eviction_attention(q, k, v, log_keep, delay=100).sum().backward()
    assert 0 < largest <= 2 * (num_tokens + 101) * 101 < num_tokens**2 / 10


G, N, D, PAGE_SIZE, ROWS, SCALE = 3, 6, 8, 4, 3, 0.4


def make_cache(longest, delay):
    """One layer's cache of a few requests, all pages given out beforehand, NaN where nothing is."""
    width = -(-longest // PAGE_SIZE)
    pages = torch.randperm(ROWS * G * width, generator=torch.Generator().manual_seed(1))
    shape = (ROWS * G * width, PAGE_SIZE, D)
    return LayerCache(
        torch.full(shape, float("nan"), dtype=torch.float64),
        torch.full(shape, float("nan"), dtype=torch.float64),
        pages.view(ROWS, G, width).int(),
        torch.zeros(ROWS, G, dtype=torch.int64),
        delayed=DelayedDecisions(torch.ones(ROWS, G, delay + 1, dtype=torch.bool), None),
    )


def sequence(length, seed):
    evict = torch.rand(length, G, generator=torch.Generator().manual_seed(seed)) < 0.7
    freqs = torch.arange(length)[:, None] * 10.0 ** -torch.arange(D // 2)
    freqs = torch.cat([freqs, freqs], dim=-1).double()
    q, k, v = (randn(length, h, D, seed=10 * seed + i) for i, h in enumerate((N, G, G)))
    return q, k, v, evict, freqs


def dense(q, k, v, evict, freqs, delay):
    alpha = evict.double()
    alpha[0] = 0
    log_keep = torch.zeros_like(alpha).masked_fill(alpha > 0, float("-inf"))[:, None]
    q, k = (reference.rotate(zero_borrowed_channel(x), freqs) for x in (q, k))
    out = reference.eviction_attention(
        q[:, None], k[:, None], v[:, None], log_keep, delay=delay, softmax_scale=SCALE
    )
    return out[:, 0]


def entries_of(evict, delay):
    """Entries of each head when the whole sequence is in: one for each token whose forerunner stayed."""
    leaves = torch.cat([evict[1:], torch.zeros_like(evict[:1])])
    return evict.shape[0] - leaves[: max(0, evict.shape[0] - delay - 1)].sum(0)


@pytest.mark.parametrize("delay", [0, 1, 3, 20])
@pytest.mark.parametrize("chunks", [[37], [1] * 37, [5, 1, 20, 11], [16, 21]])
def test_prefill_in_chunks_then_ragged_decode_equals_dense(delay, chunks):
    lengths = [37, 9, 1]  # the first row in chunks; the others at once
    new = 12
    cache = make_cache(max(lengths) + new, delay)
    sequences = [sequence(length + new, seed) for seed, length in enumerate(lengths, start=1)]
    outs, freqs = [], sequences[0][4]
    for row, (length, (q, k, v, evict, _)) in enumerate(zip(lengths, sequences, strict=True)):
        parts, at = [], 0
        for size in chunks if row == 0 else [length]:
            span = slice(at, at + size)
            parts.append(
                prefill_delayed(
                    cache, Chunks.of([row], [size], "cpu", starts=[at]), q[span], k[span], v[span],
                    (evict[span], torch.ones_like(evict[span]).double()), freqs,
                    softmax_scale=SCALE,
                )
            )  # fmt: skip
            at += size
        outs.append(parts)
    order = torch.tensor([2, 0, 1])
    angles = cosine_and_sine(freqs, torch.float64)
    for step in range(new):
        at = torch.tensor([lengths[r] + step for r in order])
        q, k, v, evict = (
            torch.stack([sequences[r][i][lengths[r] + step] for r in order]) for i in range(4)
        )
        q = gate_and_append(
            cache, order, q, k, v, angles, at, alpha_offset=5.0,
            gates_BG=(evict, torch.ones_like(evict).double()),
        )  # fmt: skip
        out = paged_decode_attention(cache, order, q, softmax_scale=SCALE)
        for b, row in enumerate(order):
            outs[row].append(out[b : b + 1])
    for row, inputs in enumerate(sequences):
        torch.testing.assert_close(torch.cat(outs[row]), dense(*inputs, delay), rtol=0, atol=1e-12)
        assert torch.equal(cache.num_entries_RG[row], entries_of(inputs[3], delay))
        assert delay > 3 or (cache.num_entries_RG[row] < 0.7 * inputs[3].shape[0]).any()


@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize("budget", [1, 7, 64])
def test_engine_gives_the_full_forwards_tokens(delay, budget):
    """Ragged requests in a pool that is short: chunks, preemption, pages freed at the end."""
    engine = make_engine(
        dmc_config(policy="evict", eviction_delay=delay),
        num_pages=36,
        max_num_batched_tokens=budget,
    )
    prompts = make_prompts(9, seed=5)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy_params(14))
    outputs = drain(engine)
    for i, prompt in enumerate(prompts):
        assert outputs[str(i)].outputs[0].token_ids == engine.runner.model.greedy(prompt, 14)
    stats = engine.stats()
    assert stats.num_preemptions > 0 or budget == 1
    assert 1.05 < stats.measured_cr
    check_idle(engine)


def test_entries_are_those_of_the_tokens_that_stayed():
    engine = make_engine(dmc_config(policy="evict", eviction_delay=2))
    (prompt,) = make_prompts(1, seed=3)
    engine.add_request("x", prompt, greedy_params(20))
    output = drain(engine)["x"]
    cached = [*prompt, *output.outputs[0].token_ids][:-1]
    _, decisions_LTG = engine.runner.model.full_forward(cached)
    want = [entries_of(layer.bool(), 2).sum() for layer in decisions_LTG]
    assert output.metrics.num_entries == sum(want)
    assert len(cached) / 2 < output.metrics.num_entries / 4 < len(cached)


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_8_bit_pages_with_any_chunks(kv_cache_dtype):
    """A token stays as it was stored first."""
    results = []
    for budget in (1, 7, 64):
        engine = make_engine(
            dmc_config(policy="evict", eviction_delay=2), kv_cache_dtype=kv_cache_dtype,
            max_num_batched_tokens=budget,
        )  # fmt: skip
        for i, prompt in enumerate(make_prompts(4, seed=6)):
            engine.add_request(str(i), prompt, greedy_params(10))
        outputs = drain(engine)
        results.append({
            i: (o.outputs[0].token_ids, o.metrics.num_entries) for i, o in outputs.items()
        })  # fmt: skip
    assert results[0] == results[1] == results[2]


def test_cached_prefixes_need_rings_of_whole_pages():
    wanted = r"enable_prefix_caching=True.*3 tokens.*\(--dmc-eviction-delay plus 1\).*block_size=4"
    with pytest.raises(UnsupportedConfig, match=wanted):
        make_engine(dmc_config(policy="evict", eviction_delay=2), enable_prefix_caching=True)
