"""Prefill in Triton, under the name that `megatron_dmc.ops.cache_backend.kernels` promises."""

from torch import Tensor

from megatron_dmc.ops.triton.prefill_attention import attend_chunks
from megatron_dmc.ops.triton.prefill_write import write_chunks

__all__ = ["attend_chunks", "prefill", "write_chunks"]


def prefill(
    q_TND, k_TGD, v_TGD, is_merge_TG, omega_TG, cos_TF, sin_TF, k_pages_PSD, v_pages_PSD,
    block_table_RGM, num_entries_RG, segments_RGUA, chunks, *, softmax_scale, merge_window,
) -> Tensor:  # fmt: skip
    """`megatron_dmc.ops.prefill.prefill`, with cosines and sines for angles."""
    own_k, own_v, entry = write_chunks(
        k_TGD, v_TGD, is_merge_TG, omega_TG, cos_TF, sin_TF, k_pages_PSD, v_pages_PSD,
        block_table_RGM, num_entries_RG, segments_RGUA, chunks, merge_window=merge_window,
    )  # fmt: skip
    return attend_chunks(
        q_TND, own_k, own_v, entry, cos_TF, sin_TF, k_pages_PSD, v_pages_PSD, block_table_RGM,
        chunks, softmax_scale=softmax_scale,
    )  # fmt: skip
