"""Prefill's kernels for CPUs, a back end of `ops.backends.PREFILL`."""

import torch
from torch import Tensor

from megatron_dmc.ops import cpu
from megatron_dmc.ops.paged.chunks import Chunks
from megatron_dmc.ops.paged.decode import Angles, Gates
from megatron_dmc.ops.paged.layer_cache import LayerCache
from megatron_dmc.ops.paged.prefill import ChunkStates, Near
from megatron_dmc.ops.tensors import dense_channels


def refusal(q_TND: Tensor, cache: LayerCache, merge_window: int) -> str:
    """See `ops.backends`."""
    if cache.is_scaled:
        return "pages of 8 bits"
    return cpu.refusal(q_TND, cache.page_size)


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
    is_merge, omega = gates_TG or (None, None)
    compress = is_merge is not None
    own_k, own_v = (
        torch.empty(k_TGD.shape, dtype=k_TGD.dtype) if compress else None for _ in range(2)
    )
    entry = torch.empty(k_TGD.shape[:2], dtype=torch.int32)
    cpu.operators().prefill_write.default(
        dense_channels(k_TGD), dense_channels(v_TGD),
        None if is_merge is None else is_merge.contiguous(),
        None if omega is None else omega.float().contiguous(),
        *angles_TF, cache.k_pages_PSD, cache.v_pages_PSD, cache.block_table_RGM, cache.num_entries_RG,
        cache.segments_RGUA if compress else None, chunks.table_B3, own_k, own_v, entry,
        merge_window if compress else 0, cache.delay,
    )  # fmt: skip
    return own_k, own_v, entry


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
    """As `megatron_dmc.ops.triton.prefill_attention.attend_chunks`; the same bits for any number of threads and any other
    requests, and without a delay for any chunks."""
    out = torch.empty(q_TND.shape, dtype=q_TND.dtype)
    cpu.operators().prefill_attention.default(
        dense_channels(q_TND), *states, *angles_TF, cache.k_pages_PSD, cache.v_pages_PSD,
        cache.block_table_RGM, chunks.table_B3, *(near or (None, None, None)), out, cache.delay,
        states[0] is not None or cache.evicts, softmax_scale,
    )  # fmt: skip
    return out
