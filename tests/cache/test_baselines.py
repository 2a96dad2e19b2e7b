"""Eviction policies in the paged engine against the methods as their papers state them, with dense masks."""

import math
import random

import pytest
import torch
from random_models import VOCAB, random_model
from tiny_gpt import (
    SCALE,
    G,
    L,
    N,
    TinyGPT,
    V,
    check_idle,
    dmc_config,
    drain,
    greedy_params,
    make_engine,
    make_prompts,
)  # fmt: skip

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.cache.strategies.budget import _alike
from megatron_dmc.checkpoint.load import full_forward
from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.ops import reference

POLICIES = ("h2o", "tova", "window")


def evicted(policy, budget, t, alive, weights_so_far, weights_now):
    """The position that goes after token t, by the paper.

    Args:
        alive: positions in the cache of a head, t included.
        weights_so_far: position -> sum of the attention weights it got from the queries up to t.
        weights_now: position -> weight in query t, averaged over the layer.
    """
    if policy == "h2o":
        recent = math.ceil(budget / 2)
        old = [j for j in alive if j <= t - recent]
        return min(old, key=lambda j: weights_so_far[j])
    if policy == "tova":
        return min(alive, key=lambda j: weights_now[j])
    sinks = min(4, budget - 1)
    return min(j for j in alive if j >= sinks)


def dense_attention(q_TND, k_TGD, v_TGD, policy, budget):
    """Row by row over the whole sequence, what was evicted masked out. Also the entries of each head."""
    num_tokens, num_heads, _ = q_TND.shape
    num_kv_heads = k_TGD.shape[1]
    group = num_heads // num_kv_heads
    alive = [set() for _ in range(num_kv_heads)]
    sums = [[0.0] * num_tokens for _ in range(num_kv_heads)]
    out = torch.empty_like(q_TND)
    for t in range(num_tokens):
        rows = []
        for n in range(num_heads):
            g = n // group
            alive[g].add(t)
            mask = torch.full((num_tokens,), -torch.inf, dtype=q_TND.dtype)
            mask[list(alive[g])] = 0.0
            scores = SCALE * (k_TGD[:, g] @ q_TND[t, n]) + mask
            rows.append(scores.softmax(-1))
            out[t, n] = rows[-1] @ v_TGD[:, g]
        mean = torch.stack(rows).mean(0).tolist()
        for g in range(num_kv_heads):
            for row in rows[g * group : (g + 1) * group]:
                sums[g] = [a + b for a, b in zip(sums[g], row.tolist(), strict=True)]
            if len(alive[g]) > budget:
                alive[g].remove(evicted(policy, budget, t, alive[g], sums[g], mean))
    return out, [sorted(positions) for positions in alive]


def dense_forward(model, token_ids, policy, budget):
    """Logits of all positions, and the positions that each head keeps."""
    x, kept = model.embedding[torch.tensor(token_ids)], []
    freqs = model.freqs(len(token_ids))

    def attend(q, k, v):
        q, k = reference.rotate(q, freqs), reference.rotate(k, freqs)
        out, positions = dense_attention(q, k, v, policy, budget)
        kept.append(positions)
        return out

    for i in range(L):
        x = model.layer(i, x, attend)
    return x @ model.output.T, kept


def dense_greedy(model, prompt, count, policy, budget):
    token_ids = list(prompt)
    for _ in range(count):
        token_ids.append(int(dense_forward(model, token_ids, policy, budget)[0][-1].argmax()))
    return token_ids[len(prompt) :]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("budget,chunk", [(1, 32), (5, 32), (6, 5), (11, 3), (11, 32)])
def test_equals_the_dense_method_token_for_token(policy, budget, chunk):
    """Prompts shorter and longer than the budget, in chunks of several sizes, decoded together."""
    engine = make_engine(
        None, cache_policy=policy, cache_budget=budget, max_num_batched_tokens=chunk, block_size=4
    )
    prompts = make_prompts(3, seed=budget, longest=18) + [[1, 2, 3] * 6]
    model = TinyGPT(None)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy_params(5))
    outputs = drain(engine)
    for i, prompt in enumerate(prompts):
        want = dense_greedy(model, prompt, 5, policy, budget)
        assert outputs[str(i)].outputs[0].token_ids == want
        entries = min(len(prompt) + 4, budget)
        assert outputs[str(i)].metrics.num_entries == entries * L * G
    check_idle(engine)


@pytest.mark.parametrize("policy", POLICIES)
def test_log_probabilities_and_what_is_kept(policy):
    budget = 7
    engine = make_engine(None, cache_policy=policy, cache_budget=budget, max_num_batched_tokens=9)
    prompt = make_prompts(4, seed=3)[2] + [5, 6, 7, 8, 9, 10, 11, 12]
    engine.add_request("a", prompt, greedy_params(3, prompt_logprobs=0))
    logits, kept = dense_forward(TinyGPT(None), prompt, policy, budget)
    want = logits.log_softmax(-1)
    while engine.context._chunks or engine._requests["a"].num_computed_tokens < len(prompt):
        engine.step()
    row = engine._requests["a"].row
    held = engine.context.store._position_LRGE[:, row, :, :budget]
    assert held.sort(-1).values.tolist() == kept
    assert kept[0][0] != list(range(len(prompt) - budget, len(prompt))), "a trivial choice"
    output = drain(engine)["a"]
    for t in range(1, len(prompt)):
        assert abs(output.prompt_logprobs[t][prompt[t]].logprob - want[t - 1, prompt[t]]) < 1e-10


