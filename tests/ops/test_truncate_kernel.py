"""The Triton kernel of top-k, top-p and min-p: its cases in the interpreter and on a GPU, and that it compiles."""

from types import SimpleNamespace

import pytest
import torch
from kernel_tools import compile_for, resource_usage, run_cases

from megatron_dmc.engine.sampler import truncate_in_order
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
            kernels.truncate_kernel, capability, "fp32", 8, types=types,
            BITS=kernels.BITS, BLOCK=kernels.BLOCK,
        )  # fmt: skip
        usage = resource_usage(compiled)
        print(f"sm_{capability} truncate_kernel: {usage}")
        assert "STACK:0" in usage and "LOCAL:0" in usage


def test_sampler_gives_the_kernel_its_rows():
    calls = []
    cut = {"top_k_B": [0, 5, 9], "top_p_B": [1.0, 0.5, 0.9], "min_p_B": [0.0, 0.1, 0.2]}
    draws = SimpleNamespace(
        **{name: torch.tensor(x) for name, x in cut.items()},
        by_widths=[([5], torch.tensor([1])), ([90], torch.tensor([2]))],
        kernels=SimpleNamespace(
            truncate=lambda *args: calls.append([x.tolist() for x in args[1:]])
        ),
    )
    scores = torch.zeros(3, 90)
    truncate_in_order(scores, draws)
    assert [c[0] for c in calls] == [[1], [2]] and [c[1] for c in calls] == [[5], [9]]
    assert TRUNCATE.choose(scores) == "torch"
    with pytest.raises(ValueError, match="only tensors on a GPU"):
        TRUNCATE.choose(scores, backend="triton")
