"""Prefill's Triton kernels, under the names that `megatron_dmc.ops.backends.kernels` promises."""

from megatron_dmc.ops.triton.prefill_attention import attend_chunks
from megatron_dmc.ops.triton.prefill_write import write_chunks

__all__ = ["attend_chunks", "write_chunks"]
