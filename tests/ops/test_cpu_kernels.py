"""CPU kernels: the cases of the other back ends, any number of threads, and (exhaustive) the extension as
setup.py builds it."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_tools import run_cases
from random_models import random_model

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.model import inference
from megatron_dmc.ops import cpu
from megatron_dmc.ops.backends import DECODE, LINEAR
from megatron_dmc.ops.cpu import linear, norm, swiglu
from megatron_dmc.ops.paged import decode, prefill
from megatron_dmc.ops.paged.chunks import Chunks
from megatron_dmc.ops.testing import decode_case, prefill_case

ROOT = Path(__file__).resolve().parents[2]

needs_extension = pytest.mark.skipif(bool(cpu.absence()), reason=cpu.absence() or "-")


@needs_extension
@pytest.mark.parametrize("large", ["0", pytest.param("1", marks=pytest.mark.exhaustive)])
def test_cases(large):
    pytest.importorskip("triton")  # shares Triton's files of cases
    run_cases(
        "kernel_cases_decode.py", "kernel_cases_pages.py", "kernel_cases_prefill.py", TRITON_INTERPRET="1",
        DMC_TESTED_BACKEND="cpu", DMC_LARGE_CASES=large,
    )  # fmt: skip


attend = partial(decode.paged_decode_attention, backend="cpu")


@needs_extension
@pytest.mark.parametrize("compress", [False, True])
def test_prefill_is_the_same_for_any_threads_chunks_and_batch(compress):
    """Two prompts at once on three threads; each alone, in pieces. The tiles' sizes divide none of them."""
    lengths, cuts = [150, 77], {0: [1, 40, 109], 1: [76, 1]}
    q, k, v = decode_case.random_heads(
        sum(lengths), [6, 2, 2], 64, dtype=torch.bfloat16, device="cpu", seed=3
    )
    gates = prefill_case.random_decisions(sum(lengths), [0.7, 0.4], device="cpu", seed=3)
    angles = torch.rand(sum(lengths), 32, generator=torch.Generator().manual_seed(3)).repeat(1, 2)

    def run(pieces):
        cache = decode_case.random_cache(
            torch.zeros(2, 2, dtype=torch.int64), dim=64, page_size=16, dtype=torch.bfloat16, device="cpu",
            room=12, num_free=60, merge_window=4,
        )  # fmt: skip
        out = torch.empty_like(q)
        for chunks, tokens in pieces:
            out[tokens] = prefill.prefill(
                cache, chunks, q[tokens], k[tokens], v[tokens],
                (gates[0][tokens], gates[1][tokens]) if compress else None, angles[tokens],
                softmax_scale=0.2, merge_window=4, backend="cpu",
            )  # fmt: skip
        return out

    pieces = []
    for row, sizes in cuts.items():
        first = sum(lengths[:row])
        for size in sizes:
            pieces.append((Chunks.of([row], [size], "cpu"), slice(first, first + size)))
            first += size
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = run([(Chunks.of([0, 1], lengths, "cpu"), slice(None))])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(run(pieces), together)


@needs_extension
def test_attention_is_the_same_for_any_threads_and_any_batch():
    """Heads that are split, with 5 queries each: three and two at a time."""
    lengths = torch.tensor([[257, 1], [0, 900], [512, 255]])
    cache = decode_case.random_cache(
        lengths, dim=64, page_size=16, dtype=torch.bfloat16, device="cpu"
    )
    (q,) = decode_case.random_heads(3, [10], 64, dtype=torch.bfloat16, device="cpu", seed=1)
    rows, threads = torch.arange(3), torch.get_num_threads()
    decode_case.check_attention(attend, q, cache, rows, softmax_scale=0.2)
    try:
        torch.set_num_threads(1)
        alone = torch.cat(
            [
                attend(cache, r, x, softmax_scale=0.2)
                for r, x in zip(rows.split(1), q.split(1), strict=True)
            ]
        )
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(attend(cache, rows, q, softmax_scale=0.2), alone)
    finally:
        torch.set_num_threads(threads)


