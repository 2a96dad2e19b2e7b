"""Triton kernels, each with a host wrapper; `megatron_dmc.ops` decides when they run."""
