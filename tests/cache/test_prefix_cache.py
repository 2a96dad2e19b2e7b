"""Cached prefixes change nothing but the work: same tokens, shared pages, none lost."""

import random

import pytest
import torch
from tiny_gpt import G, L, V, check_idle, dmc_config, drain, greedy_params, make_engine

from megatron_dmc import SamplingParams
from megatron_dmc.cache import extend_keys
from megatron_dmc.errors import UnsupportedConfig

BLOCK = 6


def cached_engine(merge_window=0, merge_delay=0, evicts=False, **sizes):
    dmc = None if merge_window is None else dmc_config(merge_window, merge_delay=merge_delay)
    if evicts:
        dmc = dmc_config(policy="evict", eviction_delay=3)
    return make_engine(dmc, enable_prefix_caching=True, prefix_block_size=BLOCK, **sizes)


def families(seed, count):
    """Prompts of which many share their beginnings."""
    rng = random.Random(seed)
    trunks = [[rng.randrange(V) for _ in range(30)] for _ in range(2)]
    return [
        rng.choice(trunks)[: rng.randint(1, 30)] + [rng.randrange(V)] * rng.randint(1, 4)
        for _ in range(count)
    ]


def run(engine, prompts, *, pause):
    finished = {}
    for i, prompt in enumerate(prompts):
        params = greedy_params(7, logprobs=0) if i % 2 else SamplingParams(max_tokens=7, seed=i)
        engine.add_request(str(i), prompt, params)
        if i % pause == 0:
            for output in engine.step():
                if output.finished:
                    finished[output.request_id] = output
            engine.check_integrity()
    return drain(engine, finished)


@pytest.mark.parametrize("rule", [(None, 0), (0, 0), (3, 0), (0, 4), (3, 8), (0, 0, True)], ids=str)
@pytest.mark.parametrize(
    "sizes", [{}, {"max_num_batched_tokens": 9}, {"num_pages": 72}], ids=["plenty", "chunks", "few"]
)
def test_outputs_are_those_without_a_cache(rule, sizes):
    prompts = families(seed=1, count=16)
    engine = cached_engine(*rule, **sizes)
    plain = cached_engine(*rule)
    plain.context.prefixes = None
    got, want = run(engine, prompts, pause=3), run(plain, prompts, pause=1)
    for i in want:
        assert got[i].outputs[0].token_ids == want[i].outputs[0].token_ids
        # the entries of a request are its own, however it came by them
        assert got[i].metrics.num_entries == want[i].metrics.num_entries
        if got[i].outputs[0].logprobs is not None:
            a, b = (x[i].outputs[0].cumulative_logprob for x in (got, want))
            assert abs(a - b) < 1e-10
    stats = engine.stats()
    assert stats.num_prefix_queried_tokens == sum(map(len, prompts))
    assert stats.num_prefix_hit_tokens == sum(
        o.metrics.num_cached_prompt_tokens for o in got.values()
    )
    assert stats.num_prefix_hit_tokens > 0
    if sizes.get("num_pages"):
        assert stats.num_reclaimed_prefixes > 0
    else:
        assert stats.prefix_hit_rate > 0.3
    check_idle(engine)
    assert stats.num_cached_pages == engine.context.pool.num_held
    engine.context.prefixes.clear()
    assert engine.context.pool.num_held == 0
    engine.check_integrity()


def test_full_pages_are_shared_and_the_open_ones_copied():
    engine = cached_engine()
    prompt = families(seed=2, count=1)[0][:1] + list(range(4, 30))
    engine.add_request("a", prompt, greedy_params(20))
    engine.step()
    cached = len(prompt) - 1 - (len(prompt) - 1) % BLOCK
    before = engine.stats()
    engine.add_request("b", prompt, greedy_params(20))
    engine.step()
    after = engine.stats()
    a, b = torch.tensor(engine.lengths("a")), torch.tensor(engine.lengths("b"))
    assert engine._requests["b"].metrics.num_cached_prompt_tokens == cached
    rows = [engine._requests[i].row for i in ("a", "b")]
    tables = engine.context.tables.page_ids_LRGM
    same = (tables[:, rows[0]] == tables[:, rows[1]]) & (tables[:, rows[0]] >= 0)
    # b has the open entry's page of the boundary, and what follows, to itself
    snapshot = engine.context.prefixes.find(engine._requests["b"].prefix_keys[: cached // BLOCK])
    assert torch.equal(same.sum(-1), torch.tensor((snapshot.entries_KLG[0] - 1) // 4))
    assert same.sum() > 0
    pages = lambda entries: int((-(-entries // 4)).sum())
    assert after.num_pages_in_use == pages(a) + pages(b) - int(same.sum())
    assert before.num_cached_prefixes == len(prompt) // BLOCK
    engine.check_integrity()


def test_a_conversation_goes_on_from_its_generated_tokens():
    engine = cached_engine()
    first = list(range(4, 16))
    engine.add_request("a", first, greedy_params(15))
    reply = drain(engine)["a"].outputs[0].token_ids
    turn = first + reply + [9, 8, 7]
    engine.add_request("b", turn, greedy_params(6))
    output = drain(engine)["b"]
    known = len(first) + len(reply) - 1  # the last token never entered the cache
    assert output.metrics.num_cached_prompt_tokens == known - known % BLOCK
    assert output.outputs[0].token_ids == engine.runner.model.greedy(turn, 6)


def test_least_recently_used_prefix_goes_first():
    # a prompt of 7 tokens: one snapshot of one page a head, and two pages a head while running
    engine = cached_engine(None, num_pages=6 * L * G, max_num_seqs=1)
    a, b, c = ([x] * (BLOCK + 1) for x in (4, 5, 6))
    for i, (prompt, hit) in enumerate([(a, 0), (b, 0), (a, BLOCK), (c, 0), (a, BLOCK), (b, 0)]):
        engine.add_request(str(i), prompt, greedy_params(1))
        assert drain(engine)[str(i)].metrics.num_cached_prompt_tokens == hit, i
    assert engine.stats().num_reclaimed_prefixes >= 1


@pytest.mark.parametrize("start,cached", [(1, 0), (BLOCK, 0), (2 * BLOCK + 1, 2 * BLOCK)])
def test_prompt_logprobs_compute_the_prompt_from_where_they_are_wanted(start, cached):
    engine = cached_engine()
    prompt = list(range(4, 24))
    rows = []
    for i, hit in (("a", 0), ("b", cached)):
        params = greedy_params(1, prompt_logprobs=0, prompt_logprobs_start=start)
        engine.add_request(i, prompt, params)
        output = drain(engine)[i]
        assert output.metrics.num_cached_prompt_tokens == hit
        rows.append(output.prompt_logprobs)
    assert len(rows[0]) == len(rows[1]) == len(prompt)
    for t in range(start, len(prompt)):
        a, b = rows[0][t][prompt[t]], rows[1][t][prompt[t]]
        assert a.rank == b.rank and abs(a.logprob - b.logprob) < 1e-10


def test_keys_are_chained():
    a, b = [], []
    extend_keys(a, [1, 2, 3, 4, 5], 2)
    extend_keys(b, [9, 2, 3, 4], 2)
    assert len(a) == len(b) == 2 and not set(a) & set(b)
    before = list(a)
    extend_keys(a, [5, 6], 2)  # only what follows the named blocks
    assert a[:2] == before and len(a) == 3
    with pytest.raises(UnsupportedConfig, match="prefix_block_size=0"):
        cached_engine().config.__class__(max_model_len=8, num_pages=8, prefix_block_size=0)
