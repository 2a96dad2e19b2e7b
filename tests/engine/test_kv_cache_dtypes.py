"""The engine with 8-bit pages: the stated accuracy, and that nothing else changes what comes out."""

import argparse
import math

import pytest
import torch
from kv_cache_dtypes import MODEL, compare, heldout_windows
from random_models import random_model, retrofitted
from tiny_gpt import D, check_idle, dmc_config, drain, greedy_params, make_engine, make_prompts

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.checkpoint.load import load_model
from megatron_dmc.engine.flags import add_engine_arguments, make_llm
from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.ops.paged.kv_pages import ScaledPages

# docs/engine.md states these: KL in nats, perplexity relative to float32 pages
BOUNDS = {"fp8": (6e-3, 0.01), "int8": (4e-4, 0.002)}


def test_stated_accuracy_on_heldout_text():
    loaded = load_model(str(MODEL), dtype=torch.float32)
    windows = heldout_windows(loaded.tokenizer, 192, 3)
    for cr in (1.0, 2.0):
        dtypes = [("float32", name) for name in ("auto", *BOUNDS)]
        results = compare(windows, {"float32": loaded}, cr=cr, num_decoded=6, dtypes=dtypes)
        exact = results["float32", "auto"]
        assert exact["measured_cr"] == pytest.approx(cr, rel=0.03)
        for name, (kl, perplexity) in BOUNDS.items():
            figures = results["float32", name]
            assert figures["measured_cr"] == exact["measured_cr"]
            assert 1e-6 < figures["kl"] < kl, (cr, name, figures)
            assert abs(figures["perplexity"] / exact["perplexity"] - 1) < perplexity


@pytest.mark.parametrize("kv_cache_dtype, merge_window", [("fp8", 0), ("int8", None), ("int8", 3)])
def test_chunks_preemption_and_cached_prefixes_change_no_token(kv_cache_dtype, merge_window):
    """Poisoned free pages, as in every engine of these tests."""
    dmc = None if merge_window is None else dmc_config(merge_window)
    prompts = make_prompts(6, seed=4)
    prompts += [prompt + [1, 2] for prompt in prompts[:3]]

    def run(**sizes):
        engine = make_engine(dmc, kv_cache_dtype=kv_cache_dtype, **sizes)
        assert isinstance(engine.context.pool.k_pages_PSD, ScaledPages)
        for i, prompt in enumerate(prompts):
            engine.add_request(str(i), prompt, greedy_params(12, logprobs=0))
        outputs = drain(engine)
        stats = engine.stats()
        assert stats.entry_bytes == 2 * (D + 4)
        check_idle(engine)
        return [outputs[str(i)].outputs[0] for i in range(len(prompts))], stats

    alone, _ = run(max_num_seqs=1, max_num_batched_tokens=1)
    chunked, _ = run(max_num_batched_tokens=9)
    short, stats = run(num_pages=56)
    assert stats.num_preemptions > 0
    shared, stats = run(enable_prefix_caching=True, prefix_block_size=6)
    assert stats.num_prefix_hit_tokens > 0
    for others in (chunked, short, shared):
        for a, b in zip(alone, others, strict=True):
            assert a.token_ids == b.token_ids
            assert math.isclose(a.cumulative_logprob, b.cumulative_logprob, abs_tol=1e-9)
    exact = make_engine(dmc)
    for i, prompt in enumerate(prompts):
        exact.add_request(str(i), prompt, greedy_params(12, logprobs=0))
    outputs = drain(exact)
    assert any(
        outputs[str(i)].outputs[0].cumulative_logprob != a.cumulative_logprob
        for i, a in enumerate(alone)
    ), "the pages were not rounded"


def test_memory_of_the_cache_holds_more_pages():
    loaded = random_model(dmc=retrofitted(), dtype=torch.float32)
    budget = 40_000
    sizes = {}
    for name in ("auto", "fp8", "fp8_e4m3", "int8"):
        llm = LLM(
            loaded, kv_cache_dtype=name, kv_cache_memory_bytes=budget, max_model_len=96,
            device="cpu",
        )  # fmt: skip
        config = llm.engine.config
        assert config.kv_cache_dtype == name
        pool = llm.engine.context.pool
        held = sum(x.numel() * x.element_size() for x in storage(pool))
        assert held == config.num_pages * llm.stats().page_bytes <= budget
        sizes[name] = config.num_pages
        prompt = {"prompt_token_ids": list(range(20))}
        llm.generate(prompt, SamplingParams(temperature=0, max_tokens=4), use_tqdm=False)
    # 8 channels: 32 bytes of float32, 8 and a scale's 4 otherwise
    assert sizes["fp8"] == sizes["fp8_e4m3"] == sizes["int8"]
    assert sizes["fp8"] == pytest.approx(sizes["auto"] * 32 / 12, rel=0.03)


def storage(pool):
    for pages in (pool.k_pages_PSD, pool.v_pages_PSD):
        yield from (
            (pages.values_PSD, pages.scales_PS) if isinstance(pages, ScaledPages) else (pages,)
        )


def test_other_names_are_refused_and_the_flag_is_passed_on():
    loaded = random_model()
    wanted = "kv_cache_dtype='fp8_e5m2': use one of auto, fp8, fp8_e4m3, int8"
    with pytest.raises(UnsupportedConfig, match=wanted):
        LLM(loaded, kv_cache_dtype="fp8_e5m2", device="cpu")

    parser = argparse.ArgumentParser()
    add_engine_arguments(parser)
    args = parser.parse_args([str(MODEL), "--kv-cache-dtype", "int8", "--num-pages", "512"])
    llm = make_llm(args)
    assert llm.engine.context.pool.k_pages_PSD.values_PSD.dtype == torch.int8
