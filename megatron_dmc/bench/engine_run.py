"""Requests through an engine, step by step, and the figures of a run.

A step counts as decoding where it and the step before gave a token to as many requests as the batch has: nothing
is prefilled in it. Its wall-clock seconds are the whole step's: schedule, model, sampling, page accounting.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

from megatron_dmc.bench.cost import Ceilings, ModelCost
from megatron_dmc.engine import LLM, RequestOutput, SamplingParams

Asked = Sequence[tuple[Any, int]]
"""Prompts, texts or token ids, with the number of tokens to generate."""


@dataclass
class DecodeStep:
    """A step in which every request of the batch got a token and none was prefilled."""

    seconds: float
    num_requests: int
    seq_tokens: int
    """Tokens of all requests, which their caches stand for."""


@dataclass
class Run:
    """Outputs and times of one run."""

    seconds: float = 0.0
    time_to_first_token: float = 0.0
    """Until the last first token of the first batch."""
    outputs: list[RequestOutput] = field(default_factory=list)
    decoding: list[DecodeStep] = field(default_factory=list)
    fragmentation: float | None = None
    """Bytes of the pages held / bytes of live entries, just before the first request ended."""

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(output.prompt_token_ids) for output in self.outputs)

    @property
    def num_generated(self) -> int:
        return sum(len(output.outputs[0].token_ids) for output in self.outputs)

    @property
    def measured_cr(self) -> float:
        """Total tokens / total entries."""
        metrics = [output.metrics for output in self.outputs]
        return sum(m.num_cached_tokens for m in metrics) / sum(m.num_entries for m in metrics)


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run_requests(llm: LLM, asked: Asked, *, name: str, batch: int, bar: bool = False) -> Run:
    """Give all requests at once and step until the last has ended; greedy, full-length completions.

    Args:
        name: prefix of this run's request ids.
        batch: how many run at a time.

    Raises:
        InvalidRequest: one of them can never run.
    """
    engine, run = llm.engine, Run()
    for number, (prompt, num_new) in enumerate(asked):
        params = SamplingParams(temperature=0, max_tokens=num_new, ignore_eos=True)
        engine.add_request(f"{name}-{number}", prompt, params)
    wanted = {f"{name}-{number}": num_new for number, (_, num_new) in enumerate(asked)}
    started: set[str] = set()
    was_full = False
    synchronize()
    began = before = time.perf_counter()
    with tqdm(total=len(asked), desc=name, unit="request", disable=None if bar else True) as shown:
        while engine.has_unfinished_requests:
            outputs = engine.step()
            now = time.perf_counter()
            if len(started) < batch and outputs:
                started.update(output.request_id for output in outputs)
                run.time_to_first_token = now - began
            is_full = len(outputs) == batch
            ends = False
            if is_full:
                tokens = 0
                for output in outputs:
                    num_new = len(output.outputs[0].token_ids)
                    tokens += len(output.prompt_token_ids) + num_new - 1
                    ends |= num_new == wanted[output.request_id] - 1
                if was_full:
                    run.decoding.append(DecodeStep(now - before, batch, tokens))
            was_full = is_full
            for output in outputs:
                if output.finished:
                    run.outputs.append(output)
                    shown.update()
            if ends and run.fragmentation is None:
                run.fragmentation = llm.stats().fragmentation
            before = time.perf_counter()
        synchronize()
    run.seconds = time.perf_counter() - began
    return run


def decode_figures(run: Run, cost: ModelCost, ceilings: Ceilings) -> dict[str, Any]:
    """Achieved and attainable figures of the steps that only decode; empty where there are none."""
    steps = run.decoding
    if not steps:
        return {}
    seconds = sum(step.seconds for step in steps)
    requests = steps[0].num_requests
    live = [step.seq_tokens * cost.num_heads / run.measured_cr for step in steps]
    floors = [ceilings.floor(cost, requests, entries) for entries in live]
    floor = {name: statistics.fmean(f[name] for f in floors) for name in floors[0]}
    mean_seconds = seconds / len(steps)
    return {
        "decode_tokens_per_second": requests * len(steps) / seconds,
        "decode_step_ms": 1e3 * mean_seconds,
        "median_decode_step_ms": 1e3 * statistics.median(step.seconds for step in steps),
        "mean_context": statistics.fmean(step.seq_tokens for step in steps) / requests,
        "step_bytes": cost.step_bytes(statistics.fmean(live)),
        "memory_floor_ms": 1e3 * floor["memory"],
        "arithmetic_floor_ms": 1e3 * floor["arithmetic"],
        "roofline_tokens_per_second": requests / floor["roofline"],
        "fraction_of_roofline": floor["roofline"] / mean_seconds,
    }


def spread(values: Sequence[float]) -> float | None:
    """(largest - smallest) / median of repeated measurements; None of a single one."""
    if len(values) < 2:
        return None
    return (max(values) - min(values)) / statistics.median(values)
