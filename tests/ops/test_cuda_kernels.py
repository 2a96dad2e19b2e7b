"""CUDA kernels without a GPU: headers under the host's compiler, kernels in an emulated warp, resources
that the CUDA compiler reports, and (exhaustive) the extension as setup.py builds it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from host_kernels import INCLUDE, compile_host, compile_library
from kernel_tools import run_cases

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "megatron_dmc" / "csrc"

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++").split()[0]) is None, reason="no C++ compiler"
)


def find_nvcc() -> str | None:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if folder := os.environ.get(name):
            return shutil.which("nvcc", path=os.path.join(folder, "bin"))
    return shutil.which("nvcc")


needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc")


def test_headers_need_no_framework():
    for header in (INCLUDE / "dmc").iterdir():
        included = re.findall(r"#include [<\"](.+)[>\"]", header.read_text())
        assert all(x.startswith("dmc/") or x in ("cstdint", "cmath", "cstring") for x in included)


@needs_compiler
def test_units_on_the_host(tmp_path):
    compile_host("host_units.cpp", tmp_path / "units")
    result = subprocess.run([tmp_path / "units"], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.fixture(scope="module")
def host_library(tmp_path_factory):
    target = tmp_path_factory.mktemp("host") / "host_kernels.so"
    compile_library(target)
    return str(target)


@needs_compiler
@pytest.mark.parametrize("large", ["0", pytest.param("1", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "files, lazy",
    [
        ("decode pages", "0"),
        ("decode pages", "1"),
        ("prefill", "0"),
        ("prefill", "1"),
        ("engine", "0"),
    ],
)
def test_kernels_in_an_emulated_warp(files, lazy, large, host_library):
    """Asynchronous copies happen at once, or as late as the kernel's waits allow."""
    pytest.importorskip("triton")  # shares Triton's files of cases
    run_cases(
        *(f"kernel_cases_{name}.py" for name in files.split()), TRITON_INTERPRET="1", DMC_TESTED_BACKEND="host",
        DMC_LAZY_COPIES=lazy, DMC_LARGE_CASES=large, DMC_HOST_LIBRARY=host_library,
    )  # fmt: skip


