"""An engine on the kernels, which needs Megatron as the other kernel cases do not; see kernel_cases_merge.py."""

import pytest
import torch
from kernel_cases_decode import BACKEND, DEVICE  # patches Triton
from tiny_gpt import TinyGPT, dmc_config, drain, greedy_params, make_engine, make_prompts

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
