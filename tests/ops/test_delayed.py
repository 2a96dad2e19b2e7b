"""Merging with a delay: training attention against the dense formula, that against the definition, and
the engine against both."""

import itertools

import pytest
import torch
from test_ops import randn, random_gates
from tiny_gpt import check_idle, dmc_config, drain, greedy_params, make_engine, make_prompts

from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.ops import delayed_attention, merge, reference, training_attention


def inputs_of(num_tokens, heads=(4, 2), *, hard=False, dim=8):
    n, g = heads
    alpha, log_keep, _ = random_gates((num_tokens, 2, g), hard=hard)
    q, k, v = (randn(num_tokens, 2, h, dim, seed=s) for s, h in ((1, n), (2, g), (3, g)))
    omega = torch.rand(num_tokens, 2, g, dtype=q.dtype, generator=torch.Generator().manual_seed(4))
    merged_k, merged_v = merge(k, v, alpha, 0.1 + omega)
    return [q, k, v, merged_k, merged_v, log_keep]


def out_and_gradients(op, inputs, weight):
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = op(*leaves)
    grads = torch.autograd.grad((out * weight).sum(), leaves, allow_unused=True)
    return [
        out,
        *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)),
    ]


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("delay", [0, 1, 4, 16, 40])
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 33])
def test_equals_the_dense_formula_with_gradients(heads, delay, num_tokens):
    for hard in (False, True):
        inputs = inputs_of(num_tokens, heads, hard=hard)
        weight = randn(*inputs[0].shape, seed=5)
        ours, theirs = (
            out_and_gradients(lambda *x, op=op: op(*x, merge_delay=delay), inputs, weight)
            for op in (delayed_attention, reference.delayed_attention)
        )
        if hard:  # the dense formula's gradient at minus infinity is 0 * inf
            keep = torch.isfinite(inputs[5])
            for row in (ours, theirs):
                row[6] = torch.where(keep, row[6], 0.0)
        for got, want in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        assert num_tokens <= delay + 1 or hard or ours[6].abs().max() > 0
        assert num_tokens <= delay or ours[5].abs().max() > 0


