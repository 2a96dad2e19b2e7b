"""Build the extensions if possible: `megatron_dmc._C` (CUDA kernels) and `megatron_dmc._cpu` (CPU kernels);
everything else is in pyproject.toml.

Without sources, a CUDA toolkit, a C++ compiler or a matching torch in the build environment an
extension is skipped with a one-line reason, and the package runs without it.

Environment:
    MEGATRON_DMC_SKIP_CUDA=1   never build the CUDA extension
    MEGATRON_DMC_SKIP_CPU=1    never build the CPU extension
    CUDA_HOME, CUDA_PATH       folder of the toolkit; default: the one that nvcc on PATH belongs to
    TORCH_CUDA_ARCH_LIST       GPU architectures, as torch writes them
    MAX_JOBS                   compilers at a time
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = Path("megatron_dmc") / "csrc"

# PTX of 9.0a would run on Hopper only, so what comes after is served by the PTX of 8.0.
DEFAULT_ARCHITECTURES = "8.0+PTX;9.0a"


AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
INSTRUCTION_SETS = {
    "AVX2": ["-DCPU_CAPABILITY_AVX2", *AVX2],
    "AVX512": ["-DCPU_CAPABILITY_AVX512", *AVX512],
    "AVX512_BF16": ["-DCPU_CAPABILITY_AVX512", *AVX512, "-mavx512bf16"],
}
"""Instruction sets of the CPU kernels on x86-64; the best one is chosen at run time. On other machines the
compiler's default applies."""


class CannotBuild(Exception):
    """An extension cannot be built; the message is the reason."""


def sources(folder: Path) -> list[str]:
    """Paths relative to the root, as setuptools wants them."""
    files = (path for path in (ROOT / folder).glob("*") if path.suffix in (".cu", ".cpp"))
    found = sorted(path.relative_to(ROOT).as_posix() for path in files)
    if not found:
        raise CannotBuild(f"no sources in {folder.as_posix()}")
    return found


def find_compiler() -> str:
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        raise CannotBuild(f"no C++ compiler ({compiler})")
    return compiler


def find_torch():
    """The modules `torch` and `torch.utils.cpp_extension`."""
    try:
        import torch
        from torch.utils import cpp_extension
    except (ImportError, OSError) as error:
        raise CannotBuild(
            "torch is not importable in the build environment; "
            "install torch first and use pip's --no-build-isolation"
        ) from error
    return torch, cpp_extension


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


def cuda_extension():
    """`megatron_dmc._C`. Raises CannotBuild."""
    if os.environ.get("MEGATRON_DMC_SKIP_CUDA", "0") not in ("", "0"):
        raise CannotBuild("MEGATRON_DMC_SKIP_CUDA is set")
    files = sources(CSRC)
    toolkit = find_toolkit()
    version = toolkit_version(toolkit)
    find_compiler()
    # torch reads both when its extension builder is imported.
    os.environ["CUDA_HOME"] = str(toolkit)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    torch, cpp_extension = find_torch()
    if torch.version.cuda is None:
        raise CannotBuild("this torch was built without CUDA")
    if torch.version.cuda.split(".")[0] != version.split(".")[0]:
        raise CannotBuild(f"nvcc is CUDA {version}, but torch was built with {torch.version.cuda}")
    return cpp_extension.CUDAExtension(
        "megatron_dmc._C",
        files,
        include_dirs=[str(ROOT / CSRC), str(ROOT / CSRC / "include")],
        extra_compile_args={
            "cxx": ["-O3"],
            "nvcc": ["-O3", "-lineinfo"],
        },
    )


def cpu_extension():
    """`megatron_dmc._cpu`; `build_command` compiles its kernels. Raises CannotBuild."""
    if os.environ.get("MEGATRON_DMC_SKIP_CPU", "0") not in ("", "0"):
        raise CannotBuild("MEGATRON_DMC_SKIP_CPU is set")
    binding, kernels = sources(CSRC / "cpu")
    find_compiler()
    _, cpp_extension = find_torch()
    extension = cpp_extension.CppExtension(
        "megatron_dmc._cpu",
        [binding],
        depends=[kernels],
        include_dirs=[str(ROOT / CSRC), str(ROOT / CSRC / "include")],
    )
    extension.optional = (
        True  # a compiler that fails must not keep the package from being installed
    )
    return extension


def instruction_sets() -> dict[str, list[str]]:
    """Instruction sets of the CPU kernels and their compiler options; the oldest first, since a linker
    keeps the first copy of an inline function."""
    options = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-DNDEBUG"]
    if sys.platform == "linux" and "clang" not in compiler_version():
        # GCC's calls are those of the OpenMP that torch brings; nothing is linked for them
        options.append("-fopenmp")
    sets = INSTRUCTION_SETS if platform.machine() in ("x86_64", "AMD64") else {"DEFAULT": []}
    return {name: [*options, f"-DCPU_CAPABILITY={name}", *own] for name, own in sets.items()}


def compiler_version() -> str:
    command = [*os.environ.get("CXX", "c++").split(), "--version"]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout


def build_command(base: type) -> type:
    """The command `build_ext`, `base` being torch's."""

    class BuildExtensions(base):
        def build_extension(self, extension) -> None:
            if extension.name != "megatron_dmc._cpu":
                super().build_extension(extension)
                return
            try:
                extension.extra_objects = self.compile_kernels(extension)
                super().build_extension(extension)
            except RuntimeError as error:  # of torch's own build of the binding
                raise CompileError(str(error)) from error

        def compile_kernels(self, extension) -> list[str]:
            folder = Path(self.build_temp).resolve() / "cpu"
            folder.mkdir(parents=True, exist_ok=True)
            # setuptools has added Python's own
            paths = (*extension.include_dirs, *self.compiler.include_dirs)
            command = [*os.environ.get("CXX", "c++").split(), *(f"-I{path}" for path in paths)]

            def compile_for(name: str, options: list[str]) -> str:
                target = str(folder / f"{name}.o")
                result = subprocess.run(
                    [*command, *options, "-c", *extension.depends, "-o", target],
                    check=False,
                    capture_output=True,
                    text=True,
                )
                if result.returncode:
                    raise CompileError(f"CPU kernels for {name}:\n{result.stderr}")
                return target

            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            with ThreadPoolExecutor(jobs) as pool:
                return list(pool.map(compile_for, *zip(*instruction_sets().items(), strict=True)))

    return BuildExtensions


def build() -> dict:
    """Keywords for `setup()`."""
    extensions = []
    for what, make in (("CUDA", cuda_extension), ("CPU", cpu_extension)):
        try:
            extensions.append(make())
        except CannotBuild as reason:
            print(f"megatron-dmc: {what} kernels are not built: {reason}", file=sys.stderr)
            continue
        said = {
            "CUDA": f"building CUDA kernels for {os.environ.get('TORCH_CUDA_ARCH_LIST')} with "
            f"{os.environ.get('CUDA_HOME')}",
            "CPU": f"building CPU kernels for {', '.join(instruction_sets())}",
        }
        print(f"megatron-dmc: {said[what]}", file=sys.stderr)
    if not extensions:
        return {}
    _, cpp_extension = find_torch()
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": build_command(cpp_extension.BuildExtension)},
    }


setup(**build())
