"""Decoding's Triton kernels, under the names that `megatron_dmc.ops.backends.kernels` promises."""

from megatron_dmc.ops.triton.decode_append import decode_append
from megatron_dmc.ops.triton.decode_attention import paged_decode_attention, plan
from megatron_dmc.ops.triton.release import release_pages

__all__ = ["decode_append", "paged_decode_attention", "plan", "release_pages"]
