"""Decoding's kernels against the specification; see kernel_cases_merge.py.

Dimension letters as in `ops.paged.decode`.
"""

import functools
import inspect
import os
from dataclasses import replace

import pytest
import torch
from kernel_cases_merge import DEVICE, uninitialised_memory_is_nan  # noqa: F401, patches Triton

from megatron_dmc.ops import backends
from megatron_dmc.ops.paged import decode as cache_ops
from megatron_dmc.ops.testing import decode_case
from megatron_dmc.ops.testing.yardstick import errors_within_twice_the_yardstick

BACKEND = os.environ.get("DMC_TESTED_BACKEND", "triton")
# the interpreter cuts bfloat16 off instead of rounding it
HALF = torch.float16 if DEVICE == "cpu" and BACKEND == "triton" else torch.bfloat16
if BACKEND == "host":
    import host_kernels

    on_host = host_kernels.install()
    for op in (backends.DECODE, backends.PAGES, backends.PREFILL):
        op.backends["host"] = backends.Backend(lambda op: on_host)
kernels = backends.DECODE.kernels(BACKEND)
HAS_WORKERS = kernels is not None and (
    "num_workers" in inspect.signature(kernels.paged_decode_attention).parameters
)
LARGE = os.environ.get("DMC_LARGE_CASES") == "1"
FP8, INT8 = torch.float8_e4m3fn, torch.int8
NAN = float("nan")
UNSUPPORTED = {"cuda": torch.float32, "host": torch.float32, "cpu": torch.float16}.get(BACKEND)
EDGES = [0, 1, 33, 65, 97, 31, 7, 8, 9, 16, 64, 32, 100, 0, 3, 40]


def lengths(batch, num_kv_heads, longest=100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, longest + 1, (batch * num_kv_heads,), generator=generator)
    edges = torch.tensor(EDGES[: batch * num_kv_heads])
    drawn[: len(edges)] = edges.clamp_max(longest)
    return drawn.view(batch, num_kv_heads)


# group, head dim, page size, dtype, pages' dtype, rows of padding, plan ahead, heads of lengths
ATTENTION = [
    (1, 128, 16, HALF, None, True, 0, (4, 3)),
    (4, 64, 8, HALF, None, False, 1, (2, 2)),
    (8, 96, 64, torch.float32, None, False, 0, (3, 1)),
    (8, 96, 32, HALF, None, False, 1, (3, 1)),
    (1, 128, 16, HALF, FP8, True, 0, (2, 3)),
    (4, 64, 8, torch.float16, INT8, False, 1, (2, 2)),
    (1, 64, 8, torch.float16, FP8, False, 0, (1, 2)),
    (8, 96, 32, HALF, FP8, False, 1, (2, 1)),
]
ATTENTION_LARGE = [
    (group, dim, page_size, dtype, stored, ahead == 1, ahead, (3, 4))
    for stored in (None, FP8, INT8)
    for group in (1, 4, 8, 16)
    for dim, page_size in ((64, 64), (96, 32), (128, 16), (256, 8))
    for dtype, ahead in ((HALF, 0), (torch.float32, 1))
    if stored is None or dtype == HALF
]


def chosen(cases, large):
    """The cases that the backend takes: none is skipped."""
    all_of_them = cases + (large if LARGE else [])
    return [case for case in all_of_them if UNSUPPORTED is None or UNSUPPORTED not in case]


@pytest.mark.parametrize("case", chosen(ATTENTION, ATTENTION_LARGE), ids=str)
def test_attention_equals_the_specification(case):
    group, dim, page_size, dtype, stored, padded, ahead, shape = case
    cache = decode_case.random_cache(
        lengths(*shape), dim=dim, page_size=page_size, dtype=dtype, device=DEVICE,
        cache_dtype=stored, num_free=2,
    )  # fmt: skip
    rows = torch.randperm(shape[0], generator=torch.Generator().manual_seed(3))
    if padded:
        rows[1] = -1
    rows = rows.to(DEVICE)
    heads = [shape[1] * group, shape[1]]
    q, _ = decode_case.random_heads(
        shape[0], heads, dim, dtype=dtype, device=DEVICE, seed=1, strided=True
    )

    def attend(cache, rows, q, *, softmax_scale):
        plan = None
        if ahead:
            layers = torch.stack([cache.num_entries_RG + 5, cache.num_entries_RG])
            plan = cache_ops.plan_decode_attention(
                layers, rows, like=q, page_size=page_size, ahead=ahead, backend=BACKEND
            )[1]
        return cache_ops.paged_decode_attention(
            cache, rows, q, plan_Y=plan, softmax_scale=softmax_scale, backend=BACKEND
        )

    decode_case.check_attention(attend, q, cache, rows, softmax_scale=3 * dim**-0.5)