def resources(report: str):
    """(kernel, registers, static shared memory, bytes of stack and spills) of ptxas's report."""
    pattern = re.compile(
        r"Compiling entry function '(\S+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    for name, *numbers, rest in pattern.findall(report):
        stack, stores, loads, registers = map(int, numbers)
        smem = re.search(r"(\d+) bytes smem", rest)
        shared = int(smem[1]) if smem else 0
        kernel = re.search(r"\d([a-z]+_kernel)(.*?)EEv|\d([a-z]+_kernel)E", name)
        assert kernel, name
        arguments = re.findall(r"(bf16|fp16|e4m3|int8)|Li(\d+)", kernel[2] or "")
        label = " ".join([kernel[1] or kernel[3], *("".join(a) for a in arguments)])
        yield label, registers, shared, stack + stores + loads


@needs_nvcc
@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("target", ["80", "90a"])
def test_kernels_compile_without_spills(target, everything, tmp_path):
    nvcc = find_nvcc()
    assert nvcc
    options = [] if everything else ["-DDMC_HOT_KERNELS_ONLY"]
    compilers = [
        subprocess.Popen(
            [nvcc, "-std=c++17", "-O3", f"-I{CSRC / 'include'}", "-cubin", "-Xptxas", "-v",
             f"-gencode=arch=compute_{target},code=sm_{target}", *options,
             "-o", tmp_path / f"{name}.cubin", CSRC / f"{name}.cu"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for name in ("append", "attention", "prefill", "prefill_attention", "release")
    ]  # fmt: skip
    reports = [compiler.communicate(timeout=500)[0] for compiler in compilers]
    assert [c.returncode for c in compilers] == [0] * 5, "\n".join(reports)
    found = list(resources("\n".join(reports)))
    for label, registers, shared, spilled in found:
        print(f"sm_{target} {label}: {registers} registers, {shared} bytes of static shared memory")
        assert spilled == 0, f"{label} for sm_{target} uses {spilled} bytes of local memory"
    kinds = {label.split()[0] for label, *_ in found}
    prefill = {"tail_kernel", "carry_kernel", "write_kernel", "keep_kernel", "prefill_kernel"}
    decode = {"append_kernel", "attend_kernel", "join_kernel", "plan_kernel", "release_kernel"}
    assert kinds == decode | prefill
    # append (with and without a delay) and attend for each kind of page; prefill writes the model's dtype, and
    # attends with and without a delay
    dtypes, stored = (2, 3) if everything else (1, 2)
    assert len(found) == dtypes * (stored * (8 + 7) + 4 + 24) + 2


USE_EXTENSION = """
import os
import torch
import megatron_dmc
megatron_dmc.__path__[:0] = filter(None, [os.environ.get("DMC_EXTENSION_FOLDER")])
from torch._subclasses import FakeTensorMode
from megatron_dmc.ops import cuda
from megatron_dmc.ops.paged import kv_pages
from megatron_dmc.ops.paged.layer_cache import LayerCache
assert cuda.absence() == "", cuda.absence()
from megatron_dmc.ops.cuda import decode, prefill as cuda_prefill
from megatron_dmc.ops.cuda.pages import release_pages
from megatron_dmc.ops.paged.chunks import Chunks

ops = torch.ops.megatron_dmc
mutated = [a.name for a in ops.decode_append.default._schema.arguments
           if a.alias_info is not None and a.alias_info.is_write]
assert mutated == ["k_pages", "v_pages", "k_scales", "v_scales", "block_table", "num_entries",
                   "segments", "free_state", "late_merge", "late_omega", "q_out"], mutated
assert all(a.alias_info.is_write for a in ops.release_pages.default._schema.arguments)

def tensors(device, dim=128, page=16, dtype=torch.bfloat16):
    q = torch.zeros(2, 8, dim, dtype=dtype, device=device)
    pages = torch.zeros(6, page, dim, dtype=dtype, device=device)
    table = torch.zeros(3, 2, 4, dtype=torch.int32, device=device)
    entries = torch.zeros(3, 2, dtype=torch.int64, device=device)
    rows = torch.zeros(2, dtype=torch.int64, device=device)
    return q, pages, pages.clone(), table, entries, rows

mutated = [a.name for a in ops.prefill_write.default._schema.arguments
           if a.alias_info is not None and a.alias_info.is_write]
assert mutated == ["k_pages", "v_pages", "num_entries", "segments", "appends", "base", "sums", "own_k",
                   "own_v", "entry"], mutated
mutated = [a.name for a in ops.prefill_attention.default._schema.arguments
           if a.alias_info is not None and a.alias_info.is_write]
assert mutated == ["out"], mutated

torch.Tensor.pin_memory = lambda x: x  # needs a GPU
with FakeTensorMode():
    q, *cache = tensors("cuda")
    k_pages, v_pages, table, entries, rows = cache
    cache = LayerCache(k_pages, v_pages, table, entries)
    out = decode.paged_decode_attention(cache, rows, q, None, softmax_scale=1.0, num_workers=4)
    assert out.shape == q.shape and out.dtype == q.dtype and out.device.type == "cuda"
    k = q[:, :2]
    segments = torch.zeros(3, 2, 1, 257, device="cuda")
    scaled = kv_pages.empty_pages(6, 16, 128, dtype=torch.float8_e4m3fn, device="cuda")
    for pages in (k_pages, scaled):
        out = decode.decode_append(
            LayerCache(pages, pages, table, entries, segments), rows, q, k, k, None, (None, None),
            rows, compress=True, may_merge=True, alpha_offset=5.0, merge_window=0)
        assert out.shape == q.shape
    own = k.contiguous()
    cos = torch.zeros(2, 128, dtype=q.dtype, device="cuda")
    entry = torch.zeros(2, 2, dtype=torch.int32, device="cuda")
    chunks = Chunks.of([1], [2], "cuda")
    out = cuda_prefill.attend_chunks(cache, chunks, q, (own, own, entry), (cos, cos),
                                     softmax_scale=1.0)
    assert out.shape == q.shape and out.dtype == q.dtype and out.device.type == "cuda"
    pages = torch.zeros(6, dtype=torch.int32, device="cuda")
    release_pages(table[:, 0], pages, pages[:2], pages)

def shifted(x):
    # dense, but not at a multiple of 16 bytes
    return torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape)

def message(change=lambda x: x, scales=(None, None), **options):
    q, k_pages, v_pages, table, entries, rows = change(list(tensors("cpu", **options)))
    part = torch.zeros(4, 2, q.shape[1] // 2, q.shape[2])
    try:
        ops.paged_decode_attention(q, k_pages, v_pages, *scales, table, entries, rows,
                                   torch.zeros(5, dtype=torch.int32), torch.zeros_like(q), part,
                                   torch.zeros(part.shape[:3]), 1.0)
    except ValueError as error:
        return str(error).splitlines()[0]
    raise SystemExit("no error")

def put(i, f):
    def change(x):
        x[i] = f(x[i])
        return x
    return change

for got, wanted in (
    (message(), "q is on cpu; all tensors must be on one GPU"),
    (message(dim=80), "head_dim=80; the kernels are built for 64, 96, 128 and 256"),
    (message(page=12), "page_size=12; the kernels take 8, 16, 32 and 64"),
    (message(dtype=torch.float32), "dtype Float; the kernels take bfloat16 and float16"),
    (message(put(0, lambda q: q[:, :7])), "q has 7 heads, not a multiple of the 2"),
    (message(put(2, lambda v: v[:5])), "v_pages has shape [5, 16, 128], expected [6, 16, 128]"),
    (message(put(2, lambda v: v.char())), "v_pages is Char, expected BFloat16"),
    (message(lambda x: put(1, torch.Tensor.char)(put(2, torch.Tensor.char)(x))),
     "k_scales, v_scales: given with pages of 8 bits and only with them"),
    (message(scales=(torch.zeros(6, 16),) * 2),
     "k_scales, v_scales: given with pages of 8 bits and only with them"),
    (message(put(1, shifted)), "k_pages must start at a multiple of 16 bytes; call clone()"),
    (message(put(2, shifted)), "v_pages must start at a multiple of 16 bytes; call clone()"),
    (message(lambda x: put(1, torch.Tensor.char)(put(2, torch.Tensor.char)(x)),
             scales=(shifted(torch.zeros(6, 16)), torch.zeros(6, 16))),
     "k_scales, v_scales must start at a multiple of 16 bytes; call clone()"),
    (message(put(3, lambda t: t.long())), "block_table is Long, expected Int"),
    (message(put(4, lambda e: e[:2])), "num_entries has shape [2, 2], expected [3, 2]"),
):
    assert wanted in got, (wanted, got)
def prefill_message(change=lambda x: x, own=(), delay=0, tile_tokens=32, scale=1.0, **options):
    q, k_pages, v_pages, table, *_ = change(list(tensors("cpu", **options)))
    ints = [torch.zeros(2, n, dtype=torch.int32) for n in (2, 3, 2)]
    try:
        ops.prefill_attention(q, *(own or (None, None)), ints[0], None, None, k_pages, v_pages, table,
                              *ints[1:], None, None, None, torch.zeros_like(q), delay, tile_tokens, scale)
    except ValueError as error:
        return str(error).splitlines()[0]
    raise SystemExit("no error")

wrong = torch.zeros(2, 1, 128, dtype=torch.bfloat16)
for got, wanted in (
    (prefill_message(), "q is on cpu; all tensors must be on one GPU"),
    (prefill_message(dim=80), "head_dim=80; the kernels are built for 64, 96, 128 and 256"),
    (prefill_message(put(0, lambda q: q[:, :7])), "q has 7 heads, not a multiple of the 2"),
    (prefill_message(tile_tokens=33),
     "tile_tokens=33 with 4 query heads for each key/value head; their product must be 1 to 128"),
    (prefill_message(dim=256), "their product must be 1 to 64"),
    (prefill_message(scale=0.0), "softmax_scale=0; expected above 0"),
    (prefill_message(delay=4), "near_k, near_v and far are given with a delay and only with it"),
    (prefill_message(own=(wrong, None)), "own_k and own_v go together"),
    (prefill_message(own=(wrong, wrong)), "own_k has shape [2, 1, 128], expected [2, 2, 128]"),
    (prefill_message(lambda x: put(1, torch.Tensor.char)(put(2, torch.Tensor.char)(x))),
     "k_scales, v_scales: given with pages of 8 bits and only with them"),
):
    assert wanted in got, (wanted, got)
ids = torch.zeros(6, dtype=torch.int32)
for arguments, wanted in (
    ((ids[None], ids, ids[:2], ids), "page_ids is on cpu; all tensors must be on one GPU"),
    ((ids[None], ids, ids[:2], ids[:5]), "num_extra_owners has shape [5], expected [6]"),
):
    try:
        ops.release_pages(*arguments)
        raise SystemExit("no error")
    except ValueError as error:
        assert wanted in str(error), error
print("extension works")
"""


def use_extension(folder, **environment):
    used = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", USE_EXTENSION],
        check=False, capture_output=True, text=True, cwd=folder, env={**os.environ, **environment},
    )  # fmt: skip
    assert used.stdout.splitlines()[-1:] == ["extension works"], used.stderr[-3000:]


@needs_compiler
def test_operators_refuse_in_words(host_library):
    """Schemas, fake implementations and errors of binding.cpp, without the CUDA compiler."""
    folder = Path(host_library).parent
    compile_library(folder / "_C.so", "at::kCUDA")
    use_extension(folder, PYTHONPATH=str(ROOT), DMC_EXTENSION_FOLDER=str(folder))


@needs_nvcc
@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_extension_builds_and_refuses_in_words(tmp_path):
    library = tmp_path / "lib"
    environment = {**os.environ, "MEGATRON_DMC_SKIP_CUDA": "0", "TORCH_CUDA_ARCH_LIST": "9.0a"}
    built = subprocess.run(
        [sys.executable, "setup.py", "build", "--build-base", tmp_path, "--build-lib", library],
        check=False, capture_output=True, text=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert "building CUDA kernels for 9.0a" in built.stderr, built.stderr[-2000:]
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    use_extension(tmp_path, **environment, PYTHONPATH=str(library))
