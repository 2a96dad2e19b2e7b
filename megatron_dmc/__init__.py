"""Dynamic Memory Compression (DMC) for Megatron-Core, with a paged inference engine."""

__version__ = "0.1.0"