@pytest.mark.skipif(not HAS_WORKERS, reason="this back end does not divide the work so")
@pytest.mark.parametrize("lengths", [[150, 0, 97], [1, 17, 0, 0, 33, 2, 64, 9, 0]], ids=str)
@pytest.mark.parametrize("num_workers", [1, 3, 5, 64])
def test_any_number_of_workers_gives_the_same(num_workers, lengths):
    """Shares end within a head's tiles, between heads, and within the cost of a head."""
    cache = decode_case.random_cache(
        torch.tensor([lengths]), dim=64, page_size=8, dtype=HALF, device=DEVICE
    )
    rows = torch.tensor([0], device=DEVICE)
    (q,) = decode_case.random_heads(1, [len(lengths)], 64, dtype=HALF, device=DEVICE, seed=1)

    def attend(cache, rows, q, *, softmax_scale):
        return kernels.paged_decode_attention(
            cache, rows, q, None, softmax_scale=softmax_scale, num_workers=num_workers
        )

    decode_case.check_attention(attend, q, cache, rows, softmax_scale=0.5)


# group, head dim, rotary channels, page size, dtype, window, compress, may_merge, free pages,
# pages' dtype
APPEND = [
    (1, 128, 128, 16, HALF, 0, True, True, 20, None),
    (4, 64, 64, 8, HALF, 12, True, True, 20, None),
    (2, 96, 96, 8, torch.float32, 3, True, True, 1, None),
    (1, 64, 32, 8, HALF, 0, True, False, 20, None),
    (2, 96, 0, 8, HALF, 0, False, True, 20, None),
    (1, 96, 96, 8, HALF, 3, True, True, 1, None),
    (4, 128, 128, 16, HALF, 0, True, True, 20, FP8),
    (1, 96, 64, 8, HALF, 3, True, True, 20, INT8),
]
APPEND_LARGE = [
    (group, dim, dim, page_size, dtype, window, True, True, num_free, stored)
    for stored in (None, FP8, INT8)
    for group in (1, 8)
    for dim, page_size in ((64, 64), (96, 32), (128, 16), (256, 8))
    for dtype in (HALF, torch.float32)
    for window, num_free in ((0, 2), (1, 30), (12, 30))
    if stored is None or (dtype == HALF and window != 1)
]


