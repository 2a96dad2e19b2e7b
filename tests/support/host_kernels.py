"""The CUDA kernels on the CPU: compiled by the host's compiler and run by tests/support/csrc/emulator.h.

The operators are those of `megatron_dmc/csrc/binding.cpp` with all of its checks, and `megatron_dmc.ops.cuda` calls them.
Only the launches are others.
"""

import os
import subprocess
from pathlib import Path
from sysconfig import get_paths
from types import SimpleNamespace

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from megatron_dmc.ops import cuda
from megatron_dmc.ops.cuda import decode, pages, prefill

SOURCES = Path(__file__).resolve().parent / "csrc"
CSRC = SOURCES.parents[2] / "megatron_dmc" / "csrc"
INCLUDE = CSRC / "include"


def _command(source: Path, target: Path, *options: str) -> list[str]:
    compiler = os.environ.get("CXX", "c++").split()
    warnings = (
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-Wno-missing-field-initializers",
    )
    return [
        *compiler, "-std=c++17", *warnings, f"-I{INCLUDE}", *options, str(source), "-o", str(target)
    ]  # fmt: skip


def compile_host(source: str, target: Path, *options: str) -> None:
    subprocess.run(_command(SOURCES / source, target, "-O2", *options), check=True)


def compile_library(target: Path, device_type: str = "at::kCPU") -> None:
    """For `install`, which finds it by DMC_HOST_LIBRARY.

    Args:
        device_type: of the tensors that the operators take.
    """
    kernels, binding = target.with_name("kernels.o"), target.with_suffix(".o")
    headers = [f"-I{SOURCES / 'host_cuda'}", f"-I{CSRC}", "-fPIC", "-c"]
    of_torch = [f"-isystem{path}" for path in (*include_paths(), get_paths()["include"])]
    device = f"-DDMC_DEVICE_TYPE={device_type}"
    commands = [_command(CSRC / "binding.cpp", binding, *headers, *of_torch, device)]
    if not kernels.exists():
        # compiles faster than with -O2
        commands.append(_command(SOURCES / "host_kernels.cpp", kernels, *headers, "-O1"))
    compilers = [subprocess.Popen(command) for command in commands]
    codes = [compiler.wait() for compiler in compilers]
    assert not any(codes)
    libraries = [f"-L{path}" for path in library_paths()] + ["-lc10", "-ltorch_cpu"]
    subprocess.run(_command(kernels, target, str(binding), "-shared", *libraries), check=True)


def install() -> SimpleNamespace:
    """Load the operators for `ops.cuda`.

    Returns:
        the kernels of all ops, which take what the operators take.
    """
    torch.ops.load_library(os.environ["DMC_HOST_LIBRARY"])
    cuda.operators = lambda: torch.ops.megatron_dmc
    workers = torch.ops.megatron_dmc.count_workers(64, torch.empty(0))
    decode._num_workers = lambda *args: workers
    kernels = {**vars(prefill), **vars(pages), **vars(decode)}
    return SimpleNamespace(**kernels | {"refusal": lambda *args: ""})
