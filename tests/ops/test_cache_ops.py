"""Cache ops against the reference, token by token and against the dense formula.

Dimension letters as in `ops.paged.decode`.
"""

import math

import pytest
import torch

from megatron_dmc.ops import gates, reference, rope
from megatron_dmc.ops.paged import decode, prefill
from megatron_dmc.ops.paged.chunks import Chunks
from megatron_dmc.ops.paged.layer_cache import LayerCache
from megatron_dmc.ops.tensors import accumulator_dtype
from megatron_dmc.ops.training.merge import num_kept

NAN = float("nan")
D, S = 8, 4
SCALE = 1 / math.sqrt(D)
WINDOWS = [0, 1, 3, 12]
OFFSET = 0.3


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def angles(num_positions, rotary=D):
    frequency = 10.0 ** -torch.arange(rotary // 2, dtype=torch.float64)
    half = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequency
    return torch.cat([half, half], dim=-1)


def make_cache(num_rows, num_kv_heads, num_pages_each, merge_window, dtype=torch.float64):
    """One layer's storage, NaN everywhere, pages dealt out in a shuffled order."""
    needed = num_rows * num_kv_heads * num_pages_each
    pages = torch.randperm(needed + 3, generator=torch.Generator().manual_seed(5))[:needed]
    acc = accumulator_dtype(dtype)
    return LayerCache(
        torch.full((needed + 3, S, D), NAN, dtype=dtype),
        torch.full((needed + 3, S, D), NAN, dtype=dtype),
        pages.view(num_rows, num_kv_heads, num_pages_each).to(torch.int32),
        torch.zeros(num_rows, num_kv_heads, dtype=torch.int64),
        torch.zeros(num_rows, num_kv_heads, num_kept(merge_window), 2 * D + 1, dtype=acc),
    )


def make_inputs(num_tokens, num_kv_heads, group, seed=0, dtype=torch.float64):
    q = randn(num_tokens, num_kv_heads * group, D, seed=seed).to(dtype)
    k = randn(num_tokens, num_kv_heads, D, seed=seed + 1).to(dtype)
    v = randn(num_tokens, num_kv_heads, D, seed=seed + 2).to(dtype)
    gates.borrowed(k).mul_(2).add_(1.0)
    is_merge = gates.hard_decisions(gates.decision_logit(k, alpha_offset=OFFSET))
    omega = gates.importance(q, num_kv_heads, alpha_offset=OFFSET)
    return q, k, v, is_merge, omega


def run_prefill(cache, row, q, k, v, is_merge, omega, freqs, merge_window, tokens):
    chunks = Chunks.of([row], [len(q[tokens])], "cpu")
    return prefill.prefill(
        cache, chunks, q[tokens], k[tokens], v[tokens],
        None if is_merge is None else (is_merge[tokens], omega[tokens]),
        None if freqs is None else freqs[tokens],
        softmax_scale=SCALE, merge_window=merge_window,
    )  # fmt: skip


def run_decode(cache, rows, q, k, v, is_merge, omega, freqs, merge_window):
    """All tensors lead with B."""
    given = None if is_merge is None else (is_merge, omega)
    decode.decode_append(cache, rows, k, v, given, freqs, merge_window=merge_window)
    q = rope.rotate_by(q, freqs, compress=given is not None)
    return decode.paged_decode_attention(cache, rows, q, softmax_scale=SCALE)


def dense(q, k, v, is_merge, omega, freqs, merge_window):
    """Section 3 with hard decisions over the whole sequence."""
    alpha = is_merge.to(q.dtype)
    alpha[0] = 0
    zero = gates.zero_borrowed_channel
    y_k, y_v = reference.merge(
        zero(k)[:, None], v[:, None], alpha[:, None], omega[:, None], merge_window=merge_window
    )
    y_k = reference.rotate(y_k, freqs)
    log_keep = torch.zeros_like(alpha).masked_fill(alpha > 0, -math.inf)
    q = reference.rotate(zero(q)[:, None], freqs)
    return reference.training_attention(q, y_k, y_v, log_keep[:, None], softmax_scale=SCALE)[:, 0]


def entries_of(cache, row, head):
    k, v, is_entry = cache.load(row, cache.k_pages_PSD.dtype)
    return k[head][is_entry[head]], v[head][is_entry[head]]


@pytest.mark.parametrize("merge_window", WINDOWS)
@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("chunks", [[23], [1, 5, 17], [7, 7, 9], [4, 0, 4, 1, 14], [22, 1]])
def test_prefill_in_chunks_equals_reference_and_dense_formula(merge_window, group, chunks):
    num_tokens, num_kv_heads = 23, 3
    q, k, v, is_merge, omega = make_inputs(num_tokens, num_kv_heads, group)
    freqs = angles(num_tokens)
    zero = gates.zero_borrowed_channel
    heads = [reference.HeadCache(merge_window=merge_window) for _ in range(num_kv_heads)]
    want = reference.prefill(
        zero(q), zero(k), v, is_merge, omega, freqs, heads, softmax_scale=SCALE
    )
    cache = make_cache(2, num_kv_heads, 6, merge_window)
    outs, start = [], 0
    for size in chunks:
        tokens = slice(start, start + size)
        outs.append(run_prefill(cache, 1, q, k, v, is_merge, omega, freqs, merge_window, tokens))
        start += size
    out = torch.cat(outs)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        out, dense(q, k, v, is_merge, omega, freqs, merge_window), rtol=0, atol=1e-12
    )
    assert cache.num_entries_RG[1].tolist() == [len(h.keys) for h in heads]
    assert cache.num_entries_RG[0].tolist() == [0] * num_kv_heads
    for g, head in enumerate(heads):
        keys, values = entries_of(cache, 1, g)
        torch.testing.assert_close(keys, torch.stack(head.keys), rtol=0, atol=1e-12)
        torch.testing.assert_close(values, torch.stack(head.values), rtol=0, atol=1e-12)
        state = cache.segments_RGUA[1, g].sum(0)
        torch.testing.assert_close(state[:-1] / state[-1], head.segment.emit(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("merge_window", WINDOWS)
@pytest.mark.parametrize("group", [1, 2, 4])
def test_ragged_decode_after_prefill_equals_dense_formula(merge_window, group):
    num_kv_heads, num_decoded = 2, 11
    prompt_lens = [1, 9, 14, 6]
    rows = torch.tensor([3, 0, 2, 1])
    cache = make_cache(4, num_kv_heads, 7, merge_window)
    freqs = angles(32)
    requests = [
        make_inputs(length + num_decoded, num_kv_heads, group, seed=10 * i)
        for i, length in enumerate(prompt_lens)
    ]
    outs = []
    for row, length, inputs in zip(rows.tolist(), prompt_lens, requests, strict=True):
        outs.append([run_prefill(cache, row, *inputs, freqs, merge_window, slice(0, length))])
    for step in range(num_decoded):
        at = [length + step for length in prompt_lens]
        batch = [
            torch.stack([inputs[i][t] for inputs, t in zip(requests, at, strict=True)])
            for i in range(5)
        ]
        step_out = run_decode(cache, rows, *batch, freqs[at], merge_window)
        for i in range(len(rows)):
            outs[i].append(step_out[i : i + 1])
    for i, inputs in enumerate(requests):
        want = dense(*inputs, freqs[: inputs[0].shape[0]], merge_window)
        torch.testing.assert_close(torch.cat(outs[i]), want, rtol=0, atol=1e-12)
        appended = ~inputs[3]
        appended[0] = True
        assert cache.num_entries_RG[rows[i]].tolist() == appended.sum(0).tolist()


@pytest.mark.parametrize("chunks", [[1] * 9, [9], [4, 5], [2, 1, 6]])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("rotary", [0, 4, D])
def test_plain_cache_is_plain_attention_with_every_channel(chunks, group, rotary):
    q, k, v, _, _ = make_inputs(9, 2, group)
    freqs = angles(9, rotary) if rotary else None
    cache = make_cache(1, 2, 3, 0)
    outs, start = [], 0
    for size in chunks:
        tokens = slice(start, start + size)
        if size == 1:
            batch = [x[tokens] for x in (q, k, v)]
            step_freqs = None if freqs is None else freqs[tokens]
            outs.append(run_decode(cache, torch.tensor([0]), *batch, None, None, step_freqs, 0))
        else:
            outs.append(run_prefill(cache, 0, q, k, v, None, None, freqs, 0, tokens))
        start += size
    if freqs is not None:
        q, k = reference.rotate(q, freqs), reference.rotate(k, freqs)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), is_causal=True, enable_gqa=True
    )[0].transpose(0, 1)
    torch.testing.assert_close(torch.cat(outs), want, rtol=0, atol=1e-12)
    assert cache.num_entries_RG.tolist() == [[9, 9]]


