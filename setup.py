"""Builds the CUDA extension `megatron_dmc._C` where that is possible; all else is in pyproject.toml.

Without sources, a CUDA toolkit, a C++ compiler or a matching torch in the build environment the
extension is skipped with one line that says why, and the package runs without it.

Environment:
    MEGATRON_DMC_SKIP_CUDA=1   never build the extension
    CUDA_HOME, CUDA_PATH       folder of the toolkit; default: the one that nvcc on PATH belongs to
    TORCH_CUDA_ARCH_LIST       GPU architectures, as torch writes them
    MAX_JOBS                   compilers at a time
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
CSRC = Path("megatron_dmc") / "csrc"

# PTX of 9.0a would run on Hopper only, so what comes after is served by the PTX of 8.0.
DEFAULT_ARCHITECTURES = "8.0+PTX;9.0a"


class CannotBuild(Exception):
    """Why there will be no CUDA extension."""


def sources() -> list[str]:
    """Paths relative to the root, as setuptools wants them."""
    files = (path for path in (ROOT / CSRC).rglob("*") if path.suffix in (".cu", ".cpp"))
    return sorted(path.relative_to(ROOT).as_posix() for path in files)


def is_toolkit(folder: Path) -> bool:
    headers = [folder / "include", *folder.glob("targets/*/include")]
    return (folder / "bin" / "nvcc").is_file() and any(
        (include / "cuda_runtime.h").is_file() for include in headers
    )


def nvcc_on_path_candidates() -> list[Path]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return []
    candidates = [Path(nvcc).parent.parent, Path(nvcc).resolve().parent.parent]
    # nvcc may be a wrapper script elsewhere; asked for a dry run, the real one names its folder.
    try:
        dry_run = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return candidates
    top = re.search(r"^#\$ TOP=(.+)$", dry_run.stderr + dry_run.stdout, re.MULTILINE)
    if top:
        candidates.append(Path(top.group(1).strip()).resolve())
    return candidates


def find_toolkit() -> Path:
    named = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for folder in named or [*nvcc_on_path_candidates(), Path("/usr/local/cuda")]:
        if is_toolkit(folder):
            return folder
    if named:
        raise CannotBuild(f"no CUDA toolkit in {named[0]}, where CUDA_HOME or CUDA_PATH points")
    raise CannotBuild("no CUDA toolkit (nvcc is not on PATH, and CUDA_HOME is not set)")


def toolkit_version(toolkit: Path) -> str:
    try:
        answer = subprocess.run(
            [toolkit / "bin" / "nvcc", "--version"],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(f"nvcc of {toolkit} does not run ({error})") from error
    release = re.search(r"release (\d+\.\d+)", answer.stdout)
    if not release:
        raise CannotBuild(f"nvcc of {toolkit} does not state its version")
    return release.group(1)


def cuda_build() -> dict:
    """Keywords for `setup()` that build the extension. Raises CannotBuild."""
    if os.environ.get("MEGATRON_DMC_SKIP_CUDA", "0") not in ("", "0"):
        raise CannotBuild("MEGATRON_DMC_SKIP_CUDA is set")
    files = sources()
    if not files:
        raise CannotBuild(f"no sources in {CSRC.as_posix()}")
    toolkit = find_toolkit()
    version = toolkit_version(toolkit)
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise CannotBuild(f"no C++ compiler ({compiler})")
    # torch reads both when its extension builder is imported.
    os.environ["CUDA_HOME"] = str(toolkit)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CUDAExtension
    except (ImportError, OSError) as error:
        raise CannotBuild(
            "torch is not importable in the build environment; "
            "install torch first and use pip's --no-build-isolation"
        ) from error
    if torch.version.cuda is None:
        raise CannotBuild("this torch was built without CUDA")
    if torch.version.cuda.split(".")[0] != version.split(".")[0]:
        raise CannotBuild(f"nvcc is CUDA {version}, but torch was built with {torch.version.cuda}")
    extension = CUDAExtension(
        "megatron_dmc._C",
        files,
        include_dirs=[str(ROOT / CSRC), str(ROOT / CSRC / "include")],
        extra_compile_args={
            "cxx": ["-O3"],
            "nvcc": ["-O3", "-lineinfo"],
        },
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExtension}}


try:
    build = cuda_build()
except CannotBuild as reason:
    print(f"megatron-dmc: CUDA kernels are not built: {reason}", file=sys.stderr)
    build = {}
else:
    print(
        f"megatron-dmc: building CUDA kernels for {os.environ['TORCH_CUDA_ARCH_LIST']} "
        f"with {os.environ['CUDA_HOME']}",
        file=sys.stderr,
    )

setup(**build)
