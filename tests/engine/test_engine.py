"""The engine against a full forward over the whole sequence, without a cache."""

from types import SimpleNamespace

import pytest
import torch
from tiny_gpt import (
    MAX_LEN,
    D,
    G,
    H,
    L,
    Letters,
    N,
    TinyGPT,
    V,
    check_idle,
    dmc_config,
    drain,
    greedy_params,
    make_engine,
    make_prompts,
)
from transformers.generation.logits_process import TopKLogitsWarper

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.tokenizer import as_tokenizer
from megatron_dmc.engine.detokenizer import IncrementalDetokenizer, find_stop
from megatron_dmc.errors import InvalidRequest, UnsupportedConfig


@pytest.mark.parametrize("merge_window", [None, 0, 1, 3, 12])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"max_num_batched_tokens": 5, "max_num_seqs": 3},
        {"max_num_batched_tokens": 1},
        {"num_pages": 48, "max_num_batched_tokens": 16},
    ],
    ids=["plenty", "chunks", "one-token", "preemption"],
)
def test_generation_equals_full_forward(merge_window, sizes):
    dmc = None if merge_window is None else dmc_config(merge_window)
    engine = make_engine(dmc, **sizes)
    prompts = make_prompts(6)
    finished = {}
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy_params(9, logprobs=0))
        for output in engine.step():  # arrivals between steps
            if output.finished:
                finished[output.request_id] = output
    finished = drain(engine, finished)
    model = engine.runner.model
    for i, prompt in enumerate(prompts):
        completion = finished[str(i)].outputs[0]
        assert completion.token_ids == model.greedy(prompt, 9)
        assert completion.finish_reason == "length"
        logits, _ = model.full_forward(prompt + completion.token_ids[:-1])
        want = logits[len(prompt) - 1 :].log_softmax(-1)
        want = want.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        got = [
            row[t].logprob for row, t in zip(completion.logprobs, completion.token_ids, strict=True)
        ]
        torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), want, rtol=0, atol=1e-10)
    if "num_pages" in sizes and dmc is None:
        assert engine.stats().num_preemptions > 0
    check_idle(engine)


def test_preemption_happens_and_changes_nothing():
    dmc = dmc_config()
    prompts = make_prompts(5, seed=3, longest=8)
    results = []
    for num_pages in (400, 40):
        engine = make_engine(dmc, num_pages=num_pages)
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), prompt, SamplingParams(max_tokens=20, seed=i))
        outputs = drain(engine)
        results.append([outputs[str(i)].outputs[0].token_ids for i in range(len(prompts))])
        preemptions = engine.stats().num_preemptions
        assert (preemptions > 0) == (num_pages == 40)
        check_idle(engine)
    assert results[0] == results[1]


def test_measured_cr_is_tokens_over_counted_entries():
    engine = make_engine(dmc_config(), max_num_batched_tokens=64)
    prompts = make_prompts(4, seed=1)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy_params(7))
    engine.step()
    running = engine.stats()
    assert running.num_running == 4 and running.seq_tokens == sum(map(len, prompts))
    outputs = drain(engine)
    total_entries = torch.zeros(L, G)
    total_tokens = 0
    for i, prompt in enumerate(prompts):
        cached = prompt + outputs[str(i)].outputs[0].token_ids[:-1]
        _, alpha_LTG = engine.runner.model.full_forward(cached)
        entries = (1 - alpha_LTG).sum(1)
        total_entries += entries
        total_tokens += len(cached)
        assert outputs[str(i)].metrics.num_entries == int(entries.sum())
        assert outputs[str(i)].cr == len(cached) * L * G / entries.sum()
        assert outputs[str(i)].metrics.num_pages == int((entries / 4).ceil().sum())
    stats = engine.stats()
    assert stats.entries_LG == total_entries.long().tolist()
    assert stats.measured_cr == total_tokens * L * G / total_entries.sum()
    assert stats.measured_cr > 1.2  # the test does compress
    assert stats.num_finished == 4 and stats.num_generated_tokens == 28
    assert stats.num_prompt_tokens == sum(map(len, prompts))
    assert stats.num_pages_in_use == 0 < stats.peak_pages_in_use
    assert stats.tokens_per_second > 0


