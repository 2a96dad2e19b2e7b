"""Prefill of several requests in PyTorch against the reference, token by token. Dimension letters as in
`ops.paged.prefill`."""

from dataclasses import replace

import pytest
import torch
from test_cache_ops import SCALE, S, angles, entries_of, make_cache, make_inputs
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dmc.errors import OutOfPages
from megatron_dmc.ops import gates, reference
from megatron_dmc.ops.paged import prefill
from megatron_dmc.ops.paged.chunks import Chunks
from megatron_dmc.ops.paged.pages import FreePages

LENGTHS = [150, 9, 31]
ROWS = [2, 0, 3]


def requests_of(group, seed=0):
    """Inputs of requests whose heads merge all, most, some or nothing."""
    requests = []
    for i, length in enumerate(LENGTHS):
        q, k, v, _, omega = make_inputs(length, 4, group, seed=10 * i + seed)
        generator = torch.Generator().manual_seed(i + seed)
        rates = torch.tensor([1.0, 0.9, 0.6, 0.0])
        requests.append((q, k, v, torch.rand(length, 4, generator=generator) < rates, omega))
    return requests


@pytest.mark.parametrize("merge_window", [0, 5])
@pytest.mark.parametrize("cost", [0.0, prefill._COMPACTED_COST, float("inf")])
@pytest.mark.parametrize("steps", [[1.0], [0.3, 1.0], [0.1, 0.12, 0.7, 1.0]])
def test_requests_together_in_chunks_equal_the_reference(merge_window, cost, steps, monkeypatch):
    """By the dense kernels, over the compacted keys, and as the op chooses."""
    monkeypatch.setattr(prefill, "_COMPACTED_COST", cost)
    group = 2
    requests, freqs = requests_of(group), angles(max(LENGTHS))
    cache = make_cache(4, 4, -(-max(LENGTHS) // S) + 1, merge_window)
    outs = [[] for _ in requests]
    done = [0] * len(requests)
    for step in steps:
        ends = [round(step * n) for n in LENGTHS]
        spans = [slice(a, b) for a, b in zip(done, ends, strict=True)]
        packed = [
            torch.cat([x[i][span] for x, span in zip(requests, spans, strict=True)])
            for i in range(5)
        ]
        sizes = [b - a for a, b in zip(done, ends, strict=True)]
        out = prefill.prefill(
            cache, Chunks.of(ROWS, sizes, "cpu"), *packed[:3], packed[3:],
            torch.cat([freqs[span] for span in spans]), softmax_scale=SCALE,
            merge_window=merge_window,
        )  # fmt: skip
        for of_request, part in zip(outs, out.split(sizes), strict=True):
            of_request.append(part)
        done = ends
    zero = gates.zero_borrowed_channel
    for row, (q, k, v, is_merge, omega), parts in zip(ROWS, requests, outs, strict=True):
        heads = [reference.HeadCache(merge_window=merge_window) for _ in range(4)]
        want = reference.prefill(
            zero(q), zero(k), v, is_merge, omega, freqs[: len(q)], heads, softmax_scale=SCALE
        )
        torch.testing.assert_close(torch.cat(parts), want, rtol=0, atol=1e-12)
        assert cache.num_entries_RG[row].tolist() == [len(h.keys) for h in heads]
        for g, head in enumerate(heads):
            keys, values = entries_of(cache, row, g)
            torch.testing.assert_close(keys, torch.stack(head.keys), rtol=0, atol=1e-12)
            torch.testing.assert_close(values, torch.stack(head.values), rtol=0, atol=1e-12)
    assert cache.num_entries_RG[1].tolist() == [0] * 4


@pytest.mark.parametrize("plain", [False, True])
def test_pages_are_taken_for_new_entries_and_no_others(plain):
    requests = requests_of(1)
    cache = make_cache(4, 4, 40, 0)
    page_ids = cache.block_table_RGM.flatten().clone()
    free_pages = FreePages.of(page_ids)
    cache.block_table_RGM.fill_(-1)
    cache = replace(
        cache, free_pages=free_pages, segments_RGUA=None if plain else cache.segments_RGUA
    )
    for spans in (
        [slice(0, 7), slice(0, 4), slice(0, 30)],
        [slice(7, 90), slice(4, 9), slice(30, 31)],
    ):
        packed = [
            torch.cat([x[i][s] for x, s in zip(requests, spans, strict=True)]) for i in range(5)
        ]
        prefill.prefill(
            cache, Chunks.of(ROWS, [s.stop - s.start for s in spans], "cpu"), *packed[:3],
            None if plain else packed[3:], torch.cat([angles(150)[s] for s in spans]),
            softmax_scale=SCALE,
        )  # fmt: skip
        held = cache.block_table_RGM >= 0
        assert torch.equal(held.sum(-1), (cache.num_entries_RG + S - 1) // S)
        assert held.long().diff(dim=-1).max() == 0  # from the first column on, without a gap
        assert free_pages.taken() == held.sum()
        taken = cache.block_table_RGM[held]
        assert sorted(taken.tolist()) == sorted(page_ids[: len(taken)].tolist())
    assert cache.num_entries_RG.sum(-1)[1] == 0 and (cache.num_entries_RG[ROWS] > 0).all()
    if plain:
        assert cache.num_entries_RG[ROWS].tolist() == [[90] * 4, [9] * 4, [31] * 4]
    with pytest.raises(OutOfPages):
        q, k, v, is_merge, omega = requests[0]
        few = FreePages.of(page_ids[:3])
        empty = make_cache(4, 4, 40, 0)
        empty.block_table_RGM.fill_(-1)
        prefill.prefill(
            replace(empty, free_pages=few), Chunks.of([1], [len(q)], "cpu"), q, k, v,
            (~is_merge & False, omega), None, softmax_scale=SCALE,
        )  # fmt: skip
        few.taken()


class Largest(TorchDispatchMode):
    """The most elements that any operator returned in one tensor."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_memory_is_linear_in_tokens(monkeypatch):
    monkeypatch.setattr(prefill, "_COMPACTED_COST", 0.0)
    num_tokens = 600
    q, k, v, is_merge, omega = make_inputs(num_tokens, 1, 1, dtype=torch.float32)
    cache = make_cache(1, 1, num_tokens // S, 0, torch.float32)
    with Largest() as largest:
        out = prefill.prefill(
            cache, Chunks.of([0], [num_tokens], "cpu"), q, k, v, (is_merge, omega),
            angles(num_tokens).float(), softmax_scale=SCALE,
        )  # fmt: skip
    assert out.isfinite().all() and largest.elements < num_tokens**2 / 4


def test_tiles_cover_every_chunk_once():
    chunks = Chunks.of([5, 1, 7], [70, 0, 32], "cpu")
    assert chunks.rows == (5, 7) and chunks.table_B3.tolist() == [[5, 0, 70], [7, 70, 32]]
    tiles = chunks.tiles(32)
    assert tiles.table_X2.tolist() == [[0, 0], [0, 32], [0, 64], [1, 0]]
    assert tiles.starts_Y.tolist() == [0, 3, 4]
    assert chunks.tiles(32) is tiles
    latest = chunks.tiles(32, latest_first=True)
    assert latest.table_X2.tolist() == [[0, 64], [0, 32], [0, 0], [1, 0]]


def test_what_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"rows \[3, 3\] are not distinct; use one call for each"):
        Chunks.of([3, 3], [4, 5], "cpu")
    q, k, v, is_merge, omega = make_inputs(4, 1, 1, dtype=torch.float32)
    cache = make_cache(1, 1, 2, 17, torch.float32)

    def call(chunks, **options):
        return prefill.prefill(
            cache, chunks, q, k, v, (is_merge, omega), None, softmax_scale=SCALE, **options
        )

    with pytest.raises(ValueError, match="the chunks have 3 tokens, the queries 4"):
        call(Chunks.of([0], [3], "cpu"))
    chunks = Chunks.of([0], [4], "cpu")
    with pytest.raises(ValueError, match="backend='triton' cannot run .*only tensors on a GPU"):
        call(chunks, backend="triton")
    # as on a GPU
    monkeypatch.setattr("megatron_dmc.ops.triton.decode.INTERPRETED", True)
    with pytest.raises(ValueError, match=r"triton \(merge_window=17, more than 16\), .*torch"):
        call(chunks, backend="triton", merge_window=17)
    assert call(chunks, merge_window=17).shape == q.shape  # PyTorch takes over
    assert cache.num_entries_RG.tolist() == [[int((~is_merge[1:]).sum()) + 1]]
