"""Host time of a decode step outside of the model (H1): the scheduler, page accounting, the sampler's launches, appending,
outputs.

Regime: `LLMEngine` around a model that computes nothing, with Llama-2-7B's 32 layers of 32 KV heads, which append to real
pages at CR 4. All requests decode greedily, without texts as behind the server, which detokenises in a process of
its own. Metric: thread CPU time of `LLMEngine.advance`, less that of the stand-ins for the device. The median is a step
that counts no entries; the mean has one in eight that does.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dmc.bench.measure import Settings, document
from megatron_dmc.bench.output import Result, Row
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.config import DMCConfig
from megatron_dmc.engine import EngineConfig, LLMEngine, SamplingParams
from megatron_dmc.engine.context import PagedContext
from megatron_dmc.ops.paged import pages as page_ops

_CR = 4
_PROMPT = 32
_VOCAB = 256


class Clock:
    """Thread CPU time spent in stand-ins for the device.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def device(self) -> Iterator[None]:
        """Count what happens within."""
        began = time.thread_time()
        yield
        self.seconds += time.thread_time() - began


class StandIn(nn.Module):
    """Called like Megatron's GPTModel; its logits are zeros."""

    def __init__(self, clock: Clock):
        super().__init__()
        self._clock = clock

    def forward(
        self, input_ids: Tensor, *, output_processor_context: Tensor | None, **_: Any
    ) -> Tensor:
        """Logits (X, 1, V)."""
        with self._clock.device():
            rows = input_ids[0] if output_processor_context is None else output_processor_context
            return torch.zeros(len(rows), 1, _VOCAB)


class StandInContext(PagedContext):
    """`PagedContext` of requests that do the same at the same time. Every head keeps a token in four of the prompt;
    then the heads of one layer in four append the token, the others merge it. There are no keys and values."""

    def __init__(self, *, clock: Clock, **options: Any) -> None:
        super().__init__(**options)
        self._clock, self._num_steps = clock, 0

    def end_step(self) -> None:
        """As `PagedContext.end_step`; the tokens become entries before."""
        with self._clock.device():
            first = self._num_steps % _CR
            layers = slice(first, None, _CR) if self._num_steps else slice(None)
            grown_LRG = self.tables.num_entries_LRG[layers]
            grown_LRG += 1 if self._num_steps else _PROMPT // _CR
            if (grown_LRG[:, 0, 0] % self.page_size == 1).any() or not self._num_steps:
                table_LRGM = self.tables.page_ids_LRGM[layers]
                page_ops.take_for_entries(
                    table_LRGM, grown_LRG, self.page_size, self.pool.free_pages
                )
            self._num_steps += 1
        super().end_step()


def make_engine(clock: Clock, batch: int, num_new: int, is_async: bool) -> LLMEngine:
    """An engine whose `batch` requests have their prompts in the cache."""
    description = ModelDescription(
        num_layers=32, hidden_size=64, ffn_hidden_size=64, num_attention_heads=32,
        num_query_groups=32, kv_channels=2, vocab_size=_VOCAB,
        max_position_embeddings=_PROMPT + num_new, dtype=torch.float32,
        dmc=DMCConfig(stage="finetune", target_cr=float(_CR)),
    )  # fmt: skip
    heads = description.num_layers * description.num_query_groups
    block_size = 16
    config = EngineConfig(
        max_model_len=_PROMPT + num_new, block_size=block_size, max_num_seqs=batch,
        num_pages=batch * heads * -(-(_PROMPT + num_new) // block_size),
        max_num_batched_tokens=max(2048, batch * _PROMPT), async_scheduling=is_async,
    )  # fmt: skip
    engine = LLMEngine(
        StandIn(clock), description, None, config, dtype=description.dtype,
        make_context=lambda **options: StandInContext(clock=clock, **options),
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True)
    for i in range(batch):
        engine.add_request(str(i), [i % _VOCAB] * _PROMPT, params)
    return engine


def measure(batch: int, repeats: int, is_async: bool) -> Row:
    """Host milliseconds of a step in which `batch` requests decode."""
    clock = Clock()
    engine = make_engine(clock, batch, repeats + 4, is_async)
    for _ in range(3):  # prompts, and the first steps after them
        engine.advance()
    times: list[float] = []
    for _ in range(repeats):
        device, began = clock.seconds, time.thread_time()
        changed = engine.advance()
        seconds = time.thread_time() - began - (clock.seconds - device)
        assert len(changed) == batch, "a request waited"
        times.append(1e3 * seconds)
    ordered = sorted(times)
    return {
        "batch": batch, "async_scheduling": is_async, "host_ms": statistics.median(times),
        "mean_ms": statistics.fmean(times), "p10_ms": ordered[len(times) // 10], "p90_ms": ordered[-1 - len(times) // 10],
    }  # fmt: skip


def run(args: argparse.Namespace) -> Result:
    """Run the benchmark; on the CPU in any case."""
    rows = [
        measure(batch, args.repeats, is_async)
        for batch in args.batches
        for is_async in (False, True)
    ]
    settings = Settings(torch.device("cpu"), torch.float32, (), args.repeats, None)
    return Result(document("host", settings, rows=rows))
