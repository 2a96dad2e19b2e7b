"""Prefill's kernels against the PyTorch version, which test_prefill.py and test_cache_ops.py hold against
the specification; see kernel_cases_merge.py for how these cases run.

Dimension letters as in `ops.paged.prefill`.
"""

import math

import pytest
import torch
from kernel_cases_decode import BACKEND, HALF, LARGE, chosen  # patches Triton
from kernel_cases_merge import DEVICE

from megatron_dmc.ops.paged import prefill
from megatron_dmc.ops.paged.chunks import Chunks
from megatron_dmc.ops.paged.delayed import prefill_delayed
from megatron_dmc.ops.tensors import accumulator_dtype
from megatron_dmc.ops.testing import decode_case, prefill_case
from megatron_dmc.ops.testing.yardstick import errors_within_twice_the_yardstick

# of the heads of a case, in turn
RATES = [0.75, 0.0, 1.0, 0.5]


def run_case(
    lengths_RG, rows, num_tokens, *, group, dim, page_size, dtype, window=0, rotary=None, plain=False,
    rates=RATES, seed=0, strided=True,
):  # fmt: skip
    """Two steps: the second chunk continues what the first left."""
    num_kv_heads = lengths_RG.shape[1]
    rotary = dim if rotary is None else rotary
    pages = sum(-(-n // page_size) + 1 for n in num_tokens) * num_kv_heads * 2
    room = 2 * (-(-max(num_tokens) // page_size) + 1)
    cache = decode_case.random_cache(
        lengths_RG, dim=dim, page_size=page_size, dtype=dtype, device=DEVICE, room=room,
        num_free=2 * pages, merge_window=window, seed=seed,
    )  # fmt: skip
    chunks = Chunks.of(rows, num_tokens, DEVICE)
    total = sum(num_tokens)
    for step in range(2):
        qkv = decode_case.random_heads(
            total, [num_kv_heads * group, num_kv_heads, num_kv_heads], dim, dtype=dtype,
            device=DEVICE, seed=seed + step, strided=strided,
        )  # fmt: skip
        gates = angles = None
        if not plain:
            gates = prefill_case.random_decisions(
                total, [rates[g % len(rates)] for g in range(num_kv_heads)], device=DEVICE,
                seed=seed + step,
            )  # fmt: skip
        if rotary:
            generator = torch.Generator().manual_seed(seed + step)
            half = torch.rand(total, rotary // 2, generator=generator) * 6
            angles = torch.cat([half, half], dim=-1).to(DEVICE)

        def run(*args, **options):
            return prefill.prefill(*args, **options, backend=BACKEND)

        prefill_case.check_prefill(
            run, qkv, gates, angles, cache, chunks, softmax_scale=2 / math.sqrt(dim),
            merge_window=window,
        )  # fmt: skip
        # pages given are gone
        held = set(cache.block_table_RGM[cache.block_table_RGM >= 0].tolist())
        free = [p for p in cache.free_pages.page_ids.tolist() if p not in held]
        cache.free_pages.page_ids.resize_(len(free)).copy_(torch.tensor(free))


# rows of entries, rows used, tokens of chunks, group, head dim, page size, dtype, window, rotary, plain
THREE = torch.tensor([[0, 1], [8, 17], [40, 3], [2, 2]])
CASES = [
    (THREE, [2, 0, 1], [37, 1, 34], 1, 64, 8, HALF, 0, None, False),
    (THREE, [0, 1], [70, 33], 4, 64, 16, HALF, 12, 32, False),
    (THREE, [1, 3], [3, 2], 8, 96, 8, HALF, 4, None, False),
    (THREE, [0, 3], [18, 33], 2, 96, 16, torch.float32, 0, 0, False),
    (torch.tensor([[0, 0], [9, 9]]), [1, 0], [20, 35], 3, 64, 8, HALF, 0, None, True),
    (torch.tensor([[150, 33]]), [0], [20], 4, 128, 32, torch.float16, 0, None, False),
    (torch.tensor([[3, 100]]), [0], [9], 8, 256, 16, HALF, 0, 64, False),
    # more entries than all stages of a pipeline hold
    (torch.tensor([[290, 290]]), [0], [37], 2, 64, 64, HALF, 0, None, True),
]
CASES_LARGE = [
    (
        torch.tensor([[0, 1, 64, 5], [30, 31, 32, 33], [7, 0, 100, 8]]), [2, 1, 0], sizes, group,
        dim, page_size, dtype, window, None, False,
    )
    for group in (1, 4, 8)
    for dim, page_size in ((64, 64), (96, 32), (128, 16), (256, 8))
    for window, dtype, sizes in (
        (0, HALF, [130, 31, 65]), (12, HALF, [54, 53, 11]), (1, HALF, [5, 100, 64]),
        (16, torch.float32, [1, 16, 150]),
    )
] + [
    (torch.full((2, 2), cached), [0, 1], [100, 33], group, dim, 16, HALF, 0, dim // 2, True)
    for cached in (0, 33)
    for group, dim in ((1, 128), (8, 64), (5, 96))
]  # fmt: skip


@pytest.mark.parametrize(
    "case", chosen(CASES, CASES_LARGE), ids=lambda c: "-".join(map(str, c[1:]))
)
def test_prefill_equals_pytorch(case):
    lengths, rows, sizes, group, dim, page_size, dtype, window, rotary, plain = case
    run_case(
        lengths, rows, sizes, group=group, dim=dim, page_size=page_size, dtype=dtype,
        window=window, rotary=rotary, plain=plain,
    )  # fmt: skip


@pytest.mark.parametrize("window", [0, 12] if LARGE else [0])
def test_a_segment_over_many_tiles(window):
    """A head that merges all, and one that does so from the middle of a tile on."""
    num_tokens = 1100 if LARGE else 130
    run_case(
        torch.tensor([[3, 0]]), [0], [num_tokens], group=1, dim=64, page_size=8, dtype=HALF,
        window=window, rates=[1.0, 0.99],
    )  # fmt: skip


# group, head dim, page size, dtype, window (None: tokens are evicted), delay, rotary
DELAYED = [
    (2, 64, 8, HALF, None, 5, 64),
    (4, 96, 16, HALF, None, 16, 32),
    (1, 64, 16, HALF, None, 1, 0),
    (2, 64, 8, HALF, 0, 5, 64),
    (4, 96, 16, HALF, 3, 16, 32),
    (1, 64, 8, torch.float32, 0, 1, 0),
]
if BACKEND == "host":  # tiles of another size
    DELAYED += [(2, 128, 16, HALF, 0, 21, 128), (1, 128, 8, HALF, None, 5, 64)]
DELAYED_LARGE = [
    (group, dim, page_size, HALF, window, delay, dim)
    for group, dim, page_size in ((1, 64, 64), (8, 128, 16), (8, 256, 8))
    for window, delay in ((0, 16), (0, 40), (12, 3), (None, 17))
]


@pytest.mark.parametrize("case", chosen(DELAYED, DELAYED_LARGE), ids=str)
def test_prefill_after_a_delay(case):
    """A chunk that no token leaves; chunks that end in a ring, that fill it and that go round it, in three steps, each
    behind the last."""
    group, dim, page_size, dtype, window, delay, rotary = case
    evicts, window = window is None, window or 0
    entries = torch.tensor(
        [[0, 0], [delay, delay + 9], [delay + 3, delay + 1], [delay, delay], [0, 0]]
    )
    entries[0], entries[2] = delay - 1, 0
    cache = decode_case.random_cache(
        entries, dim=dim, page_size=page_size, dtype=dtype, device=DEVICE, room=20, num_free=200,
        merge_window=window, delay=delay, evicts=evicts,
    )  # fmt: skip
    half = torch.rand(200, rotary // 2, generator=torch.Generator().manual_seed(7)) * 6
    freqs = torch.cat([half, half], dim=-1).to(DEVICE) if rotary else None
    starts = {1: delay + 9, 0: delay - 1, 3: delay, 2: 0, 4: 0}
    steps = [{4: delay - 1}] if delay > 1 else []
    steps += [
        {1: 37, 0: 1, 3: 5, 2: delay + 6},
        {1: 1, 0: 40, 3: 2, 2: 1},
        {1: 3, 0: 2, 3: 33, 2: 4},
    ]
    for step, sizes in enumerate(steps):
        chunks = Chunks.of(
            list(sizes), list(sizes.values()), DEVICE, starts=[starts[row] for row in sizes]
        )
        qkv = decode_case.random_heads(
            chunks.total, [2 * group, 2, 2], dim, dtype=dtype, device=DEVICE, seed=step,
            strided=step == 0,
        )  # fmt: skip
        gates = prefill_case.random_decisions(chunks.total, [0.8, 0.4], device=DEVICE, seed=step)
        caches, outs = [cache], []
        caches += [cache.clone(torch.float64), cache.clone(dtype)]
        for each, backend in zip(caches, (BACKEND, "torch", "torch"), strict=True):
            each_dtype = each.k_pages_PSD.dtype
            outs.append(
                prefill_delayed(
                    each, chunks, *(x.to(each_dtype) if each is not cache else x for x in qkv),
                    gates, freqs if freqs is None else freqs.to(accumulator_dtype(each_dtype)),
                    softmax_scale=2 / math.sqrt(dim), merge_window=window, backend=backend,
                )
            )  # fmt: skip
        ours, exact, _ = caches
        assert torch.equal(ours.num_entries_RG, exact.num_entries_RG)
        assert torch.equal(ours.free_pages.state, exact.free_pages.state)
        assert torch.equal(ours.delayed.is_merge_XGW, exact.delayed.is_merge_XGW)
        errors_within_twice_the_yardstick(
            decode_case.names_of(cache, "out"),
            *(decode_case.results_of(o, c) for o, c in zip(outs, caches, strict=True)),
        )
        for row, size in sizes.items():
            starts[row] += size
