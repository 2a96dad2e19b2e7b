"""A decode step asks the device nothing but the sampled tokens, and launches what it must; on a GPU that
computes nothing (`fake_gpu`). `tests/engine/test_engine_gpu.py` has the same on a real one."""

import functools

import pytest
import torch
from fake_gpu import (
    MadeUpCopy,
    NoWaiting,
    engine_on_fake_gpu,
    fake_gpu,
    launches,
    move_to_fake_gpu,
    small_model,
)
from random_models import VOCAB
from test_decode_graphs import Recorder

from megatron_dmc import SamplingParams
from megatron_dmc.cache.strategies import CompressionRule
from megatron_dmc.engine import imposed
from megatron_dmc.engine.context import PagedContext
from megatron_dmc.engine.runner import ModelRunner
from megatron_dmc.model import inference

EVERYTHING = [
    {"temperature": 0},
    {"temperature": 0.7, "seed": 3},
    {"temperature": 1.0, "top_p": 0.9, "top_k": 5, "min_p": 0.01},
    {
        "temperature": 0,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.2,
    },
    {"temperature": 0, "logit_bias": {3: 1.0, 7: -2.0}, "logprobs": 2},
    {"temperature": 0.5, "allowed_token_ids": [3, 4, 5], "logprobs": 0},
    {"temperature": 0, "min_tokens": 9, "stop_token_ids": [5]},
]
"""Of each kind of sampling one request."""


@pytest.mark.parametrize(
    "rule, stored",
    [
        ({}, None),
        ({}, torch.int8),
        ({"merge_window": 4}, None),
        ({"shared_decisions": True}, None),
        ({"merge_delay": 3}, None),
        ({"merge_delay": 3, "shared_decisions": True}, torch.int8),
        ({"eviction_delay": 3}, None),
    ],
    ids=str,
)
def test_the_model_asks_the_device_nothing(rule, stored, monkeypatch):
    """Megatron's model and the cache: no value is read, no shape depends on one."""
    model, _ = small_model(merge_window=rule.get("merge_window", 0))
    with fake_gpu(monkeypatch) as called:
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
        assert len(mode.calls) > 50
    assert called == launches(num_layers=3)


