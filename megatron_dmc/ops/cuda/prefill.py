"""Prefill with the CUDA extension, under the name that `megatron_dmc.ops.cache_backend.kernels` promises.

The chunks are written by CUDA kernels; attention is Triton's. Dimension letters as in `ops.prefill`.
"""

import functools

import torch
from torch import Tensor

from megatron_dmc.ops.cuda.decode import _operators, _rows
from megatron_dmc.ops.triton import prefill as triton_prefill
from megatron_dmc.ops.triton.prefill_attention import attend_chunks

__all__ = ["attend_chunks", "prefill", "write_chunks"]

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
    k, v, device = _rows(k_TGD), _rows(v_TGD), k_TGD.device
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
    _operators().prefill_write(
        k, v,
        None if is_merge_TG is None else is_merge_TG.contiguous(),
        None if omega_TG is None else omega_TG.float().contiguous(),
        cos_TF, sin_TF, k_pages_PSD, v_pages_PSD, block_table_RGM, num_entries_RG,
        segments_RGUA if compress else None, chunks.table_B3, tiles.table_X2, tiles.starts_Y,
        appends, base, sums, own_k, own_v, entry, merge_window if compress else 0,
    )  # fmt: skip
    return own_k, own_v, entry


prefill = functools.partial(triton_prefill.prefill, write=write_chunks)
