"""One request never hurts another: ids and numbers from outside, faults in one request's own work, logits that
are not finite; and a failure of shared state ends the engine with an error for every request."""

import asyncio
import dataclasses
import math

import pytest
import torch
from faults import Poisoned, Spread, raising
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_gpt import (
    V,
    check_idle,
    dmc_config,
    drain,
    greedy_params,
    make_engine,
    make_prompts,
)

from megatron_dmc import AsyncLLM, SamplingParams
from megatron_dmc.engine import detokenizer, output_processor
from megatron_dmc.engine import sampler as sampler_module
from megatron_dmc.engine.logit_rules import LogitRules
from megatron_dmc.engine.sampler import Sampler
from megatron_dmc.errors import EngineDead, InvalidRequest, OutOfPages, RequestFailed

PROMPTS = dict(zip("abc", make_prompts(3, seed=21, longest=12), strict=True))
VICTIM = "b"


def params_of(name):
    """Parameters that use every kind of per-request work; `logprobs` identifies the request."""
    return SamplingParams(
        seed=ord(name), max_tokens=10, ignore_eos=True, logprobs="abc".index(name) + 3,
        prompt_logprobs="abc".index(name) + 13, presence_penalty=0.5, min_tokens=2, stop=["~"],
        stop_token_ids=[V - 1], logit_bias={V - 1: -50},
    )  # fmt: skip


def make(**sizes):
    return make_engine(dmc_config(), tokenizer=Spread(), eos_id=1, **sizes)


def alone(name):
    engine = make()
    # the engine's seed does not matter: every request has its own
    engine.add_request(name, PROMPTS[name], params_of(name))
    return drain(engine)[name].outputs[0].token_ids


class Panic(BaseException):
    """As libraries in Rust raise."""


FAULTS = {}


def fault(install):
    FAULTS[install.__name__] = install
    return install


@fault
def beginning_of_logit_rules(engine, patch):
    rules = LogitRules._state
    is_meant = lambda self, request, like: request.request_id == VICTIM
    patch.setattr(LogitRules, "_state", raising(rules, is_meant, IndexError("rules")))


@fault
def forbidden_tokens(engine, patch):
    is_meant = lambda self, request: request.request_id == VICTIM
    broken = raising(LogitRules._forbidden, is_meant, KeyError("words"), after=4)
    patch.setattr(LogitRules, "_forbidden", broken)


@fault
def random_numbers(engine, patch):
    is_meant = lambda self, request: request.request_id == VICTIM
    broken = raising(Sampler._seed_of, is_meant, OverflowError("seed"))
    patch.setattr(Sampler, "_seed_of", broken)


@fault
def log_probabilities(engine, patch):
    is_meant = lambda ids, counts, *_: 4 in counts
    broken = raising(sampler_module._rows_of_logprobs, is_meant, MemoryError(), after=3)
    patch.setattr(sampler_module, "_rows_of_logprobs", broken)


@fault
def log_probabilities_of_the_prompt(engine, patch):
    is_meant = lambda logits, ids, counts: 14 in counts
    broken = raising(output_processor.token_logprobs, is_meant, AssertionError("prompt"))
    patch.setattr(output_processor, "token_logprobs", broken)


@fault
def detokenizing(engine, patch):
    text = engine.output_processor._texts[VICTIM]
    text.append = raising(text.append, lambda *_: True, Panic("tokenizers"), after=3)


@fault
def stop_texts(engine, patch):
    own = engine._requests[VICTIM].params.stop
    is_meant = lambda text, old, stops: stops is own
    broken = raising(detokenizer.find_stop, is_meant, RuntimeError("find"), after=1)
    patch.setattr(detokenizer, "find_stop", broken)


@fault
def outputs(engine, patch):
    is_meant = lambda request: request.request_id == VICTIM
    broken = raising(engine.output_processor.text, is_meant, UnicodeError("text"), after=2)
    patch.setattr(engine.output_processor, "text", broken)


@fault
def the_last_output(engine, patch):
    is_meant = lambda request: request.request_id == VICTIM and request.is_finished
    broken = raising(engine.output_processor.text, is_meant, ValueError("text"))
    patch.setattr(engine.output_processor, "text", broken)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_work_of_one_request_ends_that_one_alone(name, monkeypatch):
    engine = make()
    for request_id, prompt in PROMPTS.items():
        engine.add_request(request_id, prompt, params_of(request_id))
    FAULTS[name](engine, monkeypatch)
    outputs = drain(engine)
    failed = outputs.pop(VICTIM)
    assert failed.finished and failed.outputs[0].finish_reason == "error"
    assert failed.error.startswith(f"request {VICTIM}: ") and failed.outputs[0].text == ""
    monkeypatch.undo()
    for request_id, output in outputs.items():
        assert output.error is None
        assert output.outputs[0].token_ids == alone(request_id)
    check_idle(engine)
    assert (
        not engine._requests
        and not engine.output_processor._texts
        and not engine.sampler._rules._states
    )
    # and the engine takes the same request again
    engine.add_request(VICTIM, PROMPTS[VICTIM], params_of(VICTIM))
    assert drain(engine)[VICTIM].outputs[0].token_ids == alone(VICTIM)