def test_dmc_model_without_merging_appends_every_token():
    engine = make_engine(dmc_config(), enable_dmc=False)
    prompt = make_prompts(1, seed=2)[0]
    engine.add_request("a", prompt, greedy_params(6))
    output = drain(engine)["a"]
    assert output.outputs[0].token_ids == engine.runner.model.greedy(prompt, 6, may_merge=False)
    assert output.cr == 1.0


def test_plain_model_cannot_be_compressed():
    with pytest.raises(UnsupportedConfig, match="enable_dmc=True: the model was not retrofitted"):
        make_engine(None, enable_dmc=True)


@pytest.mark.parametrize("extra", [{}, {"top_k": 5}, {"top_p": 0.7, "min_p": 0.05}])
def test_seeded_sampling_does_not_depend_on_the_batch(extra):
    prompts = make_prompts(5, seed=4)
    alone = []
    for i, prompt in enumerate(prompts):
        engine = make_engine(dmc_config())
        engine.add_request("x", prompt, SamplingParams(max_tokens=8, seed=i, **extra))
        alone.append(drain(engine)["x"].outputs[0].token_ids)
    engine = make_engine(dmc_config(), max_num_batched_tokens=7)
    for i in (3, 1, 4, 0, 2):
        engine.add_request(str(i), prompts[i], SamplingParams(max_tokens=8, seed=i, **extra))
    together = drain(engine)
    assert [together[str(i)].outputs[0].token_ids for i in range(5)] == alone
    engine.add_request("again", prompts[0], SamplingParams(max_tokens=8, seed=77, **extra))
    assert drain(engine)["again"].outputs[0].token_ids != alone[0]


def test_sampling_follows_the_distribution():
    engine = make_engine(None, max_num_seqs=64, num_pages=4000)
    prompt = [5, 6, 7]
    params = SamplingParams(max_tokens=1, temperature=2.0, top_k=6)
    for i in range(600):
        engine.add_request(str(i), prompt, params)
    counts = torch.zeros(V)
    for output in drain(engine).values():
        counts[output.outputs[0].token_ids[0]] += 1
    logits, _ = engine.runner.model.full_forward(prompt)
    expected = TopKLogitsWarper(6)(None, logits[-1:] / 2.0).softmax(-1)[0]
    assert (counts > 0).sum() <= 6
    assert (counts / 600 - expected).abs().max() < 0.08


def test_logprobs_and_prompt_logprobs():
    engine = make_engine(dmc_config(), max_num_batched_tokens=4)
    prompt = make_prompts(1, seed=5, longest=15)[0] + [3, 4, 5, 6, 7]
    engine.add_request("a", prompt, greedy_params(3, logprobs=2, prompt_logprobs=1))
    output = drain(engine)["a"]
    completion = output.outputs[0]
    logits, _ = engine.runner.model.full_forward(prompt + completion.token_ids)
    want = logits.log_softmax(-1)
    assert output.prompt_logprobs[0] is None
    assert len(output.prompt_logprobs) == len(prompt)
    for t in range(1, len(prompt)):
        row = output.prompt_logprobs[t]
        assert abs(row[prompt[t]].logprob - want[t - 1, prompt[t]]) < 1e-10
        assert row[int(want[t - 1].argmax())].rank == 1
        assert 1 <= len(row) <= 2
    assert [sorted(e.rank for e in row.values()) for row in completion.logprobs] == [[1, 2]] * 3
    total = sum(
        row[t].logprob for row, t in zip(completion.logprobs, completion.token_ids, strict=True)
    )
    assert completion.cumulative_logprob == pytest.approx(total)


