"""Pages of 8-bit entries in PyTorch: rounding, poison, bytes, and that chunks change nothing.

Dimension letters as in `ops.paged.kv_pages`.
"""

from dataclasses import replace

import pytest
import torch
from test_cache_ops import (
    S,
    angles,
    dense,
    entries_of,
    make_cache,
    make_inputs,
    run_decode,
    run_prefill,
)

from megatron_dmc.cache import PagePool
from megatron_dmc.ops.paged import decode, kv_pages
from megatron_dmc.ops.paged.layer_cache import LayerCache

EIGHT_BITS = [torch.float8_e4m3fn, torch.int8]
# largest error of a channel over the entry's largest one: half a step
STEP = {torch.float8_e4m3fn: 16 / 448, torch.int8: 0.5 / 127}


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_an_entry_is_rounded_to_the_nearest_code_of_its_own_scale(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 24, generator=generator) * torch.logspace(-30, 30, 300)[:, None]
    values, scales = kv_pages.quantise(x, dtype)
    largest = kv_pages.LARGEST[dtype]
    assert values.dtype == dtype and scales.dtype == torch.float32
    assert (values.float().abs().amax(-1) == largest).all()
    codes = (
        torch.arange(127, dtype=torch.uint8).view(dtype).double()
        if dtype == torch.float8_e4m3fn
        else torch.arange(128).double()
    )
    wanted = x.double().abs() / scales.double()[:, None]
    nearest = (wanted[..., None] - codes).abs().amin(-1)
    error = (values.double().abs() - wanted).abs()
    assert (error <= nearest + 1e-5).all()
    assert torch.equal(values.float().sign(), torch.where(values.float() == 0, 0, x.sign()))
    back = kv_pages.dequantise(values, scales, torch.float32)
    assert ((back - x).abs().amax(-1) <= 1.001 * STEP[dtype] * x.abs().amax(-1)).all()
    # what has been read once is written again as it was
    again, same = kv_pages.quantise(back, dtype)
    torch.testing.assert_close(same, scales, rtol=3e-7, atol=0)
    assert torch.equal(again.view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_zeros_small_numbers_and_nan(dtype):
    x = torch.tensor([[0.0, 0.0], [1e-38, -1e-39], [1.0, float("nan")], [1.0, float("inf")]])
    back = kv_pages.dequantise(*kv_pages.quantise(x, dtype), torch.float32)
    assert torch.equal(back[:2], torch.zeros(2, 2))
    assert back[2].isnan().all() and not back[3].isfinite().any()


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_a_free_page_that_is_read_shows(dtype):
    pool = PagePool(4, S, 8, dtype=dtype, poison=True)
    assert pool.page_bytes == 2 * S * (8 + 4)
    used, unused = pool.take(1), pool.take(1)
    slots = used.long() * S + torch.arange(S)
    x = torch.randn(S, 8, generator=torch.Generator().manual_seed(0))
    table = used.clone().view(1, 1, 1)
    cache = LayerCache(pool.k_pages_PSD, pool.v_pages_PSD, table, torch.tensor([[S]]))
    cache.store(slots, x, x)
    q = torch.ones(1, 1, 8)

    def attend(table):
        of_table = replace(cache, block_table_RGM=table)
        return decode.paged_decode_attention(of_table, torch.tensor([0]), q, softmax_scale=1.0)

    assert attend(table).isfinite().all()
    assert attend(unused.view(1, 1, 1)).isnan().all()
    pool.copy(used, unused)
    assert torch.equal(attend(unused.view(1, 1, 1)), attend(table))
    pool.release(used.view(1, 1))
    assert attend(table).isnan().all()


def scaled(cache, dtype):
    """The same cache with pages of 8 bits."""
    shape = cache.k_pages_PSD.shape
    k_pages, v_pages = (kv_pages.empty_pages(*shape, dtype=dtype) for _ in "kv")
    cache = replace(cache, k_pages_PSD=k_pages, v_pages_PSD=v_pages)
    cache.poison()
    return cache


@pytest.mark.parametrize("dtype", EIGHT_BITS)
@pytest.mark.parametrize("merge_window", [0, 3])
@pytest.mark.parametrize("compress", [True, False])
def test_prefill_in_any_chunks_equals_decoding(dtype, merge_window, compress):
    """Exactly, for float64 outside of the pages: also what is in the pages."""
    num_tokens, num_kv_heads = 23, 2
    q, k, v, is_merge, omega = make_inputs(num_tokens, num_kv_heads, 2)
    if not compress:
        is_merge = omega = None
    freqs = angles(num_tokens)
    outs, pages = [], []
    for chunks in ([1] * num_tokens, [num_tokens], [7, 1, 9, 6]):
        cache = scaled(make_cache(1, num_kv_heads, 6, merge_window), dtype)
        out, start = [], 0
        for size in chunks:
            tokens = slice(start, start + size)
            start += size
            if size > 1:
                out.append(
                    run_prefill(cache, 0, q, k, v, is_merge, omega, freqs, merge_window, tokens)
                )
                continue
            batch = [None if x is None else x[tokens] for x in (q, k, v, is_merge, omega)]
            out.append(run_decode(cache, torch.tensor([0]), *batch, freqs[tokens], merge_window))
        outs.append(torch.cat(out))
        used = cache.block_table_RGM.long().flatten()
        pages.append([x[used] for x in kv_pages.tensors_of(cache.k_pages_PSD)])
    torch.testing.assert_close(outs[1], outs[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(outs[2], outs[0], rtol=0, atol=1e-12)
    for values, scales in pages[1:]:
        assert torch.equal(values.view(torch.uint8), pages[0][0].view(torch.uint8))
        assert torch.equal(scales.nan_to_num(-1), pages[0][1].nan_to_num(-1))


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_merging_does_not_accumulate_the_rounding(dtype):
    """An entry that 200 tokens were merged into is off by one rounding of their mean."""
    num_tokens = 200
    q, k, v, _, omega = make_inputs(num_tokens, 1, 1)
    is_merge = torch.ones(num_tokens, 1, dtype=torch.bool)
    exact = make_cache(1, 1, 1, 0)
    stored = scaled(make_cache(1, 1, 1, 0), dtype)
    for t in range(num_tokens):
        batch = [x[t : t + 1] for x in (q, k, v, is_merge, omega)]
        for cache in (exact, stored):
            run_decode(cache, torch.tensor([0]), *batch, None, 0)
    assert stored.num_entries_RG.item() == 1
    for pages, wanted in zip(
        (stored.k_pages_PSD, stored.v_pages_PSD), entries_of(exact, 0, 0), strict=True
    ):
        got = kv_pages.load(pages, stored.block_table_RGM[0, 0].long(), torch.float64)[0, :1]
        assert (got - wanted).abs().max() <= 1.001 * STEP[dtype] * wanted.abs().max()
        assert torch.equal(got, kv_pages.as_stored(wanted, pages))


@pytest.mark.parametrize("dtype", EIGHT_BITS)
def test_attention_stays_close_to_that_without_rounding(dtype):
    num_tokens = 40
    q, k, v, is_merge, omega = make_inputs(num_tokens, 2, 2)
    freqs = angles(num_tokens)
    cache = scaled(make_cache(1, 2, 10, 0), dtype)
    out = run_prefill(cache, 0, q, k, v, is_merge, omega, freqs, 0, slice(0, num_tokens))
    want = dense(q, k, v, is_merge, omega, freqs, 0)
    error = (out - want).norm() / want.norm()
    assert 1e-5 < error < {torch.float8_e4m3fn: 0.05, torch.int8: 0.015}[dtype]
