"""Asynchronous scheduling changes no output: any requests, settings and order of calls, against the engine that
reads each step's tokens before it launches the next."""

import itertools
import random

import pytest
from engine_machine import run_again
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_gpt import G, L, Letters, V, check_idle, dmc_config, make_engine

from megatron_dmc import SamplingParams
from megatron_dmc.engine import EngineConfig
from megatron_dmc.engine.sampler import Sampling
from megatron_dmc.errors import UnsupportedConfig

_rng = random.Random(3)
_TRUNK = [_rng.randrange(V) for _ in range(20)]
PARAMS = [
    {"temperature": 0},
    {"seed": 1, "stop": ["a", "hb"], "max_tokens": 20},
    {"temperature": 0, "stop_token_ids": [5, 9, 17], "include_stop_str_in_output": True},
    {"seed": 2, "ignore_eos": True, "logprobs": 2, "prompt_logprobs": 1},
    {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.3, "min_tokens": 4},
    {"seed": 3, "top_p": 0.8, "top_k": 9, "bad_words": ["a", "bc"], "presence_penalty": 1.0},
    {"temperature": 0, "bad_words": ["ab", "cd", "xyz"], "logprobs": 0},
    {"seed": 4, "temperature": 1.5, "max_tokens": 1},
]
ENGINES = [
    (lambda: None, {}),
    (dmc_config, {}),
    (dmc_config, {"enable_prefix_caching": True, "prefix_block_size": 4}),
    (lambda: dmc_config(2), {"enable_prefix_caching": True, "prefix_block_size": 6}),
    (lambda: dmc_config(merge_delay=4), {"enable_prefix_caching": True, "prefix_block_size": 4}),
    (lambda: dmc_config(merge_delay=3), {}),
    (lambda: dmc_config(policy="evict", eviction_delay=3), {}),
    (lambda: None, {"cache_policy": "h2o", "cache_budget": 9}),
]
PLENTY, FEW = 400, 10 * L * G

requests = st.tuples(st.integers(0, 20), st.integers(0, V - 1), st.integers(0, len(PARAMS) - 1),
                     st.integers(1, 14))  # fmt: skip
calls = st.one_of(
    st.tuples(st.just("add"), requests),
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("abort"), st.integers(0, 30)),
    st.tuples(st.just("preempt"), st.just(0)),
    st.tuples(st.just("ask"), st.just(0)),
)


def use(engine, program):
    """Make the calls of a program, then finish.

    Returns:
        the last output of each request, and whether it was aborted.
    """
    done, numbers = {}, itertools.count()

    def step():
        for output in engine.step():
            if output.finished:
                assert output.request_id not in done
                done[output.request_id] = (output, False)

    for name, value in program:
        if name == "add":
            length, last, kind, max_tokens = value
            params = SamplingParams(**{"max_tokens": max_tokens + 3} | PARAMS[kind])
            engine.add_request(str(next(numbers)), [*_TRUNK[:length], last], params)
        elif name == "step":
            for _ in range(value):
                step()
        elif name == "abort":
            output = engine.abort_request(str(value))
            if output is not None:
                done[output.request_id] = (output, True)
        elif name == "preempt" and len(engine.scheduler.running) > 1:
            engine.context.update_counts()  # as the scheduler does
            engine.scheduler._preempt_last()
        elif name == "ask":
            engine.stats()
            engine.check_integrity()
    while engine.has_unfinished_requests:
        step()
    engine.check_integrity()
    return done


def comparable(output):
    completion = output.outputs[0]
    rows = (completion.logprobs or []) + (output.prompt_logprobs or [])
    values = [
        (token, p.rank, round(p.logprob, 9)) for row in rows if row for token, p in row.items()
    ]
    return (
        completion.token_ids, completion.text, completion.finish_reason, completion.stop_reason,
        values, output.error,
    )  # fmt: skip


def figures(output):
    metrics = output.metrics
    return metrics.num_entries, metrics.num_cached_tokens, metrics.num_pages