def test_a_fault_while_a_request_is_added_leaves_nothing(monkeypatch):
    engine = make()
    engine.add_request("a", PROMPTS["a"], params_of("a"))

    class Broken(Spread):
        def encode(self, text, **_):
            raise Panic("tokenizers")

    def no_detokenizer(*_, **__):
        raise KeyError("special")

    for owner, attribute, value in (
        (engine.input_processor, "tokenizer", Broken()),
        (output_processor, "CompletionText", no_detokenizer),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, value)
            with pytest.raises(RequestFailed, match="request b: (Panic|KeyError)"):
                engine.add_request("b", "text", params_of("b"))
    assert list(engine._requests) == ["a"]
    assert drain(engine)["a"].outputs[0].token_ids == alone("a")


def test_streams_of_a_failed_request_raise_and_others_go_on(monkeypatch):
    engine = make()
    llm = AsyncLLM(engine, observer=lambda *_: 1 / 0)  # a failing observer has no effect

    async def collect(name):
        outputs = [o async for o in llm.generate(PROMPTS[name], params_of(name), name)]
        return outputs[-1].outputs[0].token_ids

    async def main():
        is_meant = lambda self, request: request.request_id == VICTIM
        broken = raising(LogitRules._forbidden, is_meant, RuntimeError("no rules"), after=3)
        monkeypatch.setattr(LogitRules, "_forbidden", broken)
        return await asyncio.gather(*map(collect, "abc"), return_exceptions=True)

    a, b, c = asyncio.run(main())
    assert isinstance(b, RequestFailed) and str(b) == "request b: RuntimeError: no rules"
    assert (a, c) == (alone("a"), alone("c"))
    assert llm.failure is None and not llm.unfinished()
    llm.shutdown()


FATAL = {
    "device": ("runner._forward", RuntimeError("CUDA error: an illegal memory access")),
    "device, seen by one request's work": (
        "sampler._seed_of",
        torch.AcceleratorError("device lost"),
    ),
    "pages": ("context.land", OutOfPages("a head found no page")),
    "tables": ("context.tables.close_row", AssertionError("row 0 is not open")),
}


@pytest.mark.parametrize("name", FATAL)
def test_a_failure_of_what_is_shared_ends_the_engine_and_everybody_is_told(name):
    path, error = FATAL[name]
    engine = make(max_num_seqs=2)
    *owners, attribute = path.split(".")
    owner = engine
    for part in owners:
        owner = getattr(owner, part)
    setattr(owner, attribute, raising(getattr(owner, attribute), lambda *_: True, error, after=2))
    llm = AsyncLLM(engine)

    async def collect(name):
        async for _ in llm.generate(PROMPTS[name[0]], SamplingParams(max_tokens=12), name):
            pass

    async def main():
        names = ("a", "b", "c", "a2", "b2")  # more than run at a time
        told = await asyncio.gather(*map(collect, names), return_exceptions=True)
        late = await asyncio.gather(collect("c2"), llm.stats(), return_exceptions=True)
        return told, late

    told, late = asyncio.run(asyncio.wait_for(main(), 60))
    # those that ended before the failure have their tokens
    told = [e for e in told if e is not None]
    assert told and all(isinstance(e, EngineDead) and str(error) in str(e) for e in told + late)
    assert str(error) in str(llm.failure)
    llm.shutdown()


def test_generate_gives_all_outputs_with_the_error(monkeypatch):
    from megatron_dmc.engine.llm import LLM

    llm = object.__new__(LLM)
    llm.engine, llm._num_generated = make(), 0
    is_meant = lambda self, request: request.number == 1
    broken = raising(Sampler._seed_of, is_meant, RuntimeError("no numbers"))
    monkeypatch.setattr(Sampler, "_seed_of", broken)
    prompts = [PROMPTS[name] for name in "abc"]
    with pytest.raises(RequestFailed, match="1 of 3 prompts failed.*no numbers") as caught:
        llm.generate(prompts, [params_of(name) for name in "abc"], use_tqdm=False)
    monkeypatch.undo()
    assert [o.outputs[0].finish_reason for o in caught.value.outputs] == [
        "length",
        "error",
        "length",
    ]
    assert caught.value.outputs[2].outputs[0].token_ids == alone("c")