@pytest.mark.parametrize("start", [3, 9, 11, 12, 40])
@pytest.mark.parametrize("steps_before_preemption", [2, 4])
def test_prompt_logprobs_from_a_position_on(start, steps_before_preemption):
    """In chunks of 4 tokens, and over a preemption within the prompt and behind it."""
    rows = {}
    for first in (1, start):
        engine = make_engine(dmc_config(), max_num_batched_tokens=4)
        params = greedy_params(10, prompt_logprobs=1, prompt_logprobs_start=first)
        engine.add_request("a", list(range(12)), params)
        for _ in range(steps_before_preemption):
            engine.step()
        engine.scheduler._preempt_last()
        rows[first] = drain(engine)["a"].prompt_logprobs
    assert len(rows[1]) == len(rows[start]) == 12
    assert rows[start][:start] == [None] * min(start, 12)
    for one, other in zip(rows[start][start:], rows[1][start:], strict=True):
        assert one.keys() == other.keys()
        for token in one:
            assert one[token].rank == other[token].rank
            assert abs(one[token].logprob - other[token].logprob) < 1e-10


def test_stop_tokens_and_end_of_text():
    prompt = make_prompts(1, seed=6)[0]
    tokens = TinyGPT(dmc_config()).greedy(prompt, 10)
    stop = tokens[4]
    first = tokens.index(stop)
    engine = make_engine(dmc_config(), eos_id=stop)
    engine.add_request("eos", prompt, greedy_params(10))
    engine.add_request("ignored", prompt, greedy_params(10, ignore_eos=True))
    outputs = drain(engine)
    eos = outputs["eos"].outputs[0]
    assert (eos.token_ids, eos.finish_reason, eos.stop_reason) == (
        tokens[: first + 1],
        "stop",
        None,
    )
    assert outputs["ignored"].outputs[0].token_ids == tokens
    engine = make_engine(dmc_config())
    engine.add_request("token", prompt, greedy_params(10, stop_token_ids=[stop]))
    token = drain(engine)["token"].outputs[0]
    assert (token.token_ids, token.stop_reason) == (tokens[: first + 1], stop)


def test_stop_texts_cut_the_text_and_never_show_while_streaming():
    prompt = make_prompts(1, seed=8)[0]
    engine = make_engine(None, tokenizer=Letters())
    engine.add_request("free", prompt, greedy_params(12, ignore_eos=True))
    text = drain(engine)["free"].outputs[0].text
    assert len(text) >= 6
    stop = text[3:5]
    cut = text.find(stop)
    for include in (False, True):
        params = greedy_params(
            12, ignore_eos=True, stop=[stop, "~~~"], include_stop_str_in_output=include
        )
        engine.add_request("stopped", prompt, params)
        seen = []
        while engine.has_unfinished_requests:
            seen += [o.outputs[0] for o in engine.step()]
        last = seen[-1]
        assert (last.finish_reason, last.stop_reason) == ("stop", stop)
        assert last.text == text[: cut + (2 if include else 0)]
        assert all(last.text.startswith(s.text) for s in seen)
    check_idle(engine)


def test_aborts_return_all_pages():
    engine = make_engine(dmc_config(), num_pages=60)
    for i, prompt in enumerate(make_prompts(6, seed=9)):
        engine.add_request(str(i), prompt, greedy_params(8))
    engine.step()
    engine.step()
    for i in range(6):
        output = engine.abort_request(str(i))
        assert output.finished and output.outputs[0].finish_reason == "abort"
        engine.context.tables.check_integrity()
    assert engine.abort_request("0") is None
    assert not engine.has_unfinished_requests and engine.step() == []
    check_idle(engine)


