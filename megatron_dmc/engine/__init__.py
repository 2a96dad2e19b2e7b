"""The inference engine: requests, scheduling, the paged context, sampling.

Names are imported when they are first used: `engine.config` and `engine.flags` need no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_dmc.engine.async_llm import AsyncLLM
    from megatron_dmc.engine.config import EngineConfig
    from megatron_dmc.engine.engine import LLMEngine
    from megatron_dmc.engine.llm import LLM
    from megatron_dmc.engine.process import EngineProcess
    from megatron_dmc.engine.request import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from megatron_dmc.engine.sampling_params import SamplingParams
    from megatron_dmc.engine.stats import EngineStats
    from megatron_dmc.engine.stream import RequestStream

_MODULES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "CompletionOutput": "request",
    "EngineConfig": "config",
    "EngineProcess": "process",
    "EngineStats": "stats",
    "LLMEngine": "engine",
    "Logprob": "request",
    "RequestMetrics": "request",
    "RequestOutput": "request",
    "RequestStream": "stream",
    "SamplingParams": "sampling_params",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineConfig",
    "EngineProcess",
    "EngineStats",
    "LLMEngine",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "RequestStream",
    "SamplingParams",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
