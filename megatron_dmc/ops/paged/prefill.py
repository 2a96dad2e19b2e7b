"""Prefill: chunks of several requests' prompts into a paged cache, and their attention.
docs/method.md, section 6; docs/kernels.md has the structure and its costs.

Dimension letters as in `ops.paged.decode`; here T are the packed tokens of B chunks, Y = B + 1, X tiles.

A token sees, in each head, the final states of the segments before its own, and its own segment's
state at itself. The final states are the entries: they are written to their pages first, and
attention reads old and new ones there alike. A token whose segment is entry e sees the entries below e
and its own state.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dmc.ops import gates, rope
from megatron_dmc.ops.backends import PREFILL
from megatron_dmc.ops.paged.chunks import Chunks
from megatron_dmc.ops.paged.decode import Gates
from megatron_dmc.ops.paged.kv_pages import as_stored
from megatron_dmc.ops.paged.layer_cache import LayerCache
from megatron_dmc.ops.training.attention import (
    chunk_attention,
    compacted_attention,
    masked_attention,
)
from megatron_dmc.ops.training.merge import continue_merge
from megatron_dmc.ops.training.near import join_by_lse

_COMPACTED_COST = 1.5
"""Time of `compacted_attention` over that of the dense kernels, per query and key, on a CPU."""


ChunkStates = tuple[Tensor | None, Tensor | None, Tensor]
"""Each token's own state, as the kernels of prefill hand it from writing to attention: rotated key and value
(T, G, D), None for a plain cache, and the entry (T, G) that its segment is."""


class Near(NamedTuple):
    """The raw tokens that a chunk's tokens see, with a merge delay W.

    Attributes:
        k_YGD, v_YGD: rotated keys and values of each chunk in turn: what its ring held, oldest first (zero where
            there was no token), and its own tokens. Y = T + B W.
        far_B2: int32: the tokens of each chunk that see nothing else, as many as precede token W of the sequence;
            and the row of the state that the next one sees.
    """

    k_YGD: Tensor
    v_YGD: Tensor
    far_B2: Tensor


def prefill(
    cache: LayerCache,
    chunks: Chunks,
    q_TND: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    gates_TG: Gates | None,
    freqs_TF: Tensor | None,
    *,
    softmax_scale: float,
    merge_window: int = 0,
    backend: str | None = None,
) -> Tensor:
    """Chunks of several requests in parallel, each continuing from what the cache holds of its request:
    any chunking gives what decoding the tokens one at a time gives. Only the last state of each segment
    is written.

    Mutates `cache`: slots, and the chunks' rows.

    Args:
        chunks: T is the sum of their lengths.
        q_TND, k_TGD: unrotated; the borrowed channel is ignored when compressing. v_TGD: values.
        gates_TG: a decision is ignored at a chunk's first token where a head has no entry yet. None:
            plain cache, every token is an entry and every channel counts.
        freqs_TF: RoPE angles of the tokens' positions, or None.
        merge_window: W; 0 is unlimited.

    Returns:
        out_TND in the queries' dtype, computed in float32 (float64).

    Raises:
        ValueError: the chunks do not cover the tokens, or the backend cannot.
    """
    if chunks.total != q_TND.shape[0]:
        raise ValueError(
            f"prefill: the chunks have {chunks.total} tokens, the queries {q_TND.shape[0]}"
        )
    if not chunks.rows:
        return torch.zeros_like(q_TND)
    if cache.free_pages is not None:
        rows_B = chunks.table_B3[:, 0].long()
        new_BG = new_entries(gates_TG, cache.num_entries_RG, chunks)
        cache.take_pages(rows_B, cache.num_entries_RG[rows_B] + new_BG)
    window = 0 if gates_TG is None else merge_window
    chosen = PREFILL.choose(q_TND, cache, window, backend=backend)
    kernels = PREFILL.kernels(chosen)
    if kernels is not None:
        angles_TF = rope.cosine_and_sine(freqs_TF, q_TND.dtype)
        states = kernels.write_chunks(
            cache, chunks, k_TGD, v_TGD, gates_TG, angles_TF, merge_window=merge_window
        )
        attended: Tensor = kernels.attend_chunks(
            cache, chunks, q_TND, states, angles_TF, softmax_scale=softmax_scale
        )
        return attended

    outs = []
    for row, _, at in chunks.spans():
        freqs = None if freqs_TF is None else freqs_TF[at]
        written = write_chunk(
            cache, row, k_TGD[at], v_TGD[at],
            None if gates_TG is None else (gates_TG[0][at], gates_TG[1][at]), freqs,
            merge_window=merge_window,
        )  # fmt: skip
        out, _ = attend_chunk(cache, row, q_TND[at], written, freqs, softmax_scale=softmax_scale)
        outs.append(out)
    return torch.cat(outs)


def new_entries(gates_TG: Gates | None, num_entries_RG: Tensor, chunks: Chunks) -> Tensor:
    """Entries that each chunk appends to each head, int64 (B, G); arguments as in `prefill`."""
    rows_B, first_B, num_tokens_B = chunks.table_B3.long().unbind(1)
    entries_BG = num_entries_RG[rows_B]
    if gates_TG is None:
        return num_tokens_B[:, None].expand_as(entries_BG)
    is_append_TG = ~gates_TG[0]
    is_append_TG[first_B] |= entries_BG == 0
    chunk_T = torch.repeat_interleave(num_tokens_B, output_size=is_append_TG.shape[0])
    return torch.zeros_like(entries_BG).index_add_(0, chunk_T, is_append_TG.to(entries_BG.dtype))


class Written(NamedTuple):
    """The states of a chunk, from `write_chunk` to `attend_chunk`.

    Attributes:
        own_k_TGD, own_v_TGD: each token's state: rotated merged keys, merged values.
        is_merge_TG: bool, None for a plain cache.
        entry_TG: int64, the entry that a token's segment is.
        num_visible_G: the entries from before the chunk that all its tokens see.
    """

    own_k_TGD: Tensor
    own_v_TGD: Tensor
    is_merge_TG: Tensor | None
    entry_TG: Tensor
    num_visible_G: Tensor


def write_chunk(
    cache: LayerCache,
    row: int,
    k_TGD: Tensor,
    v_TGD: Tensor,
    gates_TG: Gates | None,
    freqs_TF: Tensor | None,
    *,
    merge_window: int,
    first_entry: int = 0,
) -> Written:
    """The part of `prefill` that mutates, for one request in PyTorch.
    A head's first `first_entry` slots hold no entries: they are counted, and neither read nor written."""
    num_tokens, num_kv_heads = k_TGD.shape[:2]
    num_cached = cache.num_entries_RG[row].clamp_min(first_entry)
    is_merge = None
    num_visible = num_cached
    if gates_TG is None:
        k, v = rope.rotate_by(k_TGD, freqs_TF), v_TGD
        is_append = torch.ones(num_tokens, num_kv_heads, dtype=torch.bool, device=k.device)
    else:
        assert cache.segments_RGUA is not None
        (is_merge_TG, omega_TG), segments_GUA = gates_TG, cache.segments_RGUA[row]
        starts = is_merge_TG[:1] & (num_cached > first_entry)
        is_merge = torch.cat([starts, is_merge_TG[1:]])
        k, v, segment = continue_merge(
            gates.zero_borrowed_channel(k_TGD), v_TGD, is_merge, omega_TG, segments_GUA,
            merge_window=merge_window,
        )  # fmt: skip
        segments_GUA.copy_(segment)
        k = gates.zero_borrowed_channel(rope.rotate_by(k, freqs_TF))
        # the open entry is superseded by the chunk's first state if that merged into it
        num_visible = num_cached - starts[0].to(num_cached.dtype)
        is_append = ~is_merge
    entry_TG = num_cached + is_append.cumsum(0) - 1
    is_last = torch.cat([is_append[1:], torch.ones_like(is_append[:1])])
    slots_TG = torch.where(is_last, cache.slots(row, entry_TG.T).T, -1)
    cache.store(slots_TG.flatten(), k.flatten(0, 1), v.flatten(0, 1))
    cache.num_entries_RG[row] = entry_TG[-1] + 1
    # with 8-bit pages a token sees its chunk's states as a cache would give them back
    return Written(
        as_stored(k, cache.k_pages_PSD),
        as_stored(v, cache.v_pages_PSD),
        is_merge,
        entry_TG,
        num_visible,
    )


