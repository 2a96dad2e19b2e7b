"""An engine on the kernels, which needs Megatron as the other kernel cases do not; see kernel_cases_merge.py."""

import pytest
import torch
from kernel_cases_decode import BACKEND, DEVICE  # patches Triton
from random_models import random_model, retrofitted
from tiny_gpt import TinyGPT, dmc_config, drain, greedy_params, make_engine, make_prompts

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.engine.graphs import Captured


@pytest.mark.skipif(DEVICE != "cpu" or BACKEND != "triton", reason="a float32 model on the CPU")
@pytest.mark.parametrize(
    "settings", [None, {}, {"merge_delay": 3}, {"policy": "evict", "eviction_delay": 2}], ids=str
)
def test_an_engine_on_the_kernels_gives_the_same_tokens(settings):
    """Decode steps through Triton's kernels, padded as for a graph, pages taken by the kernel."""
    dmc = None if settings is None else dmc_config(**settings)
    results = []
    for backend in ("torch", BACKEND):
        engine = make_engine(dmc, dtype=torch.float32, model=TinyGPT(dmc).float())
        engine.context.store.backend = backend
        if backend != "torch":

            def run_again(work):
                output = work()
                return Captured(lambda: output.copy_(work()), output)

            engine.runner.capture([2], run_again, progress=False)
        for i, prompt in enumerate(make_prompts(2, seed=5, longest=9)):
            engine.add_request(str(i), prompt, greedy_params(6 + i))
        outputs = drain(engine)
        results.append([(o.outputs[0].token_ids, o.metrics.num_entries) for o in outputs.values()])
    assert results[0] == results[1]


@pytest.mark.skipif(DEVICE != "cpu" or BACKEND != "triton", reason="a float32 model on the CPU")
def test_layers_of_few_kernels_give_the_same_tokens(monkeypatch):
    """Megatron's modules, and the block of a GPU: Triton's norms and SwiGLU, products that add."""
    results = []
    for backend in ("torch", "triton"):
        for op in ("NORM", "SWIGLU", "LINEAR"):
            monkeypatch.setenv(f"DMC_{op}_BACKEND", "torch" if op == "LINEAR" else backend)
        llm = LLM(random_model(2, dtype=torch.float32, qk_layernorm=True), device="cpu")
        assert ("forward" in vars(llm.engine.runner.model.decoder)) == (backend == "triton")
        params = SamplingParams(temperature=0, max_tokens=3, logprobs=0)
        prompts = [{"prompt_token_ids": list(range(3, 3 + n))} for n in (1, 7)]
        outputs = [o.outputs[0] for o in llm.generate(prompts, params, use_tqdm=False)]
        results.append(([o.token_ids for o in outputs], [o.cumulative_logprob for o in outputs]))
    (tokens, logprobs), (wanted, theirs) = results
    assert tokens == wanted and logprobs == pytest.approx(theirs, abs=1e-4)


@pytest.mark.skipif(BACKEND != "host", reason="of the CUDA kernels")
@pytest.mark.parametrize(
    "settings, stored",
    [
        (None, "auto"),
        ({}, "auto"),
        ({"merge_window": 3}, "auto"),
        ({"merge_delay": 3}, "auto"),
        ({"merge_delay": 3, "shared_decisions": True}, "int8"),
        ({"policy": "evict", "eviction_delay": 2}, "auto"),
        ({"policy": "evict", "eviction_delay": 2}, "fp8"),
    ],
    ids=str,
)
def test_an_engine_on_the_cuda_kernels(monkeypatch, settings, stored):
    """The operators take what the engine gives them: prompts shorter and longer than a delay, in chunks, and requests that
    end and start. Outputs are PyTorch's within bfloat16's rounding."""
    results = []
    for backend in ("torch", "host"):
        of_prefill = backend if stored == "auto" else "torch"  # its kernels take no pages of 8 bits
        for op, name in {"DECODE": backend, "PAGES": backend, "PREFILL": of_prefill}.items():
            monkeypatch.setenv(f"DMC_{op}_BACKEND", name)
        dmc = None if settings is None else retrofitted(**settings)
        llm = LLM(
            random_model(2, dmc=dmc, dtype=torch.bfloat16, kv_channels=64), device="cpu",
            block_size=8, num_pages=200, max_num_seqs=2, max_num_batched_tokens=24,
            kv_cache_dtype=stored,
        )  # fmt: skip
        params = SamplingParams(temperature=0, max_tokens=4, logprobs=0, ignore_eos=True)
        prompts = [{"prompt_token_ids": list(range(3, 3 + n))} for n in (1, 2, 40, 7)]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        results.append([next(iter(o.outputs[0].logprobs[0].values())).logprob for o in outputs])
        assert [len(o.outputs[0].token_ids) for o in outputs] == [4] * 4
    wanted, ours = results
    assert ours == pytest.approx(wanted, abs=0.25)
