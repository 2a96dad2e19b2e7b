"""Prefill's Triton kernels, a back end of `ops.backends.PREFILL`."""

from torch import Tensor

from megatron_dmc.ops.paged.layer_cache import LayerCache
from megatron_dmc.ops.refusals import prefill_refusal
from megatron_dmc.ops.triton import decode
from megatron_dmc.ops.triton.prefill_attention import attend_chunks
from megatron_dmc.ops.triton.prefill_write import write_chunks

__all__ = ["attend_chunks", "refusal", "write_chunks"]


def refusal(q_TND: Tensor, cache: LayerCache, merge_window: int) -> str:
    """See `ops.backends`."""
    return decode.refusal(q_TND, cache.page_size) or prefill_refusal(cache, merge_window)
