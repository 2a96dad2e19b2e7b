"""Captured decode steps give what eager ones give.

There is no GPU here: what is captured is run again, on the same static tensors, in place of a replay.
"""

import random

import numpy as np
import pytest
import torch
from random_models import VOCAB, random_model
from tiny_gpt import (
    V,
    check_idle,
    dmc_config,
    greedy_params,
    make_engine,
    make_prompts,
)

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.config import DMCConfig
from megatron_dmc.engine import EngineConfig
from megatron_dmc.engine.graphs import Captured, DecodeGraphs
from megatron_dmc.errors import UnsupportedConfig


class Recorder:
    """Runs the work again instead of replaying it, and writes to where the first run wrote."""

    def __init__(self):
        self.replays: list[int] = []

    def __call__(self, work):
        output = work()
        size = output.shape[0]

        def replay():
            self.replays.append(size)
            output.copy_(work())

        return Captured(replay, output)


def with_graphs(engine, sizes):
    recorder = Recorder()
    engine.runner.capture(sizes, recorder, progress=False)
    engine.check_integrity()
    assert engine.context.pool.num_held == 0  # capturing left no trace
    return recorder


def random_use(engine, seed):
    """Requests that come between steps, some aborted; all finished outputs."""
    rng = random.Random(seed)
    trunk = [rng.randrange(V) for _ in range(12)]
    finished, added = {}, 0
    while added < 14 or engine.has_unfinished_requests:
        if added < 14 and rng.random() < 0.4:
            prompt = trunk[: rng.randint(0, 12)] + [rng.randrange(V)]
            params = (
                greedy_params(rng.randint(1, 12), logprobs=1, prompt_logprobs=0)
                if rng.random() < 0.4
                else SamplingParams(max_tokens=rng.randint(1, 12), seed=added)
            )
            engine.add_request(str(added), prompt, params)
            added += 1
        if rng.random() < 0.03 and engine._requests:
            output = engine.abort_request(rng.choice(sorted(engine._requests)))
            finished[output.request_id] = output
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
        engine.check_integrity()
    return finished


@pytest.mark.parametrize("merge_window", [None, 0, 3])
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"max_num_batched_tokens": 5},
        {"num_pages": 56, "enable_prefix_caching": True, "prefix_block_size": 6},
    ],
    ids=["plenty", "chunks", "few-cached"],
)
def test_tokens_are_those_of_eager_steps(merge_window, sizes):
    dmc = None if merge_window is None else dmc_config(merge_window)
    engines = [make_engine(dmc, max_num_seqs=6, **sizes) for _ in range(2)]
    recorder = with_graphs(engines[1], [1, 2, 5])
    eager, graphed = (random_use(engine, seed=4) for engine in engines)
    assert set(eager) == set(graphed)
    for i, output in eager.items():
        a, b = output.outputs[0], graphed[i].outputs[0]
        assert (a.token_ids, a.finish_reason) == (b.token_ids, b.finish_reason)
        if a.logprobs is not None:
            assert abs(a.cumulative_logprob - b.cumulative_logprob) < 1e-10
            rows = [o.prompt_logprobs[1:] for o in (output, graphed[i])]
            for x, y in zip(*rows, strict=True):
                assert x.keys() == y.keys()
                assert all(abs(x[t].logprob - y[t].logprob) < 1e-10 for t in x)
        assert output.metrics.num_entries == graphed[i].metrics.num_entries
    assert set(recorder.replays) == {1, 2, 5}
    # steps with a longer chunk, or with six requests, were eager
    decoded = engines[1].stats().num_decode_only_tokens
    assert 0 < len(recorder.replays) < decoded <= sum(recorder.replays) + 6 * 40
    for engine in engines:
        if engine.context.prefixes is not None:
            assert engine.stats().num_prefix_hit_tokens > 0
            engine.context.prefixes.clear()
        check_idle(engine)


def test_heads_that_decide_together_are_captured_too():
    dmc = DMCConfig(stage="finetune", target_cr=2.0, alpha_offset=0.1, shared_decisions=True)
    loaded = random_model(4, dmc=dmc)
    generator = torch.Generator().manual_seed(2)
    prompts = [
        {"prompt_token_ids": torch.randint(0, VOCAB, (n,), generator=generator).tolist()}
        for n in (9, 1, 17)
    ]
    results = []
    for graphs in (False, True):
        llm = LLM(loaded, max_num_seqs=4, device="cpu")
        if graphs:
            recorder = with_graphs(llm.engine, [4])
        outputs = llm.generate(prompts, greedy_params(10), use_tqdm=False)
        results.append([(o.outputs[0].token_ids, o.metrics.num_entries) for o in outputs])
        llm.engine.check_integrity()
    assert results[0] == results[1]
    assert recorder.replays == [4] * 9


def test_inputs_are_padded_to_the_next_size():
    seen = []

    def forward(ids, positions, rows):
        seen.append([x.tolist() for x in (ids, positions, rows)])
        return torch.stack([ids, positions], dim=1)

    graphs = DecodeGraphs(
        forward, [4, 2, 2], Recorder(), device=torch.device("cpu"), progress=False
    )
    assert [len(ids) for ids, _, _ in seen] == [4, 2]  # the largest first
    assert all(set(rows) == {-1} for _, _, rows in seen)
    out = graphs.run(np.array([[7, 8, 9], [1, 2, 3], [5, 0, 2]]))
    assert seen[-1] == [[7, 8, 9, 0], [1, 2, 3, 0], [5, 0, 2, -1]]
    assert out.tolist() == [[7, 1], [8, 2], [9, 3]]
    graphs.run(np.array([[6], [4], [3]]))
    assert seen[-1] == [[6, 0], [4, 0], [3, -1]]


def test_sizes():
    assert EngineConfig(max_num_seqs=1).capture_sizes() == [1]
    assert EngineConfig(max_num_seqs=20).capture_sizes() == [1, 2, 4, 8, 16, 20]
    assert EngineConfig(max_num_seqs=600).capture_sizes()[-2:] == [496, 512]
    assert EngineConfig(max_num_seqs=256).capture_sizes()[-2:] == [248, 256]
    config = EngineConfig(
        max_model_len=8, num_pages=8, max_num_seqs=9, cudagraph_capture_sizes=[8, 4, 16]
    )
    assert config.capture_sizes() == [4, 8]
    for sizes in ([], [0], [2.5], [True], [65, 80]):
        with pytest.raises(UnsupportedConfig, match="cudagraph_capture_sizes="):
            EngineConfig(max_num_seqs=64, cudagraph_capture_sizes=sizes)


def test_a_step_waits_for_the_device_once(monkeypatch):
    """Counts are read when the sampled tokens are, and their copies were started before."""
    from megatron_dmc.cache import tables

    events = []

    class Watched(tables.AsyncCopy):
        def __init__(self, tensors):
            events.append("copy")
            super().__init__(tensors)

        def read(self):
            events.append("read")
            return super().read()

    monkeypatch.setattr(tables, "AsyncCopy", Watched)
    engine = make_engine(dmc_config(), max_num_seqs=3, num_pages=80)
    sample = engine.sampler.sample
    engine.sampler.sample = lambda *args: events.append("sample") or sample(*args)
    for i, prompt in enumerate(make_prompts(3, seed=1)):
        engine.add_request(str(i), prompt, greedy_params(6))
    steps = 0
    while engine.has_unfinished_requests:
        engine.step()
        steps += 1
    assert events == ["copy", "sample", "read"] * steps
