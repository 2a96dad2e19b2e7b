"""Decoding's kernels for CPUs, a back end of `ops.backends.DECODE`.

Outputs are allocated here; the operators of `megatron_dmc/csrc/cpu` fill them. Dimension letters as in
`ops.paged.decode`.
"""

from torch import Tensor

from megatron_dmc.ops.cpu import operators, refusal
from megatron_dmc.ops.cpu.outputs import output
from megatron_dmc.ops.paged.decode import Angles, Gates
from megatron_dmc.ops.paged.kv_pages import parts_of
from megatron_dmc.ops.paged.layer_cache import LayerCache
from megatron_dmc.ops.tensors import dense_channels

__all__ = ["decode_append", "paged_decode_attention", "plan", "refusal"]


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
    q_out = None if q_BND is None else output(q_BND.shape, q_BND.dtype)
    is_merge, omega = gates_BG or (None, None)
    free, delayed = cache.free_pages, cache.delayed
    operators().decode_append.default(
        None if q_BND is None else dense_channels(q_BND), dense_channels(k_BGD),
        dense_channels(v_BGD), None if is_merge is None else is_merge.contiguous(),
        None if omega is None else omega.float().contiguous(), *angles_XF, positions_B,
        *parts_of(cache.k_pages_PSD, cache.v_pages_PSD), cache.block_table_RGM,
        cache.num_entries_RG, cache.segments_RGUA if compress else None, rows_B,
        None if free is None else free.page_ids, None if free is None else free.state,
        None if delayed is None else delayed.is_merge_XGW,
        None if delayed is None else delayed.omega_XGW, q_out,
        compress, may_merge, alpha_offset, merge_window,
    )  # fmt: skip
    return q_out


def copied(x: Tensor) -> Tensor:
    """Contiguous, as recorded work needs it."""
    out = output(x.shape, x.dtype)
    operators().copy.default(x, out)
    return out


def plan(num_entries_LRG: Tensor, rows_B: Tensor, *, ahead: int = 0) -> list[None]:
    """As `megatron_dmc.ops.paged.decode.plan_decode_attention`: work is divided when attention looks."""
    return [None] * num_entries_LRG.shape[0]


def paged_decode_attention(
    cache: LayerCache,
    rows_B: Tensor,
    q_BND: Tensor,
    plan_Y: None = None,
    *,
    softmax_scale: float,
) -> Tensor:
    """As `megatron_dmc.ops.paged.decode.paged_decode_attention`; the same bits for any number of threads and
    any other requests."""
    out = output(q_BND.shape, q_BND.dtype)
    operators().paged_decode_attention.default(
        dense_channels(q_BND), *parts_of(cache.k_pages_PSD, cache.v_pages_PSD),
        cache.block_table_RGM, cache.num_entries_RG, rows_B, out, softmax_scale,
    )  # fmt: skip
    return out
