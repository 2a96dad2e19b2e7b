"""Decode steps on a CPU that are replayed give what eager ones give, bit for bit."""

import logging

import pytest
import torch
from random_models import random_model, retrofitted
from test_decode_graphs import random_use

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.config import DMCConfig
from megatron_dmc.ops import cpu
from megatron_dmc.ops.cpu import recording
from megatron_dmc.ops.cpu.outputs import next_part, output

needs_extension = pytest.mark.skipif(bool(cpu.absence()), reason=cpu.absence())

RULES = {
    "plain": None,
    "merges": retrofitted(),
    "window": retrofitted(3),
    "delay": retrofitted(merge_delay=5),
    "evicts": DMCConfig(
        stage="finetune", target_cr=2.0, alpha_offset=0.3, policy="evict", eviction_delay=4
    ),
}


def small(rule=None, dtype=torch.bfloat16, **fields):
    return random_model(
        2, dmc=RULES[rule or "plain"], dtype=dtype, ffn_hidden_size=64, kv_channels=32, **fields
    )


def engine_of(loaded, **settings):
    return LLM(loaded, device="cpu", max_num_seqs=6, max_model_len=64, **settings).engine


def answers(outputs):
    found = {}
    for name, whole in outputs.items():
        (one,) = whole.outputs
        logprobs = [{token: x.logprob for token, x in of.items()} for of in one.logprobs or ()]
        found[name] = one.token_ids, one.finish_reason, logprobs, whole.metrics.num_entries
    return found


@needs_extension
@pytest.mark.parametrize(
    "dtype, cache_dtype", [("bfloat16", "auto"), ("float32", "auto"), ("bfloat16", "int8")]
)
@pytest.mark.parametrize("rule", RULES)
def test_answers_are_those_of_eager_steps(rule, dtype, cache_dtype):
    loaded = small(rule, getattr(torch, dtype))
    settings = {"kv_cache_dtype": cache_dtype, "num_pages": 200}
    engines = [engine_of(loaded, enforce_eager=is_eager, **settings) for is_eager in (True, False)]
    eager, recorded = (answers(random_use(engine, seed=7)) for engine in engines)
    assert eager == recorded
    assert engines[0].context.recorder is None
    # one for each number of requests that decode together
    assert engines[1].context.recorder.num_recorded >= 4
    for engine in engines:
        engine.check_integrity()


@needs_extension
def test_engines_of_one_model_do_not_mix():
    loaded = small("delay")
    params = SamplingParams(temperature=0, max_tokens=24)
    prompts = [[n, 1 + n, 2 + n] for n in (3, 30, 60)]

    def taken(engines):
        for engine, prompt in zip(engines, prompts, strict=True):
            engine.add_request("0", prompt, params)
        found = [[] for _ in engines]
        while any(engine.has_unfinished_requests for engine in engines):
            for engine, tokens in zip(engines, found, strict=True):
                tokens += [o.outputs[0].token_ids for o in engine.step() if o.finished]
        return found

    eager = engine_of(loaded, enforce_eager=True)
    engines = [engine_of(loaded) for _ in prompts]
    together = taken(engines)
    assert all(engine.context.recorder.num_recorded for engine in engines)
    for prompt, (found,) in zip(prompts, together, strict=True):
        eager.add_request("0", prompt, params)
        outputs = []
        while eager.has_unfinished_requests:
            outputs = eager.step()
        assert outputs[0].outputs[0].token_ids == found


@needs_extension
def test_heads_that_decide_together_are_not_recorded(caplog):
    """PyTorch computes their gates."""
    loaded = random_model(
        2,
        dmc=retrofitted(shared_decisions=True),
        dtype=torch.bfloat16,
        ffn_hidden_size=64,
        kv_channels=32,
    )
    engines = [engine_of(loaded, enforce_eager=is_eager) for is_eager in (True, False)]
    recording._announce.cache_clear()
    with caplog.at_level(logging.INFO, recording.__name__):
        eager, other = (answers(random_use(engine, seed=2)) for engine in engines)
    assert eager == other and engines[1].context.recorder.num_recorded == 0
    (line,) = [r.getMessage() for r in caplog.records if r.name == recording.__name__]
    assert line.startswith("decode steps are not recorded: they compute with aten::")


@needs_extension
@pytest.mark.parametrize("is_made_in_it", [True, False])
def test_memory_that_moves_is_not_recorded(is_made_in_it, caplog):
    recorder, kept = recording.Recorder(), []
    places = iter([torch.empty(2, 32) for _ in range(8)])
    recording._announce.cache_clear()

    def work(x):
        moves = torch.empty(2, 32) if is_made_in_it else next(places)
        kept.append(moves)
        cpu.operators().copy.default(x, moves)
        out = output((2, 32), torch.float32)
        cpu.operators().copy.default(moves, out)
        return out

    with caplog.at_level(logging.INFO, recording.__name__):
        for n in range(8):
            x = torch.full((2, 32), float(n))
            assert torch.equal(recorder.run("work", [x], work), x)
    assert recorder.num_recorded == 0 and len(kept) == 8
    assert ("aten::empty" if is_made_in_it else "memory moves") in caplog.text


@needs_extension
def test_a_step_is_replayed_once_two_were_alike():
    recorder, runs = recording.Recorder(), []
    table = torch.zeros(2, 32)

    def work(x):
        runs.append(len(x))
        if len(runs) == 1:
            table.add_(1)  # what the first run makes
        next_part()
        y = output((2, 32), torch.float32)
        cpu.operators().copy.default(x, y)
        next_part()
        out = output((2, 32), torch.float32)
        cpu.operators().matmul.default(y, weight, table, out)
        return out

    weight = 3 * torch.eye(32)
    for n in range(6):
        x = torch.full((2, 32), float(n))
        assert torch.equal(recorder.run("work", [x], work), 3 * x + 1)
    assert len(runs) == 2 and recorder.num_recorded == 1
    with pytest.raises(ValueError, match="x is"):
        cpu.operators().copy.default(torch.zeros(2), torch.zeros(3))


@needs_extension
def test_recorded_work_keeps_its_memory():
    recorder, weights = recording.Recorder(), [torch.full((4096,), 5.0)]

    def work(x):
        out = output(x.shape, torch.float32)
        cpu.operators().rms_norm.default(x, weights[0], out, 0.0)
        return out

    x = torch.ones(1, 4096)
    for _ in range(2):
        recorder.run("work", [x], work)
    assert recorder.num_recorded == 1
    weights.clear()
    others = [torch.zeros(4096) for _ in range(50)]  # where the weight was, if it was freed
    assert (recorder.run("work", [x], work) == 5).all() and len(others) == 50


@needs_extension
def test_a_failing_step_leaves_no_recording_open():
    recorder = recording.Recorder()

    def work(x):
        raise RuntimeError("of the work")

    with pytest.raises(RuntimeError, match="of the work"):
        recorder.run("work", [torch.zeros(1, 32)], work)
    assert output((3,), torch.float32).shape == (3,)
    assert recorder.run("other", [torch.ones(1, 32)], lambda x: x.clone()).sum() == 32