@needs_extension
@pytest.mark.parametrize("in_values", [False, True])
def test_an_entry_that_is_not_a_number_gives_none(in_values):
    """Also where it is the only entry, whose weight is 1 whatever its score."""
    for count in (1, 9, 300):
        cache = decode_case.random_cache(
            torch.tensor([[count]]), dim=32, page_size=8, dtype=torch.float32, device="cpu"
        )
        pages = cache.v_pages_PSD if in_values else cache.k_pages_PSD
        pages[cache.block_table_RGM[0, 0, (count - 1) // 8], (count - 1) % 8, 3] = float("nan")
        out = attend(cache, torch.tensor([0]), torch.ones(1, 2, 32), softmax_scale=0.2)
        assert out[..., 3].isnan().all() and (in_values or out.isnan().all())


@needs_extension
def test_what_the_kernels_do_not_take_is_said():
    q = torch.zeros(1, 2, 64)
    assert DECODE.choose(q, 16) == "cpu"
    for x, page_size, message in (
        (q.double(), 16, "dtype torch.float64"),
        (q[..., :40], 16, "head_dim=40; the kernels take multiples of 32 up to 256"),
        (q, 12, "page_size=12; the kernels take powers of two from 8 on"),
    ):
        assert DECODE.choose(x, page_size) == "torch"
        with pytest.raises(ValueError, match=message):
            DECODE.choose(x, page_size, backend="cpu")
    rows, ints = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, 4, dtype=torch.int32)
    pages, entries = torch.zeros(4, 16, 64), torch.zeros(1, 1, dtype=torch.int64)
    operator = torch.ops.megatron_dmc_cpu.paged_decode_attention
    for args, message in (
        ((q, pages[..., :60], pages), "k_pages has shape"),
        ((q.half(), pages, pages), "dtype Half; the kernels take bfloat16 and float32"),
        ((q, pages, pages[:3]), "v_pages has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            operator(*args, None, None, ints, entries, rows, q, 1.0)


@pytest.mark.exhaustive
def test_extension_is_built(tmp_path):
    """From an installed torch, in about a minute; without a compiler there is one line that says why."""
    build = [
        sys.executable,
        "setup.py",
        "build_ext",
        f"--build-lib={tmp_path}",
        f"--build-temp={tmp_path}/temp",
    ]
    environment = {**os.environ, "MEGATRON_DMC_SKIP_CUDA": "1"}
    result = subprocess.run(
        build,
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment, "CXX": "none"},
    )
    assert (
        result.returncode == 0
        and "CPU kernels are not built: no C++ compiler (none)" in result.stderr
    )
    subprocess.run(build, check=True, cwd=ROOT, env=environment, timeout=500)
    (built,) = (tmp_path / "megatron_dmc").glob("_cpu*.so")
    use = f"import torch; torch.ops.load_library({str(built)!r}); print(torch.ops.megatron_dmc_cpu.instruction_set())"
    result = subprocess.run([sys.executable, "-c", use], check=True, capture_output=True, text=True)
    assert result.stdout.strip() in ("avx2", "avx512", "avx512_bf16", "default", "")


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 32), (20, 96), (64, 4096)])
def test_linear_sums_in_float32_whatever_is_next_to_a_row(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=generator).to(dtype)
    # rows that lie apart, more than a block of them for the widest; all and a part of a group of outputs
    num_rows = 53 if dtype == torch.bfloat16 else linear.FLOAT32_ROWS
    x = torch.randn(num_rows, 2 * shape[1], generator=generator).to(dtype)[:, : shape[1]]
    out = linear.linear(x, weight)
    exact = x.double() @ weight.double().T
    error = (out.double() - exact).abs()
    unit = 1 / 256 if dtype == torch.bfloat16 else 0.0
    assert bool((error <= exact.abs() * unit + 1e-5 * shape[1]).all()), "half a unit of bfloat16"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for few in (slice(17, 18), slice(17, 19), slice(3, 6), slice(0, 16)):
            assert torch.equal(linear.linear(x[None, few], weight)[0], out[few])
    finally:
        torch.set_num_threads(threads)
    residual = torch.randn(out.shape, generator=generator).to(dtype)
    assert torch.equal(linear.linear(x, weight, residual), out + residual)


