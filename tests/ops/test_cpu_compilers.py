"""CPU kernels with other compilers than the host's: the portable set, which processors without AVX2 build, and the
oldest GCC. What is not installed is skipped; `tests/support/run_compilers.sh` installs them."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from torch.utils import cpp_extension

CSRC = Path(__file__).resolve().parents[2] / "megatron_dmc" / "csrc"
HEADERS = (CSRC, CSRC / "include", *cpp_extension.include_paths(), sysconfig.get_paths()["include"])
AVX2 = ("-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c")


def compile_with(compiler: str, source: str, *options: str) -> str:
    """The compiler's output; without such a compiler the test is skipped."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    command = [
        compiler,
        "-std=c++17",
        *(f"-I{path}" for path in HEADERS),
        *options,
        str(CSRC / "cpu" / source),
    ]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.mark.parametrize(
    "compiler",
    ["c++", *(pytest.param(x, marks=pytest.mark.exhaustive) for x in ("g++-11", "clang++"))],
)
def test_portable_kernels(compiler):
    compile_with(compiler, "kernels.cpp", "-fsyntax-only", "-DCPU_CAPABILITY=DEFAULT")


@pytest.mark.exhaustive
def test_oldest_gcc():
    compile_with("g++-11", "kernels.cpp", "-fsyntax-only", "-DCPU_CAPABILITY=AVX2", *AVX2)
    compile_with("g++-11", "binding.cpp", "-fsyntax-only")


@pytest.mark.exhaustive
def test_arm():
    """Products by NEON's multiply-adds of whole registers."""
    assembly = compile_with(
        "aarch64-linux-gnu-g++", "kernels.cpp", "-O3", "-S", "-o-", "-DCPU_CAPABILITY=DEFAULT"
    )
    assert assembly.count("\tfmla\tv") > 500
    compile_with("aarch64-linux-gnu-g++", "binding.cpp", "-fsyntax-only")
