"""Sampling: transformers' definitions, numbers of seed and position alone, and rules of single requests."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gpt import Letters, V, dmc_config, drain, greedy_params, make_engine, make_prompts
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megatron_dmc import SamplingParams
from megatron_dmc.engine import sampler
from megatron_dmc.engine.counter_rng import mix_seeds, uniforms
from megatron_dmc.engine.logit_rules import penalised
from megatron_dmc.engine.sampler import Sampler, truncate
from megatron_dmc.errors import InvalidRequest
from megatron_dmc.ops.gates import mix_seed


def test_draws_are_the_hash_of_seed_and_position():
    seeds = [0, 1, 7, mix_seed(-5), 2**63 - 1]
    positions = [0, 1, 2, 1000, 12345]
    rows = [(s, p) for s in seeds for p in positions]
    seed_B, position_B = torch.tensor(rows).unbind(1)
    assert mix_seeds(seed_B, position_B).tolist() == [mix_seed(s, p) for s, p in rows]
    u = uniforms(torch.full((20_000,), 3), torch.arange(20_000))
    assert 0 <= u.min() < 1e-3 and 1 - 1e-3 < u.max() < 1
    assert (torch.histc(u, 10, 0, 1) / 2000 - 1).abs().max() < 0.1
    assert torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1].abs() < 0.03


def warped(scores_BV, top_k, top_p, min_p):
    """The result of transformers."""
    warpers = LogitsProcessorList()
    if top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        warpers.append(MinPLogitsWarper(min_p))
    return warpers(None, scores_BV)


def test_truncation_is_transformers():
    generator = torch.Generator().manual_seed(0)
    scores = 3 * torch.randn(200, 50, generator=generator, dtype=torch.float64)
    scores[:20] = scores[:20].round()  # ties
    scores[20:40, ::3] = float("-inf")  # tokens that are not allowed
    top_k = torch.randint(-1, 60, (200,), generator=generator)
    top_p = torch.rand(200, generator=generator, dtype=torch.float64).clamp(0.01, 1)
    min_p = torch.rand(200, generator=generator, dtype=torch.float64) * 0.3
    top_p[::5], min_p[::3] = 1.0, 0.0
    few = [b for b in range(200) if 0 < top_k[b] <= 20]
    for rows, most in (range(200), 50), (few, 20), (few, 50):
        cut = [x[list(rows)] for x in (top_k, top_p, min_p)]
        got, is_done = truncate(scores[list(rows)], *cut, most=most)
        assert is_done.all()
        for b, kept in zip(rows, got, strict=True):
            want = warped(scores[b : b + 1], int(top_k[b]), float(top_p[b]), float(min_p[b]))[0]
            if b < 20:  # of equal tokens at the edge of top-p, all stay
                least = want[want > float("-inf")].min()
                want = scores[b].masked_fill(scores[b] < least, float("-inf"))
            assert torch.equal(kept, want), b


def test_truncation_sorts_only_where_the_likely_tokens_do_not_suffice(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    sizes = [1, 4, 30, 0.01] * 16
    scores = torch.tensor(sizes)[:, None] * torch.randn(64, 3000, generator=generator)
    scores[:16] = scores[:16].round()  # ties
    scores[16:24, 5:] = float("-inf")  # few tokens are allowed
    scores[24:28] = 0.5
    top_k = torch.randint(-1, 3100, (64,), generator=generator)
    top_k[::2] = 0
    top_p = torch.rand(64, generator=generator, dtype=torch.float64).clamp(0.01, 1)
    min_p = 0.2 * torch.rand(64, generator=generator, dtype=torch.float64)
    top_p[::5], min_p[::3] = 1.0, 0.0
    want, _ = truncate(scores, top_k, top_p, min_p, most=3000)
    got = scores.clone()
    draws = SimpleNamespace(top_k_B=top_k, top_p_B=top_p, min_p_B=min_p, kernels=None)
    draws.by_widths = [([1024, 3000], torch.arange(64))]
    sizes = []
    few = lambda scores, *rest, most: (
        sizes.append(len(scores)) or truncate(scores, *rest, most=most)
    )
    monkeypatch.setattr(sampler, "truncate", few)
    sampler.truncate_in_order(got, draws)
    assert torch.equal(got, want)
    first, again = sizes
    assert first == 64 and 0 < again < 48


def test_penalties_are_their_definitions():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(4, 30, generator=generator, dtype=torch.float64)
    prompt = torch.randint(0, 30, (4, 6), generator=generator)
    output = torch.randint(0, 30, (4, 9), generator=generator)
    counts = torch.zeros(4, 30, dtype=torch.float64).scatter_add_(
        1, output, torch.ones(4, 9, dtype=torch.float64)
    )
    known = (counts > 0).scatter(1, prompt, True)
    none, some = torch.zeros(4, 1), torch.tensor([[1.0], [1.7], [0.5], [9.0]])
    for b in range(4):
        want = RepetitionPenaltyLogitsProcessor(float(some[b]))(
            torch.cat([prompt[b], output[b]])[None], scores[b : b + 1]
        )
        got = penalised(scores, counts, known, some, none, none)
        torch.testing.assert_close(got[b : b + 1], want)
    got = penalised(scores, counts, known, none + 1, none + 0.5, none - 0.25)
    for b in range(4):
        for v in range(30):
            times = output[b].tolist().count(v)
            assert got[b, v] == pytest.approx(scores[b, v] - 0.5 * times + 0.25 * (times > 0))


def run(params, prompt, **sizes):
    engine = make_engine(dmc_config(), tokenizer=Letters(), eos_id=1, **sizes)
    engine.add_request("x", prompt, params)
    return drain(engine)["x"].outputs[0]


def test_rules_do_what_they_say():
    prompt = make_prompts(1, seed=6)[0]
    plain = run(greedy_params(12, ignore_eos=True), prompt).token_ids
    for rule in ({"logit_bias": {9: 100.0}}, {"allowed_token_ids": [9]}):
        assert run(greedy_params(5, **rule), prompt).token_ids == [9] * 5
    biased = run(greedy_params(12, ignore_eos=True, logit_bias={plain[0]: -100}), prompt)
    assert plain[0] not in biased.token_ids
    # every token once, before any twice
    params = greedy_params(V, ignore_eos=True, presence_penalty=2, frequency_penalty=2,
                           repetition_penalty=100, logit_bias={i: 50 for i in range(V)})  # fmt: skip
    distinct = run(params, prompt[:1]).token_ids
    assert len(set(distinct[: V - 1])) > len(set(plain)) and len(set(distinct)) >= V - 1
    # a favoured end-of-text token waits for min_tokens
    for n in (0, 4):
        completion = run(greedy_params(12, logit_bias={1: 100.0}, min_tokens=n), prompt)
        assert completion.token_ids.index(1) == n and completion.finish_reason == "stop"
    stop = greedy_params(12, allowed_token_ids=[7, 8], stop_token_ids=[7, 8], min_tokens=3)
    assert len(run(stop, prompt).token_ids) == 1, "where nothing is left the rule gives way"
    text = run(greedy_params(6, allowed_token_ids=[9], stop=["f"], min_tokens=3), prompt)
    assert (text.token_ids, text.stop_reason) == ([9] * 4, "f")


class Words(Letters):
    """The letters, and a space that is nothing."""

    def encode(self, text):
        return super().encode(text.strip())


def test_bad_words_are_not_made():
    prompt = make_prompts(1, seed=8)[0]

    def complete(**kwargs):
        engine = make_engine(None, tokenizer=Words())
        params = greedy_params(14, ignore_eos=True, allowed_token_ids=list(range(4, 30)), **kwargs)
        engine.add_request("x", prompt, params)
        return drain(engine)["x"].outputs[0].text

    text = complete()
    one, two = text[3], text[5:7]
    changed = complete(bad_words=[one, two])
    assert one in text and two in text and one not in changed and two not in changed
    with pytest.raises(InvalidRequest, match="bad_words=.*needs a tokenizer"):
        make_engine(None).add_request("x", [4], SamplingParams(bad_words=["a"]))


rules = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 1e-4, 0.5, 1.0, 3.0])},
    optional={
        "top_k": st.integers(-1, V + 3),
        "top_p": st.floats(0.01, 1),
        "min_p": st.floats(0, 1),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.01, 100),
        "logit_bias": st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100), max_size=5),
        "allowed_token_ids": st.lists(st.integers(0, V - 1), min_size=1, max_size=6),
        "bad_words": st.lists(st.text("abcdef", min_size=1, max_size=2), max_size=3),
        "min_tokens": st.integers(0, 6),
        "seed": st.integers(-(2**63), 2**63 - 1),
    },
)


@settings(max_examples=25, deadline=None)
@given(asked=st.lists(rules, min_size=2, max_size=5), num_pages=st.sampled_from([34, 400]))
def test_any_rules_give_the_same_tokens_in_any_batch(asked, num_pages):
    """Also where pages are so few that requests are preempted and computed again."""
    prompts = make_prompts(5, seed=11, longest=6)
    params = [SamplingParams(max_tokens=9, **{"seed": i} | a) for i, a in enumerate(asked)]
    alone = [run(p, prompt).token_ids for p, prompt in zip(params, prompts, strict=False)]
    engine = make_engine(
        dmc_config(), tokenizer=Letters(), eos_id=1, num_pages=num_pages, max_num_batched_tokens=6
    )
    for i in reversed(range(len(params))):
        engine.add_request(str(i), prompts[i], params[i])
    outputs = drain(engine)
    assert [outputs[str(i)].outputs[0].token_ids for i in range(len(params))] == alone
    for p, tokens in zip(params, alone, strict=True):
        assert p.allowed_token_ids is None or set(tokens) <= set(p.allowed_token_ids)
    assert not engine.sampler._rules._states, "ended requests leave nothing behind"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_extreme_logits_and_parameters(dtype):
    """A token within the vocabulary that is not cut off, whatever the numbers."""
    params = SamplingParams(temperature=1e-5, top_p=1e-9, min_p=1.0, top_k=1, repetition_penalty=0.01,
                            logit_bias={0: -100.0}, presence_penalty=-2.0)  # fmt: skip
    logits = torch.tensor([[1e30, 1e30, -1e30, 0.0], [0.0] * 4, [-1e-30, 1e-30, 0.0, 0.0]]).to(
        dtype
    )
    requests = [
        SimpleNamespace(number=b, params=params, prompt_token_ids=[1], output_token_ids=[2] * b,
                        num_output_tokens=b, bad_words_token_ids=[])
        for b in range(3)
    ]  # fmt: skip
    tokens = [s for s in Sampler().sample(logits, requests).read()]
    assert all(0 <= t < 4 for t in tokens) and tokens[1] != 0


@pytest.mark.parametrize(
    "field, value",
    [
        ("presence_penalty", 2.1), ("frequency_penalty", float("nan")), ("repetition_penalty", 0),
        ("repetition_penalty", "1"), ("logit_bias", {1: 101}), ("logit_bias", {-1: 1}),
        ("logit_bias", [1]), ("allowed_token_ids", []), ("allowed_token_ids", [1.5]),
        ("bad_words", [" "]), ("min_tokens", -1), ("min_tokens", 17),
    ],
)  # fmt: skip
def test_wrong_rules_name_the_field(field, value):
    with pytest.raises(InvalidRequest, match=f"SamplingParams: {field}="):
        SamplingParams(**{field: value})


def test_tokens_outside_the_vocabulary_are_refused():
    engine = make_engine(None)
    for rule in ({"logit_bias": {V: 1}}, {"allowed_token_ids": [1, V]}):
        with pytest.raises(InvalidRequest, match=f"token id {V} is not in the model's vocabulary"):
            engine.add_request("x", [4], SamplingParams(**rule))
    assert not engine.has_unfinished_requests
