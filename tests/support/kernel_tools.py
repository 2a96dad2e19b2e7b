"""Tools of the kernel tests: cases in a separate process, and compilers without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


def run_cases(*files: str, **environment: str) -> None:
    """Run files of kernel cases in a process of their own: Triton reads its settings once."""
    search_path = os.pathsep.join(
        p for p in (str(TESTS.parents[1]), os.environ.get("PYTHONPATH", "")) if p
    )
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files],
        check=False,
        capture_output=True,
        text=True,
        timeout=580,
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": search_path, "OMP_NUM_THREADS": "1", **environment},
    )
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


def compile_for(
    kernel,
    capability: int,
    dtype: str,
    num_warps: int,
    types=None,
    num_stages: int = 3,
    **constants,
):
    """The kernel compiled for a GPU that need not be here.

    Args:
        dtype: of pointers, except for those that are float32 in every kernel.
        types: other arguments that are neither such a pointer nor a 32-bit integer, by name.
        num_stages: of loops that do not say it themselves; 3 is Triton's default.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    float32 = ("alpha", "omega", "carry", "carry_z", "galpha", "gomega", "far_lse", "lse")
    signature, attributes = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = "*fp32" if name.removeprefix("p_") in float32 else "*" + dtype
        signature[name] = pointer if name.startswith("p_") else "i32"
        if name in (types or {}) or name == "scale":
            signature[name] = (types or {}).get(name, "fp32")
            if not signature[name].startswith("*"):
                continue
        attributes[(i,)] = [["tt.divisibility", 16]]
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return triton.compile(
        ASTSource(kernel, signature, places, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )


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