def test_bad_requests_are_refused_and_leave_nothing():
    engine = make_engine(dmc_config(), num_pages=20)
    for prompt, params, message in [
        ([1] * MAX_LEN, None, f"prompt of {MAX_LEN} tokens"),
        ([], None, "prompt is empty"),
        ([1, V], None, f"token id {V} is not in the model's vocabulary of {V}"),
        ([-1], None, "token id -1"),
        ("text", None, "needs a tokenizer"),
        ({"x": 1}, None, "needs 'prompt_token_ids' or 'prompt'"),
        ([1], SamplingParams(stop="x"), "needs a tokenizer"),
        ([1] * 20, SamplingParams(max_tokens=30), "may need 52 pages .* the cache has 20"),
    ]:
        with pytest.raises(InvalidRequest, match=message):
            engine.add_request("a", prompt, params)
    engine.add_request("a", [1], greedy_params(2))
    with pytest.raises(InvalidRequest, match="id is in use"):
        engine.add_request("a", [1], greedy_params(2))
    assert list(drain(engine)) == ["a"]


@pytest.mark.parametrize(
    "field, value",
    [
        ("n", 2), ("temperature", -1), ("temperature", float("nan")), ("temperature", "hot"),
        ("top_k", -2), ("top_k", 1.5), ("top_p", 0), ("top_p", 1.1), ("min_p", -0.1),
        ("seed", 1.5), ("stop", [""]), ("stop", 3), ("stop_token_ids", [-1]),
        ("max_tokens", 0), ("max_tokens", 2.5), ("logprobs", 21), ("prompt_logprobs", -1),
        ("prompt_logprobs_start", 0),
    ],
)  # fmt: skip
def test_bad_sampling_params_name_the_field(field, value):
    with pytest.raises(InvalidRequest, match=f"SamplingParams: {field}="):
        SamplingParams(**{field: value})


def test_engine_sizes_are_checked():
    with pytest.raises(UnsupportedConfig, match="max_num_seqs=0"):
        make_engine(None, max_num_seqs=0)
    with pytest.raises(UnsupportedConfig, match="num_pages=3 cannot hold a single token.*4 pages"):
        make_engine(None, num_pages=3)
    with pytest.raises(UnsupportedConfig, match="more than the model's 64 positions"):
        make_engine(None, max_model_len=MAX_LEN + 1)


def test_text_holds_back_unfinished_characters():
    detokenizer = IncrementalDetokenizer(as_tokenizer(Letters()), [5, 2])
    texts = []
    for token_id in (4, 2, 3, 1, 5, 2):
        detokenizer.add(token_id)
        texts.append(detokenizer.text)
    assert texts == ["a", "a", "aé", "aé", "aéb", "aéb"]
    detokenizer.flush()
    assert detokenizer.text == "aéb\ufffd"


def test_a_token_is_decoded_once():
    """Long texts too; one time in many the window moves."""
    tokenizer, calls = as_tokenizer(Letters()), []
    decode = tokenizer.decode
    tokenizer.decode = lambda ids, **options: calls.append(len(ids)) or decode(ids, **options)
    detokenizer = IncrementalDetokenizer(tokenizer, [5, 6])
    token_ids = [4 + i % 26 if i % 7 else 2 + i % 2 for i in range(300)]
    for token_id in token_ids:
        detokenizer.add(token_id)
    detokenizer.flush()
    assert detokenizer.text == decode(token_ids)
    assert len(calls) < 1.1 * len(token_ids) and max(calls) < 25


def test_without_detokenizing_there_is_no_text():
    engine = make_engine(None, tokenizer=Letters())
    engine.add_request("a", [5, 6], greedy_params(4, detokenize=False))
    engine.add_request("b", [5, 6], greedy_params(4))
    outputs = drain(engine)
    a, b = (outputs[name].outputs[0] for name in "ab")
    assert a.token_ids == b.token_ids and (a.text == "") and b.text
    with pytest.raises(InvalidRequest, match="stop_token_ids"):
        greedy_params(4, detokenize=False, stop=["x"])


def test_special_tokens_show_on_request():
    detokenizer = IncrementalDetokenizer(as_tokenizer(Letters()), [0], skip_special_tokens=False)
    detokenizer.add(1)
    assert detokenizer.text == "</s>"