# Ids from outside.


@pytest.mark.parametrize(
    "field, value",
    [
        ("stop_token_ids", [40000]), ("stop_token_ids", [3, V]), ("allowed_token_ids", [V]),
        ("logit_bias", {2**31 - 1: 1.0}),
    ],
)  # fmt: skip
def test_token_ids_that_the_model_lacks_are_refused(field, value):
    engine = make()
    params = greedy_params(4, min_tokens=1, **{field: value})
    with pytest.raises(
        InvalidRequest, match=f"{field}: token id {max(value)} .* vocabulary of {V}"
    ):
        engine.add_request("x", [4], params)
    assert not engine.has_unfinished_requests


@pytest.mark.parametrize("prompt", [[4, V], [1.5], ["5"], [True], [None], 7, [2**70], [-1]])
def test_prompts_that_are_not_token_ids_are_refused(prompt):
    engine = make()
    with pytest.raises(InvalidRequest, match="request x: "):
        engine.add_request("x", prompt, greedy_params(2))
    assert not engine.has_unfinished_requests


class Larger(Spread):
    """A tokenizer given separately, with more tokens than the model: é and its end token."""

    bos_id, eos_id, vocab_size = 0, V + 7, V + 8

    def encode(self, text):
        return [V + 5 if c == "é" else i for c, i in zip(text, super().encode(text), strict=True)]


def test_a_tokenizer_with_more_tokens_than_the_model_hurts_nobody():
    engine = make_engine(dmc_config(), tokenizer=Larger(), max_num_seqs=4)
    with pytest.raises(
        InvalidRequest, match=f"token id {V + 5} .*is not in the model's vocabulary of {V}"
    ):
        engine.add_request("x", "é", greedy_params(2))
    engine.add_request(
        "a", PROMPTS["a"], greedy_params(8, min_tokens=3, bad_words=["é", "aé", "éa"])
    )
    got = drain(engine)["a"].outputs[0].token_ids
    engine = make_engine(dmc_config())
    engine.add_request("a", PROMPTS["a"], greedy_params(8))
    assert got == drain(engine)["a"].outputs[0].token_ids


def test_an_end_token_outside_of_the_vocabulary_is_never_made():
    engine = make_engine(dmc_config(), eos_id=V + 1)
    engine.add_request("a", PROMPTS["a"], greedy_params(6, min_tokens=4, presence_penalty=1))
    assert drain(engine)["a"].outputs[0].finish_reason == "length"


# Numbers from outside.

HUGE = 10**400


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", 1e39), ("temperature", HUGE), ("temperature", math.inf), ("temperature", True),
        ("temperature", "1"), ("top_k", 2**31), ("top_k", True), ("top_p", HUGE), ("top_p", math.nan),
        ("min_p", math.inf), ("presence_penalty", -math.inf), ("frequency_penalty", HUGE),
        ("repetition_penalty", 1e-39), ("repetition_penalty", math.nan), ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: HUGE}), ("logit_bias", {True: 1}), ("logit_bias", {1: True}), ("seed", 2**64),
        ("seed", -HUGE), ("seed", True), ("n", True), ("max_tokens", HUGE), ("max_tokens", True),
        ("max_tokens", math.inf), ("min_tokens", 17), ("min_tokens", math.inf), ("min_tokens", True),
        ("logprobs", True), ("logprobs", 2**70), ("prompt_logprobs", "2"), ("prompt_logprobs_start", HUGE),
        ("stop_token_ids", [True]), ("stop_token_ids", "12"), ("stop_token_ids", [2**63]),
        ("bad_words", "abc"), ("ignore_eos", "yes"), ("skip_special_tokens", 1),
        ("include_stop_str_in_output", None), pytest.param("seed", 10**5000, id="5,001 digits"),
    ],
)  # fmt: skip
def test_every_number_has_bounds(field, value):
    with pytest.raises(InvalidRequest, match=f"SamplingParams: {field}=") as caught:
        SamplingParams(**{field: value})
    assert len(str(caught.value)) < 400


def test_numbers_that_are_changed_later_are_checked_when_they_are_used():
    engine = make()
    params = params_of("a")
    params.temperature = 1e39
    with pytest.raises(InvalidRequest, match="temperature=1e"):
        engine.add_request("a", PROMPTS["a"], params)
    params = params_of("a")
    engine.add_request("a", PROMPTS["a"], params)
    params.temperature, params.logit_bias[10**6] = math.nan, 1.0
    params.stop_token_ids.append(-1)
    assert drain(engine)["a"].outputs[0].token_ids == alone("a")