WAITS = {
    "list index": lambda x: x[[0, 1]],
    "list index, assigned": lambda x: x.__setitem__([0, 1], torch.zeros(8, device="cuda")),
    "number through indices": lambda x: x.__setitem__(torch.zeros(2, device="cuda").long(), 1.0),
    "torch.tensor": lambda x: torch.tensor([1, 2], device="cuda"),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "pageable copy": lambda x: x.copy_(torch.zeros(4, 8), non_blocking=True),
    "blocking copy": lambda x: x.copy_(torch.zeros(4, 8).pin_memory()),
    "to the host": lambda x: x.cpu(),
    "item": lambda x: x[0, 0].item(),
    "tolist": lambda x: x.tolist(),
    "condition": lambda x: bool((x > 0).any()),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_guard_catches(name, monkeypatch):
    with fake_gpu(monkeypatch):
        x = torch.zeros(4, 8, device="cuda")
        with (
            NoWaiting(),
            pytest.raises(Exception, match="host waits|local_scalar_dense|nonzero|data-dependent"),
        ):
            WAITS[name](x)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("captured", [False, True])
def test_a_decode_step_waits_for_the_sampled_tokens_alone(captured, is_async, monkeypatch):
    """The engine's whole step: scheduling, model, sampler, page accounting. An asynchronous one has launched the
    next before that."""
    model, description = small_model()
    with fake_gpu(monkeypatch) as called:
        engine = engine_on_fake_gpu(model, description, async_scheduling=is_async)
        if captured:
            engine.runner.capture([8], Recorder(), progress=False)
        for i, params in enumerate(EVERYTHING):
            # prompts of one token: the first step decodes as the others do
            engine.add_request(str(i), [i + 2], SamplingParams(max_tokens=9, **params))
        if is_async:
            assert engine.step() == [] and MadeUpCopy.read_shapes == []
        read = MadeUpCopy.read
        monkeypatch.setattr(MadeUpCopy, "read", lambda self: called.append("read") or read(self))
        for _ in range(3):
            called.clear()
            MadeUpCopy.read_shapes.clear()
            with NoWaiting():
                outputs = engine.step()
            assert len(outputs) == len(EVERYTHING)
            assert called == [*launches(num_layers=3), "truncate", "read", "read"]
            # tokens; log-probabilities of two requests; then the counts, of which nothing is left to do
            tokens, counts = MadeUpCopy.read_shapes
            assert tokens == [(7,), (2,), (2,), (2, 2), (2, 2)]
            assert counts == [(2,), (3, 8, 2)]


@pytest.mark.parametrize(
    "settings",
    [{}, {"merge_window": 4}, {"merge_delay": 3}, {"policy": "evict", "eviction_delay": 3}],
    ids=str,
)
def test_prefill_waits_for_the_sampled_tokens_alone(settings, monkeypatch):
    """Prompts longer and shorter than a ring, then the second chunk of one, which continues from its ring."""
    model, description = small_model(**settings)
    with fake_gpu(monkeypatch) as called:
        engine = engine_on_fake_gpu(model, description, max_num_batched_tokens=16)
        for i, length in enumerate((3, 20)):
            params = SamplingParams(temperature=0, max_tokens=9)
            engine.add_request(str(i), list(range(2, length + 2)), params)
        for num_outputs in (1, 2):
            called.clear()
            with NoWaiting():
                assert len(engine.step()) == num_outputs
            assert called.count("prefill_attention") == 3
            # evicted tokens have no states
            assert called.count("prefill_write") == (0 if "policy" in settings else 3)


def operations(calls):
    """Without views and allocations, which launch nothing."""
    views = (
        "view", "_unsafe_view", "t", "detach", "expand", "unsqueeze", "squeeze.dim", "select.int",
        "slice.Tensor", "split.Tensor", "split_with_sizes", "transpose.int", "unbind.int",
        "empty.memory_format",
    )  # fmt: skip
    return [name for name in calls if name not in views]


@pytest.mark.parametrize("imposes, ranks", [(False, 1), (True, 1), (False, 2)])
def test_operations_of_a_decode_step(imposes, ranks, monkeypatch):
    """A layer is four products, two norms, the MLP's gate and the cache's kernels: products add to the residual
    themselves; between ranks the sum comes first, and the next norm adds. Imposed decisions are one launch a step."""
    imposed_kernel = pytest.importorskip("megatron_dmc.engine.imposed_kernel")
    model, description = small_model()
    decisions = imposed.ImposedDecisions.of(imposed.spread_weights(3, 2), 4.0, num_tokens=100)
    options = {
        "make_context": functools.partial(
            imposed.ImposingContext, decisions=decisions, max_num_batched_tokens=64
        )
    }
    with fake_gpu(monkeypatch) as called:
        fake = torch.zeros(3, 1, 2, dtype=torch.int64, device="cuda")
        monkeypatch.setattr(imposed.ImposedDecisions, "thresholds", lambda *args: (fake, fake))
        monkeypatch.setattr(imposed_kernel, "decide", lambda *args: called.append("decide"))
        monkeypatch.setattr(
            inference,
            "reduce_from_tensor_model_parallel_region",
            lambda x, group: called.append("sum") or x,
        )
        model.config.tensor_model_parallel_size = ranks
        engine = engine_on_fake_gpu(model, description, **(options if imposes else {}))
        for i in range(2):
            params = SamplingParams(temperature=0, max_tokens=9)
            engine.add_request(str(i), [i + 2], params)
        for _ in range(2):  # prompts, and the first step of the batch
            engine.step()
        called.clear()
        with NoWaiting() as mode:
            engine.step()
    add_product = "addmm_" if ranks == 1 else "mm"
    layer = ["mm", "clone", add_product, "mm", add_product]  # clone: queries of a group
    end = (
        ["mm", "_to_copy", "max.dim"]
        if ranks == 1
        else ["add_.Tensor", "mm", "_to_copy", "max.dim"]
    )
    # a row whose logits are not finite gets no token
    finite = ["abs", "lt.Scalar", "bitwise_not", "masked_fill.Scalar"]
    assert operations(mode.calls) == ["_to_copy", "embedding", *layer * 3, *end, *finite]
    assert called == (["decide"] if imposes else []) + launches(num_layers=3, ranks=ranks)
