"""The Triton kernels of RMSNorm and SwiGLU: their cases in the interpreter and on a GPU, that they compile, and what
they leave to PyTorch."""

import pytest
import torch
from kernel_tools import compile_for, resource_usage, run_cases

from megatron_dmc.ops.backends import NORM, SWIGLU

pytest.importorskip("triton")


def test_cases_in_the_interpreter():
    run_cases("kernel_cases_step.py", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cases_on_the_gpu():
    run_cases("kernel_cases_step.py", TRITON_INTERPRET="0")


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_a_gpu(capability):
    from megatron_dmc.ops.triton import norm, swiglu

    compiled = {"swiglu": compile_for(swiglu.swiglu_kernel, capability, "bf16", 4, BLOCK=1024)}
    for channels in (4096, 8192, norm.MAX_CHANNELS):
        for adds in (False, True):
            compiled[f"rms_norm, {channels} channels, adds={adds}"] = compile_for(
                norm.rms_norm_kernel, capability, "bf16", norm.warps(channels),
                types={"eps": "fp32"}, ADDS=adds, BLOCK=channels,
            )  # fmt: skip
    for name, kernel in compiled.items():
        usage = resource_usage(kernel)
        print(f"sm_{capability} {name}: {usage}")
        assert "STACK:0" in usage and "LOCAL:0" in usage


def test_refusals():
    weight = torch.zeros(8)
    for op in (NORM, SWIGLU):
        for given, reason in ((weight, "only tensors on a GPU"), (weight.double(), "float64")):
            with pytest.raises(ValueError, match=reason):
                op.choose(given, backend="triton")
    with pytest.raises(ValueError, match="40000 channels, more than 32768"):
        NORM.choose(torch.zeros(40000), backend="triton")
