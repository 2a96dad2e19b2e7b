"""The inference engine: requests, scheduling, the paged context, sampling."""

from megatron_dmc.engine.async_llm import AsyncLLM, RequestStream
from megatron_dmc.engine.config import EngineConfig
from megatron_dmc.engine.engine import LLMEngine
from megatron_dmc.engine.llm import LLM
from megatron_dmc.engine.request import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from megatron_dmc.engine.sampling_params import SamplingParams
from megatron_dmc.engine.stats import EngineStats

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineConfig",
    "EngineStats",
    "LLMEngine",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "RequestStream",
    "SamplingParams",
]