def attend_chunk(
    cache: LayerCache,
    row: int,
    q_TND: Tensor,
    written: Written,
    freqs_TF: Tensor | None,
    *,
    softmax_scale: float,
    first_entry: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention of a chunk that `write_chunk` has written: over the entries alone where that is less
    work, else by the stock kernels, which compute superseded keys and give them no weight.

    Returns:
        out_TND and its log-sum-exp lse_TN.
    """
    k, v, is_merge, entry_TG, num_visible = written
    q = rope.rotate_by(q_TND, freqs_TF, compress=is_merge is not None)
    num_tokens = q.shape[0]
    if is_merge is not None:
        num_old, num_new = int(num_visible.max()) - first_entry, int((~is_merge).sum(0).max())
        # what either way computes is T / 2 times (T + 2 num_old) or (num_new + 2 num_old)
        if _COMPACTED_COST * (num_new + 2 * num_old) <= num_tokens + 2 * num_old:
            keys, values, _ = cache.load(row, q.dtype, entry_TG[-1])
            keys, values = keys[:, first_entry:], values[:, first_entry:]
            return compacted_attention(
                q, k, v, keys, values, entry_TG - first_entry, softmax_scale=softmax_scale
            )
    out, lse = chunk_attention(q, k, v, is_merge, softmax_scale=softmax_scale)
    old_k, old_v, is_entry = (x[:, first_entry:] for x in cache.load(row, q.dtype, num_visible))
    if old_k.shape[1]:
        # a plain cache is equally long in every head: nothing to hide
        assert is_merge is not None or bool(is_entry.all())
        old_out, old_lse = masked_attention(
            q, old_k, old_v, None if is_merge is None else is_entry, softmax_scale=softmax_scale
        )
        out, lse = join_by_lse(out, lse, old_out, old_lse)
    return out, lse