@pytest.mark.parametrize("group", [1, 2, 4])
def test_paged_decode_attention_equals_reference_over_ragged_heads(group):
    num_entries = torch.tensor([[0, 1, 4], [5, 13, 0], [16, 3, 8]])
    cache = make_cache(3, 3, 4, 0)
    for b in range(3):
        for g in range(3):
            entries = torch.arange(num_entries[b, g])
            slots = cache.slots(b, entries.expand(3, -1))[g]
            rows = randn(2, len(slots), D, seed=10 * b + g)
            cache.store(slots, rows[0], rows[1])
    cache.num_entries_RG.copy_(num_entries)
    cache.block_table_RGM[0, 0] = -1  # no entries, no pages
    q = randn(3, 3 * group, D, seed=99)
    out = decode.paged_decode_attention(cache, torch.arange(3), q, softmax_scale=SCALE)
    want = reference.paged_decode_attention(
        q, cache.k_pages_PSD, cache.v_pages_PSD, cache.block_table_RGM, num_entries,
        softmax_scale=SCALE,
    )  # fmt: skip
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    assert torch.equal(out[0, :group], torch.zeros_like(out[0, :group]))


def test_nothing_is_written_without_a_page():
    cache = make_cache(1, 2, 2, 0)
    cache.block_table_RGM[0, 1] = -1
    _, k, v, _, omega = make_inputs(1, 2, 1)
    before = cache.k_pages_PSD.clone()
    appends = torch.zeros(1, 2, dtype=torch.bool)
    decode.decode_append(cache, torch.tensor([0]), k, v, (appends, omega), None)
    changed = (cache.k_pages_PSD != before) & ~(cache.k_pages_PSD.isnan() & before.isnan())
    page = int(cache.block_table_RGM[0, 0, 0])
    assert changed.flatten(1).any(1).nonzero().flatten().tolist() == [page]
    assert changed[page].any(-1).tolist() == [True, False, False, False]


