"""Captured decode steps give what eager ones give, and a decode step asks the device nothing.

There is no GPU here: what is captured is run again, on the same static tensors, in place of a replay.
"""

import random

import pytest
import torch
from test_model_in_engine import VOCAB, random_model
from tiny_gpt import (
    V,
    check_idle,
    dmc_config,
    greedy_params,
    make_engine,
    make_prompts,
)
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.config import DMCConfig
from megatron_dmc.engine import EngineConfig
from megatron_dmc.engine.context import PagedContext
from megatron_dmc.engine.decode_graphs import Captured, DecodeGraphs, default_sizes
from megatron_dmc.engine.model_runner import ModelRunner
from megatron_dmc.engine.rule import CompressionRule
from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.models import build_model
from megatron_dmc.ops import cache_ops, page_ops
from megatron_dmc.ops.cuda import decode as cuda_kernels


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
        llm = LLM(loaded, max_num_seqs=4)
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
    out = graphs.run([7, 8, 9], [1, 2, 3], [5, 0, 2])
    assert seen[-1] == [[7, 8, 9, 0], [1, 2, 3, 0], [5, 0, 2, -1]]
    assert out.tolist() == [[7, 1], [8, 2], [9, 3]]
    graphs.run([6], [4], [3])
    assert seen[-1] == [[6, 0], [4, 0], [3, -1]]


def test_sizes():
    assert default_sizes(1) == [1]
    assert default_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert default_sizes(600)[-2:] == [496, 512]
    assert default_sizes(256)[-2:] == [248, 256]
    config = EngineConfig(
        max_model_len=8, num_pages=8, max_num_seqs=9, cudagraph_capture_sizes=[8, 4, 16]
    )
    assert config.graph_sizes() == [4, 8]
    for sizes in ([], [0], [2.5], [True], [65, 80]):
        with pytest.raises(UnsupportedConfig, match="cudagraph_capture_sizes="):
            EngineConfig(max_model_len=8, num_pages=8, cudagraph_capture_sizes=sizes)


def test_a_step_waits_for_the_device_once(monkeypatch):
    """Counts are read when the sampled tokens are, and their copies were started before."""
    from megatron_dmc.cache import block_tables

    events = []

    class Watched(block_tables.LateCopy):
        def __init__(self, tensors):
            events.append("copy")
            super().__init__(tensors)

        def read(self):
            events.append("read")
            return super().read()

    monkeypatch.setattr(block_tables, "LateCopy", Watched)
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


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU; shapes that depend on data and `item` are refused by
    fake tensors themselves."""

    def __init__(self):
        super().__init__()
        self.num_calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.num_calls += 1
        out = function(*args, **(kwargs or {}))
        devices = {
            x.device.type for x in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(x)
        }
        if torch.is_tensor(out) and out.device.type == "cpu" and "cuda" in devices:
            raise AssertionError(f"{function} copies from the device")
        return out


def small_model(merge_window):
    description = ModelDescription(
        num_layers=3, hidden_size=128, ffn_hidden_size=64, num_attention_heads=4,
        num_query_groups=2, kv_channels=64, vocab_size=VOCAB, max_position_embeddings=128,
        dtype=torch.bfloat16,
    )  # fmt: skip
    dmc = DMCConfig(stage="finetune", target_cr=2.0, merge_window=merge_window)
    return build_model(description, dmc=dmc)


def move_to_fake_gpu(model):
    """Within FakeTensorMode: fake tensors in place of all of the model's."""

    def fake(x):
        return torch.empty(x.shape, dtype=x.dtype, device="cuda")

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(fake(parameter), requires_grad=False)
        for name, value in vars(module).items():
            if torch.is_tensor(value):
                setattr(module, name, fake(value))


@pytest.mark.parametrize(
    "rule, stored",
    [({}, None), ({}, torch.int8), ({"merge_window": 4}, None), ({"shared_decisions": True}, None)],
    ids=str,
)
def test_a_decode_step_asks_the_device_nothing(rule, stored, monkeypatch):
    """Megatron's model and the cache on a GPU that computes nothing (fake tensors), with the CUDA
    kernels' host side: no value is read, no shape depends on one."""
    called = []

    class Operators:
        def __getattr__(self, name):
            return lambda *args: called.append(name)

    monkeypatch.setattr(cuda_kernels, "operators", Operators)
    monkeypatch.setattr(cuda_kernels, "_num_workers", lambda *args: 4)
    for module, chooser in ((cache_ops, "choose_backend"), (page_ops, "choose_page_backend")):
        monkeypatch.setattr(module, chooser, lambda *args: "cuda")
        monkeypatch.setattr(module, "kernels", lambda backend: cuda_kernels)
    model = small_model(rule.get("merge_window", 0))
    with FakeTensorMode(), torch.no_grad():
        move_to_fake_gpu(model)
        context = PagedContext(
            num_layers=3, num_kv_heads=2, head_dim=64, num_pages=64, page_size=16, max_num_seqs=8,
            max_model_len=128, dtype=torch.bfloat16, device="cuda", backend="cuda",
            rule=CompressionRule(alpha_offset=5.0, **rule), count_flips=True, cache_dtype=stored,
        )  # fmt: skip
        runner = ModelRunner(model, context, vocab_size=VOCAB, device="cuda")
        inputs = [torch.zeros(5, dtype=torch.int64, device="cuda") for _ in range(3)]
        with NoWaiting() as mode:
            logits = runner._forward(*inputs, None)
        assert logits.shape[0] == 5 and logits.device.type == "cuda"
        assert mode.num_calls > 50
        # the check can fail
        with NoWaiting(), pytest.raises(Exception, match="local_scalar_dense|data-dependent"):
            int(runner.context.tables.num_entries_LRG.max())
        with NoWaiting(), pytest.raises(AssertionError, match="copies from the device"):
            runner.context.tables.num_entries_LRG.cpu()
    assert called == ["plan"] + ["decode_append", "paged_decode_attention"] * 3