@needs_extension
def test_linear_of_many_rows_in_float32_is_pytorchs():
    generator = torch.Generator().manual_seed(0)
    x, weight, residual = (
        torch.randn(shape, generator=generator) for shape in ((1, 40, 64), (8, 64), (1, 40, 8))
    )
    assert x.shape[1] > linear.FLOAT32_ROWS
    out = linear.linear(x, weight)
    few = slice(0, linear.FLOAT32_ROWS)
    torch.testing.assert_close(out[:, few], linear.linear(x[:, few], weight))
    torch.testing.assert_close(linear.linear(x, weight, residual), x @ weight.T + residual)


@needs_extension
def test_linear_layers_of_an_engine_use_the_kernel(monkeypatch):
    """Of a model in bfloat16, where the CPU does not multiply it; logits stay near those of PyTorch."""
    calls = []
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)

    product = linear.linear

    def counted(x, weight, *residual):
        calls.append(tuple(weight.shape))
        return product(x, weight, *residual)

    monkeypatch.setattr(linear, "linear", counted)
    logits = {}
    for backend in ("torch", "cpu"):
        monkeypatch.setenv("DMC_LINEAR_BACKEND", "torch" if backend == "torch" else "")
        loaded = random_model(2)
        loaded.model.to(torch.bfloat16)
        llm = LLM(loaded, device="cpu")
        params = SamplingParams(temperature=0, max_tokens=4, logprobs=5)
        prompt = {"prompt_token_ids": list(range(1, 20))}
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        logits[backend] = output.outputs[0].logprobs[0]
        assert bool(calls) == (backend == "cpu")
    # of the MLP the first projection alone: the second has 48 inputs
    assert len(set(calls)) == 4, "the projections, and the logits"
    common = logits["cpu"].keys() & logits["torch"].keys()
    assert len(common) >= 4  # a sum with the residual is rounded once or twice
    for token in common:
        assert abs(logits["cpu"][token].logprob - logits["torch"][token].logprob) < 0.05
    with torch.enable_grad():
        calls.clear()
        layer = llm.engine.runner.model.decoder.layers[0]
        x = torch.zeros(1, 1, layer.mlp.linear_fc1.weight.shape[1], dtype=torch.bfloat16)
        layer.mlp.linear_fc1(x.requires_grad_())
        assert layer.input_layernorm(x).requires_grad
    assert not calls, "gradients are PyTorch's"


def test_linear_kernel_says_what_it_does_not_take(monkeypatch):
    weight = torch.zeros(8, 64, dtype=torch.bfloat16)
    monkeypatch.setattr(cpu, "absence", lambda: "")
    for given, reason in (
        (weight.half(), "dtype torch.float16; only bfloat16 and float32"),
        (weight[:, :40], "multiples of 4 x 32"),
    ):
        assert LINEAR.choose(given) == "torch"
        with pytest.raises(ValueError, match=reason):
            LINEAR.choose(given, backend="cpu")


@pytest.mark.parametrize(
    "capabilities, bfloat16, float32",
    [
        ({"avx2": True}, sys.maxsize, linear.FLOAT32_ROWS),
        ({"avx2": True, "avx512_bf16": True}, 0, linear.FLOAT32_ROWS),
        ({"bf16": True}, 0, 0),
    ],
)
def test_rows_that_pytorch_multiplies(monkeypatch, capabilities, bfloat16, float32):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    most_rows = linear.most_rows.__wrapped__
    assert most_rows(torch.bfloat16) == bfloat16 and most_rows(torch.float32) == float32


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_pytorch(monkeypatch, dtype):
    monkeypatch.setattr(linear, "most_rows", lambda dtype: 0)
    generator = torch.Generator().manual_seed(5)
    x, weight, residual = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((2, 3, 64), (8, 64), (2, 3, 8))
    )
    exact = torch.nn.functional.linear(x.double(), weight.double())
    near = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1 / 128, "atol": 0.1}
    )
    torch.testing.assert_close(linear.linear(x, weight).double(), exact, **near)
    out = linear.linear(x, weight, residual)
    torch.testing.assert_close(out.double(), exact + residual.double(), **near)


