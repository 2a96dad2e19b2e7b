"""Prefill's CUDA kernels, under the names that `megatron_dmc.ops.backends.kernels` promises.

Dimension letters as in `ops.paged.prefill`.
"""

import functools

import torch
from torch import Tensor

from megatron_dmc.ops.cuda.decode import operators
from megatron_dmc.ops.tensors import dense_channels

TILE = 32
"""Tokens of a tile, one for each lane of a warp."""


def write_chunks(
    k_TGD: Tensor,
    v_TGD: Tensor,
    is_merge_TG: Tensor | None,
    omega_TG: Tensor | None,
    cos_TF: Tensor | None,
    sin_TF: Tensor | None,
    k_pages_PSD: Tensor,
    v_pages_PSD: Tensor,
    block_table_RGM: Tensor,
    num_entries_RG: Tensor,
    segments_RGUA: Tensor | None,
    chunks,
    *,
    merge_window: int,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """As `megatron_dmc.ops.triton.prefill_write.write_chunks`."""
    k, v, device = dense_channels(k_TGD), dense_channels(v_TGD), k_TGD.device
    num_tokens, num_kv_heads, dim = k.shape
    tiles = chunks.tiles(TILE)
    ints = functools.partial(torch.empty, dtype=torch.int32, device=device)
    entry = ints(num_tokens, num_kv_heads)
    num_tiles, compress = tiles.table_X2.shape[0], is_merge_TG is not None
    own_k = own_v = appends = sums = None
    if compress:
        own_k, own_v = (torch.empty(k.shape, dtype=k.dtype, device=device) for _ in range(2))
        appends, base = ints(num_tiles, num_kv_heads), ints(num_tiles, num_kv_heads)
        rows = 0 if merge_window else num_tiles
        sums = torch.empty(rows, num_kv_heads, 2 * dim + 1, dtype=torch.float32, device=device)
    else:
        base = num_entries_RG[chunks.table_B3[:, 0].long()].int()
    operators().prefill_write(
        k, v,
        None if is_merge_TG is None else is_merge_TG.contiguous(),
        None if omega_TG is None else omega_TG.float().contiguous(),
        cos_TF, sin_TF, k_pages_PSD, v_pages_PSD, block_table_RGM, num_entries_RG,
        segments_RGUA if compress else None, chunks.table_B3, tiles.table_X2, tiles.starts_Y,
        appends, base, sums, own_k, own_v, entry, merge_window if compress else 0,
    )  # fmt: skip
    return own_k, own_v, entry


def rows_of(head_dim: int) -> int:
    """Queries of a block of the attention kernel: tokens of a tile times query heads of a key/value head."""
    return 128 if head_dim <= 128 else 64


def attend_chunks(
    q_TND: Tensor,
    own_k_TGD: Tensor | None,
    own_v_TGD: Tensor | None,
    entry_TG: Tensor,
    cos_TF: Tensor | None,
    sin_TF: Tensor | None,
    k_pages_PSD: Tensor,
    v_pages_PSD: Tensor,
    block_table_RGM: Tensor,
    chunks,
    *,
    softmax_scale: float,
) -> Tensor:
    """As `megatron_dmc.ops.triton.prefill_attention.attend_chunks`; at most `rows_of(D)` query heads for
    each key/value head, and a `softmax_scale` above 0."""
    q = dense_channels(q_TND)
    tile_tokens = max(1, rows_of(q.shape[2]) // (q.shape[1] // entry_TG.shape[1]))
    tiles = chunks.tiles(tile_tokens, latest_first=True)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    operators().prefill_attention(
        q, own_k_TGD, own_v_TGD, entry_TG, cos_TF, sin_TF, k_pages_PSD, v_pages_PSD, block_table_RGM,
        chunks.table_B3, tiles.table_X2, out, tile_tokens, softmax_scale,
    )  # fmt: skip
    return out
