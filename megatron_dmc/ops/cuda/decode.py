"""Decoding's CUDA kernels, a back end of `ops.backends.DECODE`.

Outputs and workspace are allocated here; the operators of `megatron_dmc/csrc` fill them.
Local letters: Y = B x G + 1.
"""

import functools

import torch
from torch import Tensor

from megatron_dmc.ops import cuda
from megatron_dmc.ops.cuda import refusal
from megatron_dmc.ops.paged.decode import Angles, Gates
from megatron_dmc.ops.paged.kv_pages import parts_of
from megatron_dmc.ops.paged.layer_cache import LayerCache
from megatron_dmc.ops.tensors import dense_channels

__all__ = ["decode_append", "paged_decode_attention", "plan", "refusal"]


@functools.cache
def _num_workers(device: torch.device, head_dim: int, dtype: torch.dtype) -> int:
    with torch.cuda.device(device):
        return int(cuda.operators().count_workers(head_dim, torch.empty(0, dtype=dtype)))


def decode_append(
    cache: LayerCache,
    rows_B: Tensor,
    q_BND: Tensor | None,
    k_BGD: Tensor,
    v_BGD: Tensor,
    gates_BG: Gates | None,
    angles_XF: Angles,
    positions_B: Tensor,
    *,
    compress: bool,
    may_merge: bool,
    alpha_offset: float,
    merge_window: int,
) -> Tensor | None:
    """As `megatron_dmc.ops.triton.decode_append.decode_append`."""
    q = None if q_BND is None else dense_channels(q_BND)
    q_out = None if q is None else torch.empty(q.shape, dtype=q.dtype, device=q.device)
    is_merge, omega = gates_BG or (None, None)
    free, delayed = cache.free_pages, cache.delayed
    cuda.operators().decode_append(
        q, dense_channels(k_BGD), dense_channels(v_BGD),
        None if is_merge is None else is_merge.contiguous(),
        None if omega is None else omega.float().contiguous(),
        *angles_XF, positions_B, *parts_of(cache.k_pages_PSD, cache.v_pages_PSD), cache.block_table_RGM, cache.num_entries_RG,
        cache.segments_RGUA if compress else None, rows_B,
        None if free is None else free.page_ids, None if free is None else free.state,
        None if delayed is None else delayed.is_merge_XGW,
        None if delayed is None else delayed.omega_XGW,
        q_out, compress, may_merge, alpha_offset, merge_window,
    )  # fmt: skip
    return q_out


def plan(num_entries_LRG: Tensor, rows_B: Tensor, *, ahead: int = 0) -> Tensor:
    """As `megatron_dmc.ops.paged.decode.plan_decode_attention`: plan_LY, int32."""
    num_layers, _, num_kv_heads = num_entries_LRG.shape
    size = rows_B.shape[0] * num_kv_heads + 1
    out = torch.empty(num_layers, size, dtype=torch.int32, device=rows_B.device)
    cuda.operators().plan(num_entries_LRG, rows_B, out, ahead)
    return out


def paged_decode_attention(
    cache: LayerCache,
    rows_B: Tensor,
    q_BND: Tensor,
    plan_Y: Tensor | None,
    *,
    softmax_scale: float,
    num_workers: int | None = None,
) -> Tensor:
    """As `megatron_dmc.ops.paged.decode.paged_decode_attention`.

    Args:
        num_workers: C; default: as many warps as the GPU holds at once.
    """
    pages = parts_of(cache.k_pages_PSD, cache.v_pages_PSD)
    q = dense_channels(q_BND)
    if q.stride(0) % 2 or q.stride(1) % 2 or q.storage_offset() % 2:
        q = q.contiguous()
    if plan_Y is None:
        plan_Y = plan(cache.num_entries_RG[None], rows_B)[0]
    num_workers = num_workers or _num_workers(q.device, q.shape[-1], pages[0].dtype)
    group = q.shape[1] // cache.num_kv_heads
    part = torch.empty(num_workers, 2, group, q.shape[-1], dtype=torch.float32, device=q.device)
    part_lse = torch.empty(num_workers, 2, group, dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    cuda.operators().paged_decode_attention(
        q, *pages, cache.block_table_RGM, cache.num_entries_RG, rows_B, plan_Y, out, part, part_lse,
        softmax_scale,
    )  # fmt: skip
    return out