@needs_extension
def test_an_extension_of_another_release_is_not_used(monkeypatch):
    monkeypatch.setattr(cpu, "REVISION", cpu.REVISION + 1)
    assert "another release than the package: build it again" in cpu.absence.__wrapped__()


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 48, 576])
def test_rms_norm_against_float64(dtype, channels):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(channels, generator=generator).to(dtype)
    x = 3.0 * torch.randn(2, 70, 2 * channels, generator=generator).to(dtype)[..., :channels]
    out = norm.rms_norm(x, weight, 1e-5)
    exact = torch.nn.functional.rms_norm(x.double(), (channels,), weight.double(), 1e-5)
    assert out.dtype == dtype and out.shape == x.shape
    torch.testing.assert_close(
        out.double(), exact, rtol=1e-5 if dtype == torch.float32 else 1 / 256, atol=0
    )


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_against_float64(dtype):
    generator = torch.Generator().manual_seed(2)
    x = 8.0 * torch.randn(70, 2 * 96, generator=generator).to(dtype)
    out = swiglu.swiglu(x)
    gate, up = x.double().chunk(2, -1)
    exact = torch.nn.functional.silu(gate) * up
    rtol = 1e-5 if dtype == torch.float32 else 1 / 250
    torch.testing.assert_close(out.double(), exact, rtol=rtol, atol=1e-6)
    assert swiglu.swiglu(torch.full((1, 64), float("nan")).to(dtype)).isnan().all()


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_on_a_cpu_are_those_of_megatron(dtype, monkeypatch):
    """Logits of a prompt and of decoded tokens; biases and norms of queries and keys included. Also as on several
    ranks, where the norms add the products."""
    logprobs = []
    for patches in (
        {},
        {"_Product.add_to": lambda product, residual, x: (residual, product(x))},
        {"_is_plain": lambda layer: False},
    ):
        for name, value in patches.items():
            monkeypatch.setattr(f"{inference.__name__}.{name}", value)
        loaded = random_model(2, add_qkv_bias=True, qk_layernorm=True, ffn_hidden_size=64)
        loaded.model.to(dtype)
        llm = LLM(loaded, device="cpu")
        blocks = llm.engine.runner.model.decoder
        assert ("forward" in vars(blocks)) == ("_is_plain" not in patches)
        params = SamplingParams(temperature=0, max_tokens=4, logprobs=5, prompt_logprobs=5)
        prompt = {"prompt_token_ids": list(range(1, 20))}
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        every = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs[:1]]
        logprobs.append([{token: x.logprob for token, x in of.items()} for of in every])
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    *ours, theirs = logprobs
    for one in ours:
        for found, wanted in zip(one, theirs, strict=True):
            common = found.keys() & wanted.keys()
            assert common and all(abs(found[x] - wanted[x]) < tolerance for x in common)


@needs_extension
@pytest.mark.parametrize("at_once", [False, True])
def test_advice_about_memory_changes_no_number(at_once):
    for count in (1, cpu.LEAST_HUGE_BYTES, 3 * cpu.LEAST_HUGE_BYTES + 5):
        x = torch.arange(count)[1:]
        cpu.advise_huge_pages(x, at_once=at_once)
        assert torch.equal(x, torch.arange(1, count))


def test_zeros_take_no_memory_until_they_are_written():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    before = resident()
    x = cpu.untouched_zeros((1 << 10, 16, 1 << 12), torch.bfloat16)  # 128 MB
    assert resident() - before < 2**24
    x[:512] = 1
    assert 2**26 <= resident() - before < 2**26 + 2**24
    assert x.is_contiguous() and not x.data_ptr() % 64 and not x[512:513].any()
    assert cpu.untouched_zeros((2, 3), torch.float8_e4m3fn).shape == (2, 3)
