"""Engine statistics: lengths, fragmentation, rates, and decisions that flip on recomputation."""

import numpy as np
import pytest
import torch
from random_models import VOCAB, random_model, retrofitted
from tiny_gpt import (
    MAX_LEN,
    D,
    G,
    L,
    TinyGPT,
    dmc_config,
    drain,
    greedy_params,
    make_engine,
    make_prompts,
)

from megatron_dmc.engine import EngineConfig, LLMEngine
from megatron_dmc.engine.request import RequestDecisions
from megatron_dmc.errors import UnsupportedConfig


def test_lengths_pages_and_fragmentation_are_those_of_the_running_requests():
    engine = make_engine(dmc_config(), max_num_batched_tokens=64)
    prompts = make_prompts(3, seed=2)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy_params(9))
    assert engine.lengths("0") is None and engine.stats().fragmentation is None
    for _ in range(3):
        engine.step()
    stats = engine.stats()
    lengths = torch.tensor([engine.lengths(str(i)) for i in range(3)])
    assert lengths.shape == (3, L, G)
    for i, prompt in enumerate(prompts):
        cached = prompt + engine._requests[str(i)].output_token_ids[:-1]
        _, alpha_LTG = TinyGPT(dmc_config()).full_forward(cached)
        assert torch.equal(lengths[i], (1 - alpha_LTG).sum(1).long())
    assert stats.running_entries_LG == lengths.sum(0).tolist()
    pages = int((-(-lengths // 4)).sum())
    assert stats.num_pages_in_use == pages
    assert stats.entry_bytes == 2 * D * 8 and stats.page_bytes == 4 * stats.entry_bytes
    assert stats.fragmentation == pytest.approx(pages * 4 / int(lengths.sum()))
    assert stats.fragmentation > 1
    # one step prefilled all prompts (one of them may be a single token), two steps decoded
    assert stats.num_prefill_tokens + stats.num_decode_tokens == sum(map(len, prompts)) + 6
    assert stats.num_decode_only_tokens == 6
    assert stats.prefill_tokens_per_second == stats.num_prefill_tokens / stats.prefill_seconds
    assert stats.decode_tokens_per_second == 6 / stats.decode_seconds
    assert stats.busy_seconds == stats.prefill_seconds + stats.decode_seconds
    assert engine._requests["0"].metrics.first_scheduled_time is not None


def test_record_counts_each_flipped_decision():
    rng = np.random.default_rng(0)
    record = RequestDecisions()
    first = rng.random((3, 10, 5)) < 0.5
    assert record.add(0, first[:, :6]) == (0, 0)
    assert record.add(6, first[:, 6:]) == (0, 0)
    again = first.copy()
    again[1, 4, 2] ^= True
    again[2, 4, 0] ^= True
    again[0, 7, 1] ^= True
    again[:, 0] ^= True  # the first token has no decision
    assert record.add(0, again[:, :5]) == (5 * 15, 2)
    assert record.add(5, again[:, 5:]) == (5 * 15, 1)
    assert record.add(4, first[:, 4:5]) == (15, 2)
    # a cached prefix leaves a gap, which is not compared
    record = RequestDecisions()
    assert record.add(4, first[:, 4:6]) == (0, 0)
    assert record.add(0, again[:, :6]) == (2 * 15, 2)


def preempted_stats(dtype):
    loaded = random_model(2, dmc=retrofitted(), dtype=dtype)
    engine = LLMEngine(
        loaded.model, loaded.description, None,
        EngineConfig(max_model_len=64, num_pages=120, block_size=4, max_num_seqs=6,
                     max_num_batched_tokens=48, count_flipped_decisions=True),
        dtype=dtype,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for i in range(8):
        prompt = torch.randint(0, VOCAB, (9 + i,), generator=generator).tolist()
        engine.add_request(str(i), prompt, greedy_params(30))
    outputs = drain(engine)
    stats = engine.stats()
    assert stats.num_preemptions > 0
    tokens = sum(len(o.prompt_token_ids) for o in outputs.values())
    assert 0 < stats.num_repeated_decisions
    assert stats.num_repeated_decisions % (3 * 2) == 0
    assert stats.num_prompt_tokens == tokens
    return stats


def test_flipped_decisions_are_counted_and_there_are_none_in_float64():
    assert preempted_stats(torch.float64).num_flipped_decisions == 0


def test_flipped_decisions_are_reported_in_bfloat16():
    stats = preempted_stats(torch.bfloat16)
    share = stats.num_flipped_decisions / stats.num_repeated_decisions
    print(f"{stats.num_flipped_decisions} of {stats.num_repeated_decisions} decisions flipped")
    assert share < 0.25


def test_only_16_bit_models_record_by_default():
    engine = make_engine(dmc_config(), num_pages=48)
    for i, prompt in enumerate(make_prompts(5, seed=3, longest=8)):
        engine.add_request(str(i), prompt, greedy_params(20))
    drain(engine)
    assert engine.stats().num_repeated_decisions == 0
    with pytest.raises(UnsupportedConfig, match="scheduling_policy='lifo'"):
        EngineConfig(max_model_len=MAX_LEN, num_pages=9, scheduling_policy="lifo")