@pytest.mark.parametrize("policy", POLICIES)
def test_a_budget_for_everything_is_plain_generation(policy):
    prompts = make_prompts(6, seed=11)
    generated = []
    for sizes in ({}, {"cache_policy": policy, "cache_budget": 40},
                  {"cache_policy": policy, "cache_budget": 64}):  # fmt: skip
        engine = make_engine(None, max_num_batched_tokens=7, **sizes)
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), prompt, greedy_params(12, logprobs=1))
        outputs = drain(engine)
        generated.append([outputs[str(i)] for i in range(6)])
        assert engine.stats().measured_cr == 1.0
    for plain, *others in zip(*generated, strict=True):
        for other in others:
            assert other.outputs[0].token_ids == plain.outputs[0].token_ids
            assert other.outputs[0].cumulative_logprob == pytest.approx(
                plain.outputs[0].cumulative_logprob, abs=1e-9
            )
            assert other.metrics.num_pages == plain.metrics.num_pages


@pytest.mark.parametrize("policy", POLICIES)
def test_pages_stay_within_the_budget_and_are_conserved(policy):
    """Random arrivals, aborts and preemptions; `drain` and `step` check the pages after every step."""
    rng = random.Random(5)
    budget, page_size = 10, 4
    most = -(-budget // page_size) * L * G
    engine = make_engine(
        None, cache_policy=policy, cache_budget=budget, block_size=page_size, max_num_seqs=4,
        num_pages=3 * most - 4, max_num_batched_tokens=11,
    )  # fmt: skip
    # without the budget the longest would need more pages than there are
    for i, prompt in enumerate(make_prompts(9, seed=8, longest=30)):
        engine.add_request(str(i), prompt, greedy_params(20, ignore_eos=True))
    finished = {}
    while engine.has_unfinished_requests:
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
        engine.check_integrity()
        assert int(engine.context.tables.num_entries_LRG.max()) <= budget
        for request in engine.scheduler.running:
            assert (engine.context.tables.page_ids_LRGM[:, request.row] >= 0).sum() <= most
        if rng.random() < 0.02 and engine.scheduler.running:
            engine.abort_request(rng.choice(engine.scheduler.running).request_id)
        if rng.random() < 0.1 and len(engine.scheduler.running) > 1:
            engine.scheduler._preempt_last()
    model = TinyGPT(None)
    assert 3 <= len(finished) < 9 and engine.stats().num_preemptions > 0
    for i in sorted(finished)[:1]:
        prompt = make_prompts(9, seed=8, longest=30)[int(i)]
        want = dense_greedy(model, prompt, 20, policy, budget)
        assert finished[i].outputs[0].token_ids == want
    assert engine.stats().measured_cr > 2
    check_idle(engine)


def test_a_part_of_the_prompt():
    engine = make_engine(None, cache_policy="tova", cache_budget=0.25)
    for i, length in enumerate((1, 9, 40)):
        engine.add_request(str(i), [t % V for t in range(length)], greedy_params(6))
    outputs = drain(engine)
    for i, budget in enumerate((1, 3, 10)):
        assert outputs[str(i)].metrics.num_entries == budget * L * G
    assert outputs["2"].cr == pytest.approx(45 / 10)


@pytest.mark.parametrize("policy", POLICIES)
def test_megatrons_model(policy):
    """The real GPTModel: with room for all its own full forward, with less other tokens, same pages."""
    loaded = random_model(2)
    tokens = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    want = full_forward(loaded.model, torch.tensor([tokens]))[0, :, :VOCAB].log_softmax(-1)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    for budget, same in ((40, True), (8, False)):
        llm = LLM(
            loaded,
            max_num_batched_tokens=16,
            cache_policy=policy,
            cache_budget=budget,
            device="cpu",
        )
        (output,) = llm.generate({"prompt_token_ids": tokens}, params, use_tqdm=False)
        found = [output.prompt_logprobs[t][tokens[t]].logprob for t in range(1, 40)]
        error = max(abs(a - float(want[t, tokens[t + 1]])) for t, a in enumerate(found))
        assert (error < 1e-10) is same
        assert output.cr == 40 / budget


@pytest.mark.parametrize(
    "sizes,named",
    [
        ({"cache_policy": "lru", "cache_budget": 4}, "cache_policy='lru'"),
        ({"cache_policy": "h2o"}, "cache_budget=None"),
        ({"cache_budget": 4}, "cache_policy=None"),
        ({"cache_policy": "h2o", "cache_budget": 0}, "cache_budget=0"),
        ({"cache_policy": "h2o", "cache_budget": 1.5}, "cache_budget=1.5"),
        ({"cache_policy": "h2o", "cache_budget": 4, "enable_prefix_caching": True}, "prefix"),
    ],
)
def test_mistakes(sizes, named):
    with pytest.raises(UnsupportedConfig, match=named):
        make_engine(None, **sizes)


def test_not_beside_merging():
    for enable_dmc in (None, False):
        with pytest.raises(UnsupportedConfig, match="DMC model"):
            make_engine(dmc_config(), cache_policy="h2o", cache_budget=4, enable_dmc=enable_dmc)


def test_groups_of_alike_sizes():
    assert _alike([1, 1, 9, 4, 2, 8]) == [[2, 5], [3, 4], [0, 1]]
    assert N == 2 * G, "the dense method is tested with grouped queries"