@pytest.mark.parametrize("delay", [1, 3, 9])
@pytest.mark.parametrize("cuts", [(0, 7, 8, 30), (0, 1, 30), (0, 15, 22, 30)])
def test_queries_of_the_last_tokens_only(delay, cuts):
    """A sequence whose queries are split, as by context parallelism, against the whole."""
    inputs = inputs_of(30)
    weight = randn(*inputs[0].shape, seed=6)

    def split(parts):
        def attend(q, *keys):
            outs = [
                delayed_attention(q[a:b], *(x[:b] for x in keys), merge_delay=delay)
                for a, b in parts
            ]
            return torch.cat(outs)

        return out_and_gradients(attend, inputs, weight)

    for got, want in zip(split(list(itertools.pairwise(cuts))), split([(0, 30)]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("delay", [0, 1, 3, 8])
def test_dense_formula_is_the_definition(delay):
    """With hard decisions, by brute force: a query's keys are the raw tokens and the entries, each made
    from nothing of the tokens that its segment holds by then."""
    num_tokens, dim = 14, 6
    q, k, v, _, _, log_keep = inputs_of(num_tokens, (2, 1), hard=True, dim=dim)
    omega = 0.2 + torch.rand(num_tokens, dtype=q.dtype, generator=torch.Generator().manual_seed(7))
    is_merge = torch.isinf(log_keep[:, 0, 0])
    is_merge[0] = False
    alpha = is_merge.to(q.dtype)[:, None, None].expand(-1, 2, 1)
    merged = merge(k, v, alpha, omega[:, None, None].expand(-1, 2, 1))
    log_keep = torch.where(is_merge, float("-inf"), 0.0).to(q.dtype)[:, None, None].expand(-1, 2, 1)
    out = reference.delayed_attention(q, k, v, *merged, log_keep, merge_delay=delay)
    for i in range(num_tokens):
        segments: list[list[int]] = []
        for t in range(i - delay + 1):
            if is_merge[t]:
                segments[-1].append(t)
            else:
                segments.append([t])
        for n, b in itertools.product(range(2), range(2)):
            rows = [[j] for j in range(max(0, i - delay + 1), i + 1)] + segments
            mean = [(omega[s, None] / omega[s].sum()) for s in rows]
            keys = torch.stack([(w * k[s, b, 0]).sum(0) for w, s in zip(mean, rows, strict=True)])
            values = torch.stack([(w * v[s, b, 0]).sum(0) for w, s in zip(mean, rows, strict=True)])
            scores = (keys[:, :-1] @ q[i, b, n, :-1]) / dim**0.5
            torch.testing.assert_close(out[i, b, n], scores.softmax(0) @ values)


def test_borrowed_channels_are_ignored():
    inputs = inputs_of(20)
    changed = [x.clone() for x in inputs]
    for x in (*changed[:2], changed[3]):
        x[..., -1] = 100.0 * torch.randn_like(x[..., -1])
    a, b = (delayed_attention(*x, merge_delay=3) for x in (inputs, changed))
    torch.testing.assert_close(a, b)
    for x in changed:
        x.requires_grad_()
    delayed_attention(*changed, merge_delay=3).square().sum().backward()
    for x in (*changed[:2], changed[3]):
        assert (x.grad[..., -1] == 0).all() and x.grad[..., :-1].abs().max() > 0


def test_no_delay_is_training_attention():
    inputs = inputs_of(20)
    q, _, _, merged_k, merged_v, log_keep = inputs
    assert torch.equal(
        delayed_attention(*inputs, merge_delay=0),
        training_attention(q, merged_k, merged_v, log_keep),
    )


def test_errors():
    inputs = inputs_of(8)
    with pytest.raises(ValueError, match="merge_delay=-1"):
        delayed_attention(*inputs, merge_delay=-1)
    with pytest.raises(ValueError, match="same T"):
        delayed_attention(*inputs[:3], inputs[3][:7], *inputs[4:], merge_delay=2)


# --- the engine -------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay,window", [(1, 0), (3, 0), (3, 2), (16, 0)])
@pytest.mark.parametrize("budget", [1, 7, 64])
def test_engine_gives_the_full_forwards_tokens(delay, window, budget):
    """Ragged requests in a pool that is short: chunks, preemption, pages freed at the end."""
    engine = make_engine(
        dmc_config(window, merge_delay=delay), num_pages=40, max_num_batched_tokens=budget
    )
    prompts = make_prompts(9, seed=5)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy_params(14))
    outputs = drain(engine)
    for i, prompt in enumerate(prompts):
        assert outputs[str(i)].outputs[0].token_ids == engine.runner.model.greedy(prompt, 14)
    stats = engine.stats()
    assert stats.num_preemptions > 0 or budget == 1
    assert 1.0 < stats.measured_cr
    check_idle(engine)


def test_slots_are_those_of_the_entries_and_the_ring():
    delay = 3
    engine = make_engine(dmc_config(merge_delay=delay))
    (prompt,) = make_prompts(1, seed=3)
    engine.add_request("x", prompt, greedy_params(20))
    output = drain(engine)["x"]
    cached = [*prompt, *output.outputs[0].token_ids][:-1]
    _, decisions_LTG = engine.runner.model.full_forward(cached)
    merges = decisions_LTG[:, 1 : len(cached) - delay].sum()
    assert output.metrics.num_entries == decisions_LTG[:, :, :].numel() - merges
    assert merges > 0
    # two ratios: over the slots, and by the decisions that are in effect
    stats, left = engine.stats(), decisions_LTG[:, : len(cached) - delay].numel()
    assert stats.num_raw_tokens == delay
    assert stats.measured_cr == decisions_LTG.numel() / output.metrics.num_entries
    assert stats.decided_cr == left / (left - int(merges)) > stats.measured_cr


@pytest.mark.parametrize("kv_cache_dtype", ["int8", "fp8"])
def test_8_bit_pages_with_any_chunks(kv_cache_dtype):
    """A token is seen and merged as the pages hold it, in the chunk that brings it as well."""
    results = []
    for budget in (1, 7, 64):
        engine = make_engine(
            dmc_config(merge_delay=3), kv_cache_dtype=kv_cache_dtype, max_num_batched_tokens=budget
        )
        for i, prompt in enumerate(make_prompts(4, seed=6)):
            engine.add_request(str(i), prompt, greedy_params(10))
        outputs = drain(engine)
        results.append({
            i: (o.outputs[0].token_ids, o.metrics.num_entries) for i, o in outputs.items()
        })  # fmt: skip
    assert results[0] == results[1] == results[2]


def test_without_merging_nothing_waits():
    engine = make_engine(dmc_config(merge_delay=3), enable_dmc=False)
    (prompt,) = make_prompts(1, seed=4)
    engine.add_request("x", prompt, greedy_params(12))
    tokens = drain(engine)["x"].outputs[0].token_ids
    assert tokens == engine.runner.model.greedy(prompt, 12, may_merge=False)


def test_cached_prefixes_need_rings_of_whole_pages():
    wanted = r"enable_prefix_caching=True.*3 tokens.*\(--dmc-merge-delay\).*block_size=4"
    with pytest.raises(UnsupportedConfig, match=wanted):
        make_engine(dmc_config(merge_delay=3), enable_prefix_caching=True)
