"""Decoding's Triton kernels: their cases in Triton's interpreter and on a GPU, and that they compile
without one; and which backend runs."""

import pytest
import torch
from kernel_tools import compile_for, resource_usage, run_cases
from torch._subclasses import FakeTensorMode

from megatron_dmc.ops import cuda
from megatron_dmc.ops.backends import DECODE
from megatron_dmc.ops.paged import decode

pytest.importorskip("triton")


@pytest.mark.parametrize("large", ["0", pytest.param("1", marks=pytest.mark.exhaustive)])
def test_cases_in_the_interpreter(large):
    run_cases(
        "kernel_cases_decode.py",
        "kernel_cases_pages.py",
        "kernel_cases_engine.py",
        TRITON_INTERPRET="1",
        DMC_LARGE_CASES=large,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend, overlap", [("triton", "0"), ("cuda", "0"), ("cuda", "1")])
def test_cases_on_the_gpu(backend, overlap):
    if backend == "cuda":
        cuda = pytest.importorskip("megatron_dmc.ops.cuda")
        if reason := cuda.absence():
            pytest.skip(reason)
    run_cases(
        "kernel_cases_decode.py", "kernel_cases_pages.py", TRITON_INTERPRET="0", DMC_LARGE_CASES="1",
        DMC_TESTED_BACKEND=backend, DMC_PROGRAMMATIC_LAUNCH=overlap,
    )  # fmt: skip


TYPES = {
    "p_is_merge": "*u8", "p_positions": "*i64", "p_rows": "*i64", "p_table": "*i32",
    "p_entries": "*i64", "p_segments": "*fp32", "p_free": "*i32", "p_free_state": "*i32",
    "p_late_merge": "*u8", "p_late_omega": "*fp32", "p_plan": "*i32", "p_part": "*fp32",
    "p_part_lse": "*fp32", "alpha_offset": "fp32", "eps": "fp32", "p_ids": "*i32", "p_extra": "*i32",
}  # fmt: skip
PAGE_TYPES = [
    {"p_k_pages": pages, "p_v_pages": pages, "p_k_scales": scales, "p_v_scales": scales}
    for pages, scales in (("*bf16", "*bf16"), ("*u8", "*fp32"), ("*i8", "*fp32"))
]


def attention_kernels(group, dim, stored):
    from megatron_dmc.ops.triton import decode_attention as kernels

    queries = 1 if group == 1 else 16
    sizes = dict(R=group, D=dim, F=max(16, 1 << (dim - 1).bit_length()))
    tile = dict(I=kernels.TILE)
    yield (
        kernels.attend_kernel,
        4,
        dict(Q=queries, S=16, BLOCK=128, INTERPRET=False, STORED=stored, **sizes, **tile),
    )
    yield kernels.join_kernel, 4, dict(Q=group, **sizes)
    yield kernels.plan_kernel, 8, dict(BLOCK=1024, **tile)


def release_kernel():
    from megatron_dmc.ops.triton import pages

    yield pages.release_kernel, 4, dict(BLOCK=pages.BLOCK)


def append_kernel(group, dim, window, stored, delay=0, evicts=False):
    from megatron_dmc.ops.triton import decode_append as kernels

    half = dim // 2
    constants = dict(
        D=dim, S=16, U=max(window, 1), R=group, HALF=half, H=1 << (half - 1).bit_length(), Z=1,
        COMPRESS=True, GATES_GIVEN=False, MAY_MERGE=True, WINDOWED=window > 0, ROTATE_Q=True,
        TAKE_PAGES=True, STORED=stored, DELAY=delay, EVICT=evicts,
    )  # fmt: skip
    yield kernels.append_kernel, 1, constants


def spilled_bytes(usage: str) -> int:
    """Of `resource_usage`: the stack frame, where Triton's spills are."""
    return int(usage.split("STACK:")[1].split()[0])


@pytest.mark.parametrize("full_size", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_kernels_compile_without_a_gpu_and_without_spills(full_size):
    """For an A100 and an H100; with their registers in the test's output."""
    shapes = ((1, 128, 0), (8, 128, 0), (8, 256, 0), (8, 128, 1), (8, 128, 2), (1, 128, 1))
    for capability in (80, 90):
        for group, dim, stored in shapes if full_size else ((8, 128, 0), (8, 128, 1)):
            cases = [*append_kernel(group, dim, 0, stored), *attention_kernels(group, dim, stored)]
            cases += append_kernel(group, dim, 0, stored, delay=16)
            cases += append_kernel(group, dim, 0, stored, delay=17, evicts=True)
            cases += release_kernel()
            if full_size and not stored:
                cases += append_kernel(group, dim, 12, stored)
            for kernel, num_warps, constants in cases:
                if stored and "STORED" not in constants:
                    continue  # does not see pages
                types = {**TYPES, **PAGE_TYPES[stored]}
                compiled = compile_for(
                    kernel, capability, "bf16", num_warps, types=types, **constants
                )
                usage = resource_usage(compiled)
                window = constants["U"] if constants.get("WINDOWED") else 0
                print(
                    f"sm_{capability} {('bf16', 'e4m3', 'int8')[stored]} {kernel.__name__} R={group} "
                    f"D={dim} W={window}: {usage}"
                )
                assert spilled_bytes(usage) == 0, (kernel.__name__, capability, usage)


def test_what_the_extension_is_built_for(monkeypatch):
    monkeypatch.setattr(cuda, "absence", lambda: "")
    with FakeTensorMode():
        for dim, most in ((128, 16), (256, 8)):
            on_gpu = torch.empty(1, dim, dtype=torch.bfloat16, device="cuda")
            reason = DECODE.refusal("cuda", on_gpu, 16, most + 1)
            assert reason == f"{most + 1} query heads for each KV head, more than {most}"


def test_pytorch_needs_no_plan():
    x, entries = torch.zeros(1, 2, 64), torch.tensor([[[3, 5]]])
    plan = decode.plan_decode_attention(entries, torch.tensor([0]), like=x, page_size=16)
    assert plan == [None]
