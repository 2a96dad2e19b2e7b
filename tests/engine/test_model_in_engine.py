"""Megatron's real GPTModel through the paged engine, held against its own full forward."""

import pytest
import torch
from random_models import VOCAB, random_model, retrofitted

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.checkpoint.load import full_forward
from megatron_dmc.config import DMCConfig
from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.quality.likelihood import (
    DecisionTrace,
    engine_difference,
    evaluate,
    traced_forward,
)

CASES = [(None, 2), (0, 4), (0, 2), (0, 1), (3, 2), (12, 4)]


@pytest.mark.parametrize("window,kv_heads", CASES)
@pytest.mark.parametrize("chunks", [[], [40], [7, 1, 20], [1] * 3])
def test_any_chunking_equals_the_full_forward(window, kv_heads, chunks):
    dmc = None if window is None else retrofitted(window)
    loaded = random_model(kv_heads, dmc=dmc, borrowed_rope_pair=1 if window == 3 else None)
    tokens = torch.randint(0, VOCAB, (48,), generator=torch.Generator().manual_seed(1)).tolist()
    assert engine_difference(loaded, tokens, chunks) < 1e-10


def test_heads_that_decide_together():
    """DMC-C: the heads of a layer have the same lengths, in the engine as in the full forward."""
    dmc = DMCConfig(stage="finetune", target_cr=2.0, alpha_offset=0.1, shared_decisions=True)
    loaded = random_model(4, dmc=dmc)
    tokens = torch.randint(0, VOCAB, (48,), generator=torch.Generator().manual_seed(1))
    assert engine_difference(loaded, tokens.tolist(), [7, 1, 20]) < 1e-10
    trace = DecisionTrace(loaded.model)
    traced_forward(loaded, tokens[None], trace)
    for merges_TBG in trace.is_merge_LTBG:
        assert (merges_TBG == merges_TBG[..., :1]).all()
    merges = torch.stack(trace.is_merge_LTBG)
    assert 0 < merges.float().mean() < 1


def test_float32_stays_within_the_stated_bound():
    loaded = random_model(dmc=retrofitted(), dtype=torch.float32)
    tokens = torch.randint(0, VOCAB, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    assert engine_difference(loaded, tokens, [20, 13]) < 1e-4


@pytest.mark.parametrize("window", [None, 0, 3])
def test_greedy_generation_and_reported_cr(window):
    dmc = None if window is None else retrofitted(window)
    loaded = random_model(dmc=dmc)
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, VOCAB, (n,), generator=generator).tolist() for n in (1, 5, 17, 30)]
    llm = LLM(loaded, max_num_batched_tokens=9, max_num_seqs=3, device="cpu")
    params = SamplingParams(temperature=0, max_tokens=12)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    trace = DecisionTrace(loaded.model)
    for prompt, output in zip(prompts, outputs, strict=True):
        sequence = list(prompt)
        for _ in range(12):
            logits = full_forward(loaded.model, torch.tensor([sequence]))[0, -1, :VOCAB]
            sequence.append(int(logits.argmax()))
        assert output.outputs[0].token_ids == sequence[len(prompt) :]
        cached = torch.tensor([sequence[:-1]])
        traced_forward(loaded, cached, trace)
        merges = sum(int(m.sum()) for m in trace.is_merge_LTBG)
        slots = cached.numel() * 3 * 2
        assert output.metrics.num_entries == slots - merges
        assert output.cr == pytest.approx(slots / (slots - merges))
        if window is not None and len(sequence) > 20:
            assert merges > 0, "the case must merge to mean anything"
    llm.engine.context.pool.check_integrity()
    assert llm.engine.context.pool.num_held == 0


def test_the_engine_is_where_the_weights_are(monkeypatch):
    """Though a GPU is there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loaded = random_model(dmc=retrofitted())
    for device in (None, "cpu"):
        llm = LLM(loaded, max_model_len=32, max_num_seqs=1, device=device)
        assert llm.engine.context.tables.num_entries_LRG.device == torch.device("cpu")
        llm.generate([{"prompt_token_ids": [1, 2]}], use_tqdm=False)
    with pytest.raises(
        UnsupportedConfig, match="device='cuda:1', and the model's weights are on 'cpu'"
    ):
        LLM(loaded, device="cuda:1")


def test_evaluation_counts_tokens_and_entries():
    loaded = random_model(dmc=retrofitted())
    tokens = torch.randint(0, VOCAB, (101,), generator=torch.Generator().manual_seed(4)).numpy()
    result = evaluate(loaded, tokens, length=20, batch=2, progress=False)
    assert result.num_tokens == result.num_predicted == 100
    entries = 0
    for start in range(0, 100, 20):
        trace = DecisionTrace(loaded.model)
        traced_forward(loaded, torch.tensor([tokens[start : start + 20].tolist()]), trace)
        entries += sum(int((~m).sum()) for m in trace.is_merge_LTBG)
    assert int(result.num_entries_LG.sum()) == entries
    assert result.measured_cr == pytest.approx(100 * 6 / entries)
    assert result.measured_cr > 1.2
    one = [row for start in range(0, 100, 20) for row in [tokens[start : start + 21]]]
    nll = 0.0
    for row in one:
        ids = torch.tensor([row.tolist()])
        logits = full_forward(loaded.model, ids[:, :-1])[0, :, :VOCAB]
        nll += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    assert result.nll == pytest.approx(nll, rel=1e-6)


@pytest.mark.parametrize("noise_scale,differs", [(0.0, False), (1.0, True)])
def test_without_noise_training_decides_as_inference_does(noise_scale, differs):
    dmc = retrofitted()
    dmc.noise_scale = noise_scale
    loaded = random_model(2, dmc=dmc)
    tokens = torch.randint(0, VOCAB, (2, 48), generator=torch.Generator().manual_seed(1))
    trace = DecisionTrace(loaded.model)
    decisions = []
    for training in (False, True):
        loaded.model.train(training)
        traced_forward(loaded, tokens, trace)
        # of the first layer: deeper ones see what relaxed gates, not hard ones, have made of it
        decisions.append(trace.is_merge_LTBG[0])
    assert 0.2 < decisions[0].float().mean() < 0.8
    assert bool((decisions[0] != decisions[1]).any()) is differs
