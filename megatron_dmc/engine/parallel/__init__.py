"""Tensor parallelism of the engine: ranks, their processes, their messages."""
