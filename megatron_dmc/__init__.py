"""Dynamic Memory Compression (DMC) for Megatron-Core, with a paged inference engine."""

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