@settings(max_examples=15, deadline=None)
@given(
    program=st.lists(calls, min_size=5, max_size=40),
    kind=st.integers(0, len(ENGINES) - 1),
    num_pages=st.sampled_from([PLENTY, FEW, FEW + 7]),
    budget=st.sampled_from([1, 5, 40]),
    captured=st.booleans(),
)
def test_outputs_are_those_of_the_synchronous_engine(program, kind, num_pages, budget, captured):
    dmc, options = ENGINES[kind]
    engines = [
        make_engine(
            dmc(), tokenizer=Letters(), eos_id=1, max_num_seqs=3, num_pages=num_pages,
            max_num_batched_tokens=budget, async_scheduling=is_async, count_flipped_decisions=True,
            **options,
        )
        for is_async in (False, True)
    ]  # fmt: skip
    if captured and engines[1].context.store.is_capturable:
        engines[1].runner.capture([1, 2], run_again, progress=False)
    wanted, got = (use(engine, program) for engine in engines)
    assert wanted.keys() == got.keys()
    for name, (output, was_aborted) in wanted.items():
        other, other_aborted = got[name]
        if was_aborted or other_aborted:
            a, b = sorted((o.outputs[0].token_ids for o in (output, other)), key=len)
            assert b[: len(a)] == a
        else:
            assert comparable(output) == comparable(other)
            if not (output.metrics.num_preemptions or other.metrics.num_preemptions):
                assert figures(output) == figures(other)
    for engine in engines:
        if engine.context.prefixes is not None:
            engine.context.prefixes.clear()
        check_idle(engine)
        assert not engine._requests and not engine.sampler._rules._states


def test_the_next_step_is_launched_before_tokens_are_read(monkeypatch):
    """And waits are one a step: for the tokens."""
    events = []
    engine = make_engine(dmc_config(), async_scheduling=True)
    run, read = engine.runner._forward, Sampling.read
    engine.runner._forward = lambda *args: events.append("launch") or run(*args)
    monkeypatch.setattr(Sampling, "read", lambda self: events.append("read") or read(self))
    engine.add_request("a", [4, 5, 6], SamplingParams(temperature=0, max_tokens=5))
    assert engine.step() == []
    lengths = []
    while engine.has_unfinished_requests:
        lengths += [output.outputs[0].num_tokens for output in engine.step()]
    assert lengths == [1, 2, 3, 4, 5]
    assert events == ["launch", *["launch", "read"] * 4, "read"]


@pytest.mark.parametrize(
    "options, waits",
    [
        ({}, False),
        ({"repetition_penalty": 1.2, "presence_penalty": 0.1, "min_tokens": 3}, False),
        ({"bad_words": ["ab"]}, True),
    ],
)
def test_rules_that_read_the_completion_wait_for_it(options, waits):
    engine = make_engine(dmc_config(), tokenizer=Letters(), async_scheduling=True)
    behind = []
    land = engine._land
    engine._land = lambda batch, num_behind=0: (
        behind.append(num_behind) or land(batch, num_behind=num_behind)
    )
    params = SamplingParams(temperature=0, max_tokens=6, **options)
    engine.add_request("a", [4, 5, 6], params)
    engine.add_request("b", [7, 5], SamplingParams(temperature=0, max_tokens=6))
    while engine.has_unfinished_requests:
        engine.step()
    assert behind[:-1] == [0 if waits else 1] * 5


def test_a_token_after_the_end_leaves_nothing():
    """The batch in flight when a request ends: its entries and pages go with the request."""
    engine = make_engine(dmc_config(), tokenizer=Letters(), async_scheduling=True)
    params = SamplingParams(temperature=0, max_tokens=30, stop_token_ids=list(range(V)))
    engine.add_request("a", [4, 5, 6], params)
    outputs = []
    while engine.has_unfinished_requests:
        outputs += engine.step()
    assert outputs[-1].outputs[0].num_tokens == 1 and engine._in_flight is not None
    check_idle(engine)
    assert engine.step() == [] and engine._in_flight is None
    check_idle(engine)


def test_tensor_parallelism_is_synchronous():
    with pytest.raises(
        UnsupportedConfig, match="async_scheduling=True with tensor_parallel_size=2"
    ):
        EngineConfig(async_scheduling=True, tensor_parallel_size=2)
    assert not make_engine(None)._is_async, "on a CPU nothing would overlap"
