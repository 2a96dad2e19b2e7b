"""Prefill's Triton kernels: their cases in Triton's interpreter and on a GPU, and that they compile
without one."""

import pytest
import torch
from kernel_tools import compile_for, resource_usage, run_cases
from test_decode_kernels import spilled_bytes

pytest.importorskip("triton")


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("large", ["0", pytest.param("1", marks=pytest.mark.exhaustive)])
def test_cases_in_the_interpreter(large):
    run_cases("kernel_cases_prefill.py", TRITON_INTERPRET="1", DMC_LARGE_CASES=large)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_cases_on_the_gpu(backend):
    if backend == "cuda":
        cuda = pytest.importorskip("megatron_dmc.ops.cuda")
        if reason := cuda.absence():
            pytest.skip(reason)
    run_cases(
        "kernel_cases_prefill.py", TRITON_INTERPRET="0", DMC_LARGE_CASES="1",
        DMC_TESTED_BACKEND=backend,
    )  # fmt: skip


TYPES = {
    "p_is_merge": "*u8", "p_chunks": "*i32", "p_tiles": "*i32", "p_tile_starts": "*i32",
    "p_entries": "*i64", "p_appends": "*i32", "p_base": "*i32", "p_entry": "*i32",
    "p_table": "*i32", "p_keep": "*fp32", "p_tails": "*fp32", "p_segments": "*fp32",
    "p_far": "*i32",
}  # fmt: skip


def kernels_to_compile(group, dim, window, capability):
    """(kernel, warps, constants) as the host side launches them for half precision on a GPU."""
    from megatron_dmc.ops.triton import prefill_attention as attention
    from megatron_dmc.ops.triton import prefill_write as write

    if attention.INTERPRETED:
        raise RuntimeError("these are the interpreter's sizes")
    for delay, own in ((0, True), (16, True), (17, False)):
        sizes = attention.blocks_of(dim, group, 2, capability // 10, delay)
        queries, entries, num_warps, stages = sizes
        yield (
            attention.attend_kernel,
            num_warps,
            dict(
                R=group, Q=queries, D=dim, F=max(16, 1 << (dim - 1).bit_length()), S=16, I=entries,
                HALF=dim // 2, COMPRESS=True, OWN=own, STAGES=stages, DELAY=delay, INTERPRET=False,
            ),
        )  # fmt: skip
    tile = write.WINDOWED_TILE if window else write.TILE
    channels = write.channels_of(dim, window)
    yield (
        write.tails_kernel,
        4,
        dict(D=dim, I=tile, OWN=tile - max(window - 1, 0), F=channels, SUM=not window, FIRST=16),
    )
    yield (
        write.carry_kernel,
        4,
        dict(
            A=2 * dim + 1,
            C=write.TILES_OF_BLOCK,
            F=write.COMPONENTS,
            SUM=not window,
            FIRST=16,
            INTERPRET=False,
        ),
    )
    yield (
        write.write_kernel,
        4,
        dict(
            D=dim,
            I=tile,
            W=window,
            F=channels,
            S=16,
            HALF=dim // 2,
            COMPRESS=True,
            FIRST=16,
            INTERPRET=False,
        ),
    )
    if window:
        yield write.kept_kernel, 4, dict(D=dim, W=window, C=16, F=128, FIRST=16)


@pytest.mark.parametrize("full_size", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_kernels_compile_without_a_gpu_and_without_spills(full_size):
    """For an A100 and an H100; with their registers in the test's output."""
    shapes = [(4, 128, 0)]
    if full_size:
        shapes = [(1, 64, 0), (1, 96, 0), (1, 128, 0), (8, 128, 12), (8, 256, 0), (1, 256, 12)]
    for capability in (80, 90) if full_size else (90,):
        for group, dim, window in shapes:
            for kernel, num_warps, constants in kernels_to_compile(group, dim, window, capability):
                compiled = compile_for(kernel, capability, "bf16", num_warps, TYPES, **constants)
                usage = resource_usage(compiled)
                print(
                    f"sm_{capability} bf16 {kernel.__name__} R={group} D={dim} W={window}: {usage}"
                )
                assert spilled_bytes(usage) == 0, (kernel.__name__, capability, usage)
