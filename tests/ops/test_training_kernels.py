"""Training's Triton kernels: their cases in Triton's interpreter and on a GPU, and that they compile without one."""

import pytest
import torch
from kernel_tools import compile_for, resource_usage, run_cases

from megatron_dmc import ops
from megatron_dmc.ops.backends import MERGE

pytest.importorskip("triton")
CASES = ("kernel_cases_merge.py", "kernel_cases_near.py")


def test_cases_in_the_interpreter():
    run_cases(*CASES, TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cases_on_the_gpu():
    run_cases(*CASES, TRITON_INTERPRET="0")


def test_backend_is_picked_in_one_place():
    x = torch.zeros(3, 1, 2, 16)
    assert MERGE.choose(x, x, 0) == "torch"  # CPU tensors
    with pytest.raises(
        ValueError, match="'cuda' does not exist; the back ends are triton .*, torch"
    ):
        ops.merge(x, x, x[..., 0], x[..., 0], backend="cuda")
    with pytest.raises(ValueError, match="'triton' cannot run .* on cpu; .*only tensors on a GPU"):
        ops.merge(x, x, x[..., 0], x[..., 0], backend="triton")


def cases_to_compile():
    for capability in (80, 90):
        for dtype in ("bf16", "fp32"):
            for name in ("unlimited", "windowed"):
                for direction in ("forward", "backward"):
                    yield capability, dtype, name, direction


@pytest.mark.parametrize("full_size", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_kernels_compile_without_a_gpu(full_size):
    """For an A100 and an H100; in full size with their registers and spills in the test's output."""
    from megatron_dmc.ops.triton import merge, merge_kernels

    for capability, dtype, name, direction in cases_to_compile():
        if not full_size and (capability, dtype) not in ((80, "fp32"), (90, "bf16")):
            continue
        window = 12 if name == "windowed" else 0
        tiling = merge.Tiling(32 if window else 16, 16, num_warps=2, num_stages=2)
        if full_size:
            tiling = merge.default_tiling(
                128, window, backward=direction == "backward", capability=capability // 10
            )
        constants = dict(
            D=128 if full_size else 16, I=tiling.tokens, F=tiling.channels, INTERPRET=False
        )
        if window:
            constants["W"] = window
        else:
            constants["STAGES"] = tiling.num_stages
            if direction == "forward":
                constants["SAVE"] = True
        kernel = getattr(merge_kernels, f"{name}_{direction}_kernel")
        compiled = compile_for(kernel, capability, dtype, tiling.num_warps, **constants)
        assert len(compiled.asm["cubin"]) > 0
        if full_size:
            usage = resource_usage(compiled)
            print(f"sm_{capability} {dtype} {name} {direction} {tiling}: {usage}")


@pytest.mark.parametrize("full_size", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_near_kernels_compile_without_a_gpu(full_size):
    """The diagonal's, a merge delay's and eviction's; in full size without spills."""
    from megatron_dmc.ops.triton import near

    variants = [(0, False, True), (16, True, True), (17, True, False)]
    for n, has_near, has_open in variants if full_size else variants[1:2]:
        dim = 128 if full_size else 16
        tiling = near.tiling(dim, n) if full_size else {"I": 16, "F": 16, "num_warps": 4}
        for capability in (80, 90) if full_size else (90,):
            for name in ("join_kernel", "add_gradients_kernel"):
                compiled = compile_for(
                    getattr(near, name), capability, "bf16", num_stages=1, D=dim, NEAR=has_near,
                    OPEN=has_open, FAR=True, INTERPRET=False, **tiling,
                )  # fmt: skip
                assert len(compiled.asm["cubin"]) > 0
                if full_size:
                    ptx = compiled.asm["ptx"]
                    assert ptx.count("ld.global.v4") + ptx.count(".v4.b32") > 0
                    usage = resource_usage(compiled)
                    print(f"sm_{capability} bf16 {name} n={n} open={has_open}: {usage}")
                    assert "STACK:0" in usage