anything = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3),
    st.lists(st.integers(-2, V + 2), max_size=3),
    st.sampled_from([HUGE, -HUGE, 1e39, -1e39, 1e-40, 1e-6, 2**31, 2**63, 2**64, math.inf, math.nan]),
    st.dictionaries(st.integers(-1, V), st.floats(), max_size=2),
)  # fmt: skip
sensible = {
    "temperature": st.sampled_from([0.0, 5e-324, 1e-45, 1e-5, 0.7, 1e6]),
    "top_k": st.integers(-1, 2**31 - 1), "top_p": st.sampled_from([5e-324, 1e-39, 0.5, 1 - 1e-9, 1]),
    "min_p": st.sampled_from([0, 1e-45, 0.3, 1.0]), "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2), "repetition_penalty": st.floats(0.01, 100),
    "logit_bias": st.dictionaries(st.integers(0, V + 1), st.floats(-100, 100), max_size=4),
    "allowed_token_ids": st.lists(st.integers(0, V), min_size=1, max_size=4),
    "stop_token_ids": st.lists(st.integers(0, V), max_size=3), "min_tokens": st.integers(0, 6),
    "bad_words": st.lists(st.text("abcé", min_size=1, max_size=2), max_size=2),
    "seed": st.integers(-(2**63), 2**64 - 1), "logprobs": st.integers(0, 20),
    "prompt_logprobs": st.integers(0, 20), "prompt_logprobs_start": st.integers(1, 30),
    "stop": st.lists(st.text("abc", min_size=1, max_size=2), max_size=2), "ignore_eos": st.booleans(),
    "max_tokens": st.sampled_from([None, 1, 6, 2**31 - 1]), "include_stop_str_in_output": st.booleans(),
}  # fmt: skip
wild = st.fixed_dictionaries(
    {}, optional={name: value | anything for name, value in sensible.items()}
)
prompts = st.lists(st.integers(-1, V), max_size=8) | st.lists(anything, max_size=3)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(asked=st.lists(st.tuples(prompts | st.just([5, 6]), wild), min_size=1, max_size=4))
def test_no_request_whatever_it_asks_for_hurts_another(asked):
    """Refused, ended with an error or answered; the one next to it gets its tokens."""
    engine = make_engine(dmc_config(), tokenizer=Larger(), max_num_seqs=8, max_num_batched_tokens=8)
    engine.add_request("a", PROMPTS["a"], params_of("a"))
    names = []
    for number, (prompt, arguments) in enumerate(asked):
        try:
            engine.add_request(f"wild {number}", prompt, SamplingParams(**arguments))
            names.append(f"wild {number}")
        except InvalidRequest as e:
            assert len(str(e)) < 1000
    outputs = drain(engine)
    assert outputs.pop("a").outputs[0].token_ids == ALONE_A
    assert sorted(outputs) == sorted(names)
    for output in outputs.values():
        assert output.error is None, output.error
        assert all(0 <= token < V for token in output.outputs[0].token_ids)
    check_idle(engine)


ALONE_A = alone("a")


# Logits that are not finite.


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize(
    "value, columns",
    [
        (math.nan, slice(3, 4)),
        (math.inf, slice(9, 10)),
        (-math.inf, slice(None)),
        (math.nan, slice(None)),
    ],
    ids=["one NaN", "one infinity", "nothing", "all NaN"],
)
def test_logits_that_are_not_finite_end_their_own_request(value, columns, greedy):
    model = Poisoned(dmc_config())
    model.value, model.columns = value, columns
    engine = make_engine(dmc_config(), tokenizer=Spread(), model=model, max_num_batched_tokens=64)
    params = {
        name: dataclasses.replace(params_of(name), temperature=float(not greedy)) for name in "ac"
    }
    for name in "ac":
        engine.add_request(name, PROMPTS[name], params[name])
    engine.add_request(
        "sampled", [5, V - 1], SamplingParams(max_tokens=5, temperature=float(not greedy))
    )
    engine.add_request("ruled", [6, V - 1], params_of("a"))
    engine.add_request("prompt", [V - 1, 7], greedy_params(5, prompt_logprobs=3))
    engine.add_request("after", [V - 1, 7], greedy_params(5))
    outputs = drain(engine)
    for name in ("sampled", "ruled", "prompt"):
        assert "not finite" in outputs[name].error, name
        assert outputs[name].outputs[0].token_ids == []
    assert outputs["after"].error is None  # its own logits are sound
    engine = make_engine(dmc_config(), tokenizer=Spread())
    for name in "ac":
        engine.add_request(name, PROMPTS[name], params[name])
    for name, output in drain(engine).items():
        assert outputs[name].outputs[0].token_ids == output.outputs[0].token_ids