@pytest.mark.parametrize("merge_window", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_makes_the_same_decisions_and_stays_close(merge_window, dtype):
    num_tokens = 19
    q, k, v, is_merge, omega = make_inputs(num_tokens, 2, 2, dtype=dtype)
    exact = [x.double() for x in (q, k, v)]
    logit = gates.decision_logit(exact[1], alpha_offset=OFFSET)
    assert torch.equal(gates.hard_decisions(logit), is_merge)
    freqs = angles(num_tokens).float()
    cache = make_cache(1, 2, 6, merge_window, dtype)
    assert cache.segments_RGUA.dtype == torch.float32
    outs = [
        run_prefill(cache, 0, q, k, v, is_merge, omega, freqs, merge_window, slice(0, 10)),
        run_prefill(cache, 0, q, k, v, is_merge, omega, freqs, merge_window, slice(10, 15)),
    ]
    for t in range(15, num_tokens):
        batch = [x[t : t + 1] for x in (q, k, v, is_merge, omega)]
        outs.append(run_decode(cache, torch.tensor([0]), *batch, freqs[t : t + 1], merge_window))
    out = torch.cat(outs)
    assert out.dtype == dtype
    want = dense(*exact, is_merge, omega.double(), freqs.double(), merge_window)
    # yardstick: the same dtype's dense formula
    honest = dense(q, k, v, is_merge, omega.to(dtype), freqs, merge_window)
    error = (out.double() - want).abs().max()
    assert error <= 2 * (honest.double() - want).abs().max() + 1e-6
    appended = ~is_merge
    appended[0] = True
    assert cache.num_entries_RG[0].tolist() == appended.sum(0).tolist()


def test_unknown_backend_is_refused():
    cache = make_cache(1, 1, 1, 0)
    with pytest.raises(ValueError, match="decode: backend='fpga' does not exist"):
        decode.paged_decode_attention(
            cache, torch.tensor([0]), torch.zeros(1, 1, D), softmax_scale=1.0, backend="fpga"
        )
