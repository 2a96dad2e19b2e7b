"""Training's Triton kernels: their cases in Triton's interpreter and on a GPU, and that they compile without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_dmc import ops

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent
CASES = [ROOT / "tests" / name for name in ("kernel_cases_merge.py", "kernel_cases_diagonal.py")]


def run_cases(**environment: str) -> None:
    search_path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, CASES)],
        check=False,
        capture_output=True,
        text=True,
        timeout=580,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": search_path, "OMP_NUM_THREADS": "1", **environment},
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def test_cases_in_the_interpreter():
    run_cases(TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cases_on_the_gpu():
    run_cases(TRITON_INTERPRET="0")


def test_backend_is_picked_in_one_place():
    x = torch.zeros(3, 1, 2, 16)
    assert ops.merge_backend(x, x) == "torch"  # CPU tensors
    assert ops.merge_backend(x.double(), x.double(), backend="triton") == "torch"
    assert ops.merge_backend(x, x, backend="triton") == "triton"
    with pytest.raises(ValueError, match="'cuda' is unknown; choose torch or triton"):
        ops.merge(x, x, x[..., 0], x[..., 0], backend="cuda")
    with pytest.raises(ValueError, match="different shapes"):
        ops.merge(x, x[..., :8], x[..., 0], x[..., 0], backend="triton")


def compile_for(kernel, capability: int, dtype: str, num_warps: int, **constants):
    """The kernel compiled for a GPU that need not be here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    float32 = ("alpha", "omega", "carry", "carry_z", "galpha", "gomega", "past_lse", "lse", "own")
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = "*fp32" if name.removeprefix("p_") in float32 else "*" + dtype
        signature[name] = pointer if name.startswith("p_") else "i32"
        if name == "scale":
            signature[name] = "fp32"
            continue
        attributes[(i,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return triton.compile(
        ASTSource(kernel, signature, places, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps},
    )


def cases_to_compile():
    for capability in (80, 90):
        for dtype in ("bf16", "fp32"):
            for name in ("unlimited", "windowed"):
                for direction in ("forward", "backward"):
                    yield capability, dtype, name, direction


@pytest.mark.parametrize("full_size", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_kernels_compile_without_a_gpu(full_size):
    """For an A100 and an H100; in full size with their registers and spills in the test's output."""
    from megatron_dmc.ops.triton import merge as kernels

    for capability, dtype, name, direction in cases_to_compile():
        if not full_size and (capability, dtype) not in ((80, "fp32"), (90, "bf16")):
            continue
        window = 12 if name == "windowed" else 0
        tiling = kernels.Tiling(32 if window else 16, 16, num_warps=2, num_stages=2)
        if full_size:
            tiling = kernels.default_tiling(
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
        kernel = getattr(kernels, f"{name}_{direction}_kernel")
        compiled = compile_for(kernel, capability, dtype, tiling.num_warps, **constants)
        assert len(compiled.asm["cubin"]) > 0
        if full_size:
            usage = resource_usage(compiled)
            print(f"sm_{capability} {dtype} {name} {direction} {tiling}: {usage}")


@pytest.mark.parametrize("name", ["join_kernel", "add_gradients_kernel"])
def test_diagonal_kernels_compile_without_a_gpu(name):
    from megatron_dmc.ops.triton import diagonal as kernels

    for capability in (80, 90):
        compiled = compile_for(
            getattr(kernels, name), capability, "bf16", 8, D=128, I=32, F=128, PAST=True
        )
        print(f"sm_{capability} bf16 {name}: {resource_usage(compiled)}")
        assert compiled.asm["ptx"].count("ld.global.v4") + compiled.asm["ptx"].count(".v4.b32") > 0


def resource_usage(compiled) -> str:
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        output = subprocess.run(
            [str(tool), "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    line = next(x for x in output.splitlines() if "REG:" in x)
    return f"{line.split(' CONSTANT')[0].strip()}, dynamic shared {compiled.metadata.shared}"