def test_find_stop_looks_at_new_text_and_takes_the_first():
    assert find_stop("abcabc", 0, ["c", "bc"]) == (1, "bc")
    assert find_stop("abcabc", 3, ["abc"]) == (3, "abc")
    assert find_stop("abcab", 3, ["abc"]) is None
    assert find_stop("abcab", 4, ["ca"]) is None


def make_llm(**kwargs):
    description = ModelDescription(
        num_layers=L, hidden_size=H, ffn_hidden_size=H, num_attention_heads=N, num_query_groups=G,
        kv_channels=D, vocab_size=V, max_position_embeddings=MAX_LEN, dtype=torch.float64,
        dmc=dmc_config(),
    )  # fmt: skip
    model = SimpleNamespace(
        model=TinyGPT(dmc_config()), description=description, tokenizer=Letters()
    )
    return LLM(model, device="cpu", **kwargs)


def test_llm_generates_in_order_for_texts_and_token_ids():
    llm = make_llm(block_size=4, max_num_seqs=2)
    prompts = ["hello", {"prompt_token_ids": [9, 8, 7]}, [4, 5], ""]
    outputs = llm.generate(prompts, greedy_params(5, ignore_eos=True), use_tqdm=False)
    model = llm.engine.runner.model
    ids = [Letters().encode("hello"), [9, 8, 7], [4, 5], [0]]
    assert [o.prompt_token_ids for o in outputs] == ids
    assert [o.outputs[0].token_ids for o in outputs] == [model.greedy(i, 5) for i in ids]
    assert [o.prompt for o in outputs] == ["hello", None, None, ""]
    assert llm.generate("hello", greedy_params(5), use_tqdm=False)[0].prompt == "hello"
    assert llm.stats().num_pages == 2 * (MAX_LEN // 4) * L * G


def test_llm_refuses_a_bad_prompt_and_forgets_the_others():
    llm = make_llm(kv_cache_memory_bytes=2**16)
    assert llm.stats().num_pages == 2**16 // (2 * 16 * D * 8)
    with pytest.raises(InvalidRequest, match="token id 99"):
        llm.generate([[1], [99]], use_tqdm=False)
    assert not llm.engine.has_unfinished_requests
    with pytest.raises(InvalidRequest, match="2 sampling_params for 1 prompts"):
        llm.generate([[1]], [SamplingParams()] * 2)
    with pytest.raises(UnsupportedConfig, match="page_size=8: no such engine setting"):
        make_llm(page_size=8)


class Counted(list):
    """Counts the items that are copied out of it."""

    copied = 0

    def __getitem__(self, key):
        found = super().__getitem__(key)
        self.copied += len(found) if isinstance(key, slice) else 1
        return found

    def __add__(self, other):
        self.copied += len(self)
        return super().__add__(other)

    def __iter__(self):
        self.copied += len(self)
        return super().__iter__()


def test_steps_copy_no_more_tokens_than_they_compute():
    engine = make_engine(
        dmc_config(), max_num_batched_tokens=3, enable_prefix_caching=True, prefix_block_size=4
    )
    engine.add_request("a", list(range(4, 34)), greedy_params(24))
    request = engine._requests["a"]
    request.prompt_token_ids = prompt = Counted(request.prompt_token_ids)
    request.output_token_ids = output = Counted()
    seen = []
    while engine.has_unfinished_requests:
        seen += engine.step()
    # once into the model, and once (at most a block of 4 again) into the prefixes' names
    assert 30 <= prompt.copied <= 2 * 30 + 10 * 4
    assert 23 <= output.copied <= 2 * 24 + 24 * 3
    # an output keeps to what it was made for
    assert [len(o.outputs[0].token_ids) for o in seen] == list(range(1, 25))
    assert all(
        seen[-1].outputs[0].token_ids[:i] == o.outputs[0].token_ids
        for i, o in enumerate(seen, start=1)
    )
