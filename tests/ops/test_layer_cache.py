"""`LayerCache`: addresses, reads and writes, pages taken, poison."""

from dataclasses import replace

import pytest
import torch

from megatron_dmc.ops.paged import kv_pages
from megatron_dmc.ops.paged.layer_cache import LayerCache
from megatron_dmc.ops.paged.pages import FreePages

P, S, D = 6, 4, 8


def make_cache(dtype=torch.float64):
    k_pages, v_pages = (kv_pages.empty_pages(P, S, D, dtype=dtype) for _ in "kv")
    table = torch.tensor([[[5, 2], [0, -1]], [[3, -1], [-1, -1]]], dtype=torch.int32)
    cache = LayerCache(k_pages, v_pages, table, torch.tensor([[6, 3], [2, 0]]))
    cache.poison()
    return cache


def test_slots_are_page_and_offset():
    cache = make_cache()
    assert (cache.page_size, cache.head_dim, cache.num_kv_heads) == (S, D, 2)
    entries = torch.tensor([0, 3, 4, 5]).expand(2, -1)
    assert cache.slots(0, entries).tolist() == [[20, 23, 8, 9], [0, 3, -1, -1]]
    rows = torch.tensor([1, 0])
    assert (
        cache.slots(rows, entries.expand(2, -1, -1))[1].tolist() == cache.slots(0, entries).tolist()
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_what_is_stored_is_loaded_and_nothing_else(dtype):
    cache = make_cache(dtype)
    entries = torch.arange(6).expand(2, 2, -1)
    is_entry = entries < cache.num_entries_RG[..., None]
    slots = torch.where(is_entry, cache.slots(slice(None), entries), -1)
    x = torch.randn(slots.numel(), D, dtype=torch.float64)
    cache.store(slots.flatten(), x, -x)
    assert (~cache.is_poisoned()).sum() == cache.num_entries_RG.sum()
    k, v, found = cache.load(torch.tensor([0, 1]), torch.float64)
    assert torch.equal(found, is_entry) and torch.equal(v, -k)
    wanted = kv_pages.as_stored(x, cache.k_pages_PSD).view(2, 2, 6, D)
    assert torch.equal(k, wanted.masked_fill(~is_entry[..., None], 0.0))
    one, _, _ = cache.load(0, torch.float64, torch.tensor([2, 1]))
    assert torch.equal(one[0], wanted[0, 0, :2]) and torch.equal(one[1, 1], torch.zeros(D).double())
    copy = cache.clone(torch.float64)
    copy.poison()
    assert torch.equal(cache.load(0, torch.float64)[0], k[0])


def test_pages_are_taken_where_entries_will_lie():
    cache = make_cache()
    cache.take_pages(0, torch.tensor([8, 8]))
    assert cache.block_table_RGM[0, 1].tolist() == [0, -1]  # nothing to take from
    cache = replace(cache, free_pages=FreePages.of(torch.tensor([1, 4])))
    cache.take_pages(torch.tensor([1, 0]), torch.tensor([[4, 1], [8, 5]]))
    assert cache.block_table_RGM.tolist() == [[[5, 2], [0, 4]], [[3, -1], [1, -1]]]
    assert cache.free_pages.taken() == 2