@pytest.mark.parametrize("case", chosen(APPEND, APPEND_LARGE), ids=str)
def test_append_equals_the_specification(case):
    group, dim, rotary, page_size, dtype, window, compress, may_merge, num_free, stored = case
    full = page_size
    state = torch.tensor([[0, 1], [full, full - 1], [2 * full, full + 1], [1, 3]])
    cache = decode_case.random_cache(
        state, dim=dim, page_size=page_size, dtype=dtype, device=DEVICE, room=1,
        num_free=num_free, merge_window=window, cache_dtype=stored,
    )  # fmt: skip
    rows = torch.tensor([2, -1, 0, 1], device=DEVICE)
    half = torch.rand(50, rotary // 2, generator=torch.Generator().manual_seed(7)) * 6
    angles = torch.cat([half, half], dim=-1).to(DEVICE) if rotary else None
    for step in range(2):
        qkv = decode_case.random_heads(
            4, [2 * group, 2, 2], dim, dtype=dtype, device=DEVICE, seed=step, strided=step == 0
        )
        positions = torch.tensor([40, 0, 3, 17], device=DEVICE) + step

        append = functools.partial(cache_ops.gate_and_append, backend=BACKEND)
        decode_case.check_append(
            append, qkv, angles, positions, cache, rows, alpha_offset=0.2 if compress else None,
            merge_window=window, may_merge=may_merge,
        )  # fmt: skip


# group, head dim, rotary channels, page size, dtype, window (None: tokens are evicted), delay, free pages, pages' dtype
DELAYED = [
    (2, 64, 64, 8, HALF, None, 1, 20, None),
    (1, 96, 32, 16, HALF, None, 5, 20, None),
    (4, 64, 64, 8, HALF, None, 8, 20, FP8),
    (1, 64, 0, 8, HALF, None, 4, 20, INT8),
    (2, 64, 64, 8, torch.float32, None, 4, 2, None),
    (1, 64, 64, 8, HALF, 0, 1, 20, None),
    (4, 128, 64, 8, HALF, 0, 11, 20, None),
    (2, 96, 0, 8, torch.float32, 3, 4, 1, None),
    (1, 96, 96, 8, HALF, 3, 4, 2, None),
    (4, 64, 64, 8, HALF, 0, 4, 20, FP8),
    (1, 64, 64, 16, HALF, 2, 4, 20, INT8),
]
DELAYED_LARGE = [
    (group, dim, dim, page_size, dtype, window, delay, num_free, stored)
    for stored in (None, FP8, INT8)
    for group, dim, page_size in ((1, 64, 64), (8, 96, 32), (8, 128, 16), (1, 256, 8))
    for dtype in (HALF, torch.float32)
    for window, delay, num_free in ((0, 16, 30), (12, 3, 30), (0, 1, 2), (None, 17, 30))
    if stored is None or dtype == HALF
]


@pytest.mark.parametrize("case", chosen(DELAYED, DELAYED_LARGE), ids=str)
def test_append_after_a_delay(case):
    """Rings that fill, are full, and go round; segments or entries that open behind the ring."""
    group, dim, rotary, page_size, dtype, window, delay, num_free, stored = case
    evicts, window = window is None, window or 0
    state = torch.tensor([
        [0, 0],
        [delay - 1, delay - 1],
        [delay, delay],
        [delay + 1, delay + page_size],
        [2 * page_size, 3 * page_size],
    ])  # fmt: skip
    positions = torch.tensor([0, delay - 1, delay, delay + page_size, 40])
    state[4] += -(-delay // page_size) * page_size
    cache = decode_case.random_cache(
        state, dim=dim, page_size=page_size, dtype=dtype, device=DEVICE, room=1,
        num_free=num_free, merge_window=window, cache_dtype=stored, delay=delay, evicts=evicts,
    )  # fmt: skip
    # where pages are short, those of one kind: the order in which rows take pages is not specified
    rows = torch.tensor([2, -1, 0, 1, 3, 4] if num_free > 2 else [3, 4, 2, -1], device=DEVICE)
    half = torch.rand(60, rotary // 2, generator=torch.Generator().manual_seed(7)) * 6
    angles = torch.cat([half, half], dim=-1).to(DEVICE) if rotary else None
    for step in range(3):
        qkv = decode_case.random_heads(
            len(rows), [2 * group, 2, 2], dim, dtype=dtype, device=DEVICE, seed=step,
            strided=step == 0,
        )  # fmt: skip
        at = (positions[rows.cpu().clamp_min(0)] + step).to(DEVICE)
        append = functools.partial(cache_ops.gate_and_append, backend=BACKEND)
        decode_case.check_append(
            append, qkv, angles, at, cache, rows, alpha_offset=0.2, merge_window=window
        )
        if num_free <= 2:
            break  # heads without a page stand still, and their positions do not


def test_every_run_gives_the_same_bits():
    """No race between the workers that share a head, nor between heads that take pages at once."""
    batch, num_kv_heads, runs = (64, 32, 20) if DEVICE == "cuda" else (2, 3, 2)
    start = decode_case.random_cache(
        lengths(batch, num_kv_heads, longest=1500 if DEVICE == "cuda" else 100) // 16 * 16, dim=64,
        page_size=16, dtype=HALF, device=DEVICE, room=1, num_free=batch * num_kv_heads,
    )  # fmt: skip
    qkv = decode_case.random_heads(batch, [num_kv_heads] * 3, 64, dtype=HALF, device=DEVICE, seed=1)
    rows = torch.arange(batch, device=DEVICE)
    results = []
    for _ in range(runs):
        cache = start.clone(HALF)
        q = cache_ops.gate_and_append(
            cache, rows, *qkv, (None, None), rows, alpha_offset=None, backend=BACKEND
        )
        # every head stood at the end of a page
        held = cache.block_table_RGM[cache.block_table_RGM >= 0]
        assert held.unique().numel() == held.numel() == cache.k_pages_PSD.shape[0]
        out = cache_ops.paged_decode_attention(cache, rows, q, softmax_scale=0.2, backend=BACKEND)
        results.append(out)
    assert all(torch.equal(out, results[0]) for out in results) and results[0].isfinite().all()


@pytest.mark.skipif(DEVICE != "cuda", reason="8.6 GB")
def test_a_pool_of_more_than_2_31_elements():
    page_size, dim = 16, 128
    cache = decode_case.random_cache(
        lengths(4, 4, longest=900), dim=dim, page_size=page_size, dtype=HALF, device=DEVICE, room=1,
        num_free=2**31 // (page_size * dim) + 100,
    )  # fmt: skip
    assert int(cache.block_table_RGM.max()) * page_size * dim > 0.9 * 2**31
    rows = torch.arange(4, device=DEVICE)
    qkv = decode_case.random_heads(4, [4, 4, 4], dim, dtype=HALF, device=DEVICE, seed=1)

    append = functools.partial(cache_ops.gate_and_append, backend=BACKEND)
    attend = functools.partial(cache_ops.paged_decode_attention, backend=BACKEND)
    decode_case.check_append(append, qkv, None, rows, cache, rows, alpha_offset=0.0)
    decode_case.check_attention(attend, qkv[0], cache, rows, softmax_scale=0.1)


@pytest.mark.parametrize("window", [0, 3])
def test_append_with_gates_from_outside(window):
    start = decode_case.random_cache(
        torch.tensor([[0, 8], [5, 16]]), dim=64, page_size=8, dtype=HALF, device=DEVICE, room=1,
        num_free=4, merge_window=window,
    )  # fmt: skip
    start.block_table_RGM[1, 1, 2] = start.free_pages.page_ids[0]
    _, k, v = decode_case.random_heads(2, [2, 2, 2], 64, dtype=HALF, device=DEVICE, seed=0)
    is_merge = torch.tensor([[True, False], [True, True]], device=DEVICE)
    omega = torch.tensor([[0.3, 0.9], [0.5, 1.0]], device=DEVICE)
    half = torch.arange(64, device=DEVICE).view(2, 32) / 10
    results = []
    for backend, dtype in ((BACKEND, HALF), ("torch", torch.float64), ("torch", HALF)):
        cache = replace(start.clone(dtype), free_pages=None)
        cache_ops.decode_append(
            cache, torch.tensor([1, 0], device=DEVICE), k.to(dtype), v.to(dtype), (is_merge, omega),
            torch.cat([half, half], -1), merge_window=window, backend=backend,
        )  # fmt: skip
        # row 0 is served second; its head 0 has neither an entry nor a page, so it is left alone
        assert cache.num_entries_RG.tolist() == [[0, 8], [5, 17]]
        results.append([decode_case.entries_of(cache), cache.segments_RGUA])
    errors_within_twice_the_yardstick(["entries", "segments"], *results)


@pytest.mark.parametrize("stored", [FP8, INT8])
@pytest.mark.parametrize("dim", [64] + ([96, 256] if LARGE else []))
def test_entries_of_8_bits_are_rounded_alike(dim, stored):
    """The bytes and scales that PyTorch writes, for numbers half way between two codes among others."""
    batch, num_kv_heads = 12, 2
    generator = torch.Generator().manual_seed(2)
    k, v = torch.randn(2, batch, num_kv_heads, dim, generator=generator)
    codes = torch.arange(128.0)
    if stored == FP8:
        codes = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    middles = (codes[1:] + codes[:-1]) / 2
    at = torch.randint(0, len(middles), k[:8].shape, generator=generator)
    v[:8] = middles[at] * v[:8].sign()
    v[:8, :, 5] = codes[-1]  # so that the scale is 1, up to its last bit
    v[4:8] *= 2.0**-12
    k[8] *= 1e-3
    k[9] *= 1e3
    k[10], v[10] = 0.0, -0.0
    k[11, 0, 3] = v[11, 1, dim - 1] = NAN
    k, v = k.to(HALF).to(DEVICE), v.to(HALF).to(DEVICE)
    start = decode_case.random_cache(
        torch.zeros(batch, num_kv_heads, dtype=torch.int64), dim=dim, page_size=8, dtype=HALF,
        device=DEVICE, cache_dtype=stored, room=1, num_free=batch * num_kv_heads,
    )  # fmt: skip
    start.block_table_RGM[..., 0] = start.free_pages.page_ids.view(batch, num_kv_heads)
    pages = []
    for backend in (BACKEND, "torch"):
        cache = replace(start.clone(HALF), free_pages=None)
        cache_ops.decode_append(
            cache, torch.arange(batch, device=DEVICE), k, v, None, None, backend=backend
        )
        written = cache.block_table_RGM[..., 0].long()
        pages.append([
            (x.values_PSD[written][:, :, 0], x.scales_PS[written][:, :, 0])
            for x in (cache.k_pages_PSD, cache.v_pages_PSD)
        ])  # fmt: skip
    for (ours, ours_scale), (wanted, wanted_scale) in zip(*pages, strict=True):
        assert torch.equal(ours_scale.view(torch.int32)[:11], wanted_scale.view(torch.int32)[:11])
        assert torch.equal(ours_scale[11].isnan(), wanted_scale[11].isnan())
        assert torch.equal(ours.view(torch.uint8)[:11], wanted.view(torch.uint8)[:11])
    assert wanted_scale[11].isnan().tolist() == [False, True]
