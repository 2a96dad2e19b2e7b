"""Dynamic Memory Compression (DMC) for Megatron-Core, with a paged inference engine.

Tensor names end in the letters of their dimensions (`k_TBGD`): T tokens, B batch, N query heads and G KV heads of
this rank, R rows of the engine's storage (in kernels N / G), D head dimension, L layers, E cache entries, P pages,
S slots per page, M block-table width, W merge window, U weighted tokens of an open segment, A = 2 D + 1 components
of an accumulator, F rotary or feed-forward channels, H hidden size, V vocabulary, X, Y, Z anything. The full table
is in docs/architecture.md; a file names only the letters that depart from it.
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lazily: the engine imports Megatron, which takes seconds.
    if name in ("LLM", "AsyncLLM", "SamplingParams"):
        from megatron_dmc.quiet import quietly

        with quietly():
            import megatron_dmc.engine

            return getattr(megatron_dmc.engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
