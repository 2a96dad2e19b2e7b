"""Prefill's CUDA kernels, a back end of `ops.backends.PREFILL`."""

import functools

import torch
from torch import Tensor

from megatron_dmc.ops import cuda
from megatron_dmc.ops.paged.chunks import Chunks
from megatron_dmc.ops.paged.decode import Angles, Gates
from megatron_dmc.ops.paged.layer_cache import LayerCache
from megatron_dmc.ops.paged.prefill import ChunkStates, Near
from megatron_dmc.ops.refusals import prefill_refusal
from megatron_dmc.ops.tensors import dense_channels

TILE = 32
"""Tokens of a tile, one for each lane of a warp."""


def refusal(q_TND: Tensor, cache: LayerCache, merge_window: int) -> str:
    """See `ops.backends`."""
    return cuda.refusal(q_TND, cache.page_size) or prefill_refusal(cache, merge_window)


def write_chunks(
    cache: LayerCache,
    chunks: Chunks,
    k_TGD: Tensor,
    v_TGD: Tensor,
    gates_TG: Gates | None,
    angles_TF: Angles,
    *,
    merge_window: int,
) -> ChunkStates:
    """As `megatron_dmc.ops.triton.prefill_write.write_chunks`."""
    k, v, device = dense_channels(k_TGD), dense_channels(v_TGD), k_TGD.device
    num_tokens, num_kv_heads, dim = k.shape
    tiles = chunks.tiles(TILE)
    ints = functools.partial(torch.empty, dtype=torch.int32, device=device)
    entry = ints(num_tokens, num_kv_heads)
    num_tiles, compress = tiles.table_X2.shape[0], gates_TG is not None
    is_merge, omega = gates_TG or (None, None)
    own_k = own_v = appends = sums = None
    if compress:
        own_k, own_v = (torch.empty(k.shape, dtype=k.dtype, device=device) for _ in range(2))
        appends, base = ints(num_tiles, num_kv_heads), ints(num_tiles, num_kv_heads)
        rows = 0 if merge_window else num_tiles
        sums = torch.empty(rows, num_kv_heads, 2 * dim + 1, dtype=torch.float32, device=device)
    else:
        base = cache.num_entries_RG[chunks.table_B3[:, 0].long()].int()
    cuda.operators().prefill_write(
        k, v,
        None if is_merge is None else is_merge.contiguous(),
        None if omega is None else omega.float().contiguous(),
        *angles_TF, cache.k_pages_PSD, cache.v_pages_PSD, cache.block_table_RGM,
        cache.num_entries_RG, cache.segments_RGUA if compress else None, chunks.table_B3,
        tiles.table_X2, tiles.starts_Y,
        appends, base, sums, own_k, own_v, entry, merge_window if compress else 0,
        cache.delay,
    )  # fmt: skip
    return own_k, own_v, entry


def rows_of(head_dim: int) -> int:
    """Queries of a block of the attention kernel: tokens of a tile times query heads of a key/value head."""
    return 128 if head_dim <= 128 else 64


def attend_chunks(
    cache: LayerCache,
    chunks: Chunks,
    q_TND: Tensor,
    states: ChunkStates,
    angles_TF: Angles,
    *,
    softmax_scale: float,
    near: Near | None = None,
) -> Tensor:
    """As `megatron_dmc.ops.triton.prefill_attention.attend_chunks`; at most `rows_of(D)` query heads for
    each key/value head, and a `softmax_scale` above 0."""
    q = dense_channels(q_TND)
    tile_tokens = max(1, rows_of(q.shape[2]) // (q.shape[1] // cache.num_kv_heads))
    tiles = chunks.tiles(tile_tokens, latest_first=True)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    cuda.operators().prefill_attention(
        q, *states, *angles_TF, cache.k_pages_PSD, cache.v_pages_PSD, cache.block_table_RGM,
        chunks.table_B3, tiles.table_X2, *(near or (None, None, None)), out, cache.delay,
        tile_tokens, softmax_scale,
    )  # fmt: skip
    return out
