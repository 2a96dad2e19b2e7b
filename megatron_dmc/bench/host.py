"""Host time of a decode step outside of the model (H1): the scheduler, page accounting, the sampler's launches, appending,
outputs.

Regime: `LLMEngine` around a model that computes nothing, with Llama-2-7B's 32 layers of 32 KV heads. Its heads append one token in
four to real pages. All requests decode greedily, without texts as behind the server, which detokenises in a process of
its own. Metric: thread CPU time of `LLMEngine.step`, less that of the stand-ins for the device; the median of the steps.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_dmc.bench.measure import Settings, document
from megatron_dmc.bench.output import Result, Row
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.config import DMCConfig
from megatron_dmc.engine import EngineConfig, LLMEngine, SamplingParams
from megatron_dmc.engine.chunk import Chunk
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
    """`PagedContext` whose heads append a token in turn, without keys and values."""

    def __init__(self, *, clock: Clock, **options: Any) -> None:
        super().__init__(**options)
        self._clock, self._count = clock, 0
        num_layers, _, num_heads = self.tables.num_entries_LRG.shape
        self._turn_L1G = torch.arange(num_layers * num_heads).view(num_layers, 1, num_heads) % _CR

    def end_step(self) -> None:
        """As `PagedContext.end_step`; the tokens become entries before."""
        with self._clock.device():
            self._append(self._chunks)
        super().end_step()

    def _append(self, chunks: Sequence[Chunk]) -> None:
        tables, page_size = self.tables, self.page_size
        rows = torch.tensor([chunk.row for chunk in chunks])
        entries_LBG = tables.num_entries_LRG[:, rows]
        starts_B1, ends_B1 = (
            torch.tensor([[at] for at in ats])
            for ats in zip(*((chunk.start, chunk.end) for chunk in chunks), strict=True)
        )
        before, after = (
            (ats_B1 + self._turn_L1G).div(_CR, rounding_mode="floor")
            for ats_B1 in (starts_B1, ends_B1)
        )
        grown_LBG = (entries_LBG + after - before).clamp(min=1)
        tables.num_entries_LRG[:, rows] = grown_LBG
        needs_page = -(-grown_LBG // page_size) > -(-entries_LBG // page_size)
        if needs_page.any():
            table_LBGM = tables.page_ids_LRGM[:, rows]
            page_ops.take_for_entries(table_LBGM, grown_LBG, page_size, self.pool.free_pages)
            tables.page_ids_LRGM[:, rows] = table_LBGM


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
    times: list[float] = []
    for _ in range(repeats + 2):
        device, began = clock.seconds, time.thread_time()
        changed = engine.advance()
        seconds = time.thread_time() - began - (clock.seconds - device)
        if len(changed) == batch:
            times.append(1e3 * seconds)
    assert len(times) >= repeats, "a request waited"
    ordered = sorted(times)
    return {
        "batch": batch, "async_scheduling": is_async, "host_ms": statistics.median(times),
        "p10_ms": ordered[len(times) // 10], "p90_ms": ordered[-1 - len(times) // 10],
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
