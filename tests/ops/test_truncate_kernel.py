"""The Triton kernel of top-k, top-p and min-p: its cases in the interpreter and on a GPU, and that it compiles."""

from types import SimpleNamespace

import pytest
import torch
from kernel_tools import compile_for, resource_usage, run_cases

from megatron_dmc import SamplingParams
from megatron_dmc.engine.request import Request
from megatron_dmc.engine.sampler import Sampler
from megatron_dmc.ops.backends import TRUNCATE

pytest.importorskip("triton")


def test_cases_in_the_interpreter():
    run_cases("kernel_cases_truncate.py", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cases_on_the_gpu():
    run_cases("kernel_cases_truncate.py", TRITON_INTERPRET="0")


def test_kernel_compiles_without_a_gpu():
    from megatron_dmc.ops.triton import truncate as kernels

    types = {
        "p_scores": "*fp32", "p_rows": "*i64", "p_top_k": "*i64", "p_top_p": "*fp64", "p_min_p": "*fp64",
    }  # fmt: skip
    for capability in (80, 90):
        compiled = compile_for(
            kernels.truncate_kernel, capability, "fp32", kernels.NUM_WARPS, types=types,
            BITS=kernels.BITS, BLOCK=kernels.BLOCK,
        )  # fmt: skip
        usage = resource_usage(compiled)
        print(f"sm_{capability} truncate_kernel: {usage}")
        assert "STACK:0" in usage and "LOCAL:0" in usage


def test_the_sampler_cuts_all_rows_in_one_call(monkeypatch):
    calls = []
    kernels = SimpleNamespace(truncate=lambda *args: calls.append([x.tolist() for x in args[1:]]))
    scores = torch.zeros(4, 2000)
    assert TRUNCATE.choose(scores) == "torch"
    with pytest.raises(ValueError, match="only tensors on a GPU"):
        TRUNCATE.choose(scores, backend="triton")
    monkeypatch.setattr(TRUNCATE, "kernels", lambda backend: kernels)
    cut = [{"top_k": 5}, {}, {"top_p": 0.5}, {"top_k": 1500, "min_p": 0.25}]
    requests = [
        Request(f"r{i}", i, None, [1], SamplingParams(seed=i, **more), 8)
        for i, more in enumerate(cut)
    ]
    Sampler().sample(scores, requests)
    assert calls == [[[0, 2, 3], [5, 0, 1500], [1.0, 0.5, 1.0], [0.0, 0.0, 0.25]]]
