"""This engine; a CR other than 1 is imposed (`engine.imposed`)."""

import argparse
import importlib.metadata
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from megatron_dmc.bench import command
from megatron_dmc.bench.decode_step import filled_engine
from megatron_dmc.bench.measure import ModelCost, Settings, copy_bandwidth, release_memory
from megatron_dmc.bench.model_under_test import ModelUnderTest, Point
from megatron_dmc.engine import SamplingParams
from megatron_dmc.engine.engine import LLMEngine

from . import cases


def measure(asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the row of each case of a request that `cases` describes; raises what the engine raises."""
    torch.set_num_threads(asked["threads"])
    all_cases = asked["cases"]
    longest = max(c["context"] + c["new_tokens"] for c in all_cases)
    parser = argparse.ArgumentParser(conflict_handler="resolve")
    command.add_throughput(parser)
    args = parser.parse_args(
        [asked["model"], "--dtype", asked["dtype"], "--device", "cpu",
         "--kv-cache-memory-bytes", str(asked["cache_bytes"])]
    )  # fmt: skip
    tested = ModelUnderTest.from_args(args, longest)
    settings = Settings(tested.device, tested.description.dtype, (), repeats=20, output=None)
    bandwidth = copy_bandwidth(settings, cases.CLOCKS[asked["clock"]])

    def bound(case: dict[str, Any], entry_bytes: int) -> float:
        """Tokens per second if the bytes of a step moved like a copy; halfway through the new tokens."""
        cost = ModelCost.of(tested.loaded.model, tested.description, entry_bytes)
        entries = (case["context"] + case["new_tokens"] / 2) * tested.heads / case["cr"]
        return case["batch"] * bandwidth / cost.step_bytes(case["batch"] * entries)

    def prompted(case: dict[str, Any], point: Point, name: str) -> LLMEngine:
        engine = tested.engine(point)[0].engine
        params = SamplingParams(
            temperature=0, max_tokens=case["new_tokens"], ignore_eos=True, detokenize=False
        )
        requests = cases.prompts(case, min(cases.VOCAB, tested.description.vocab_size))
        for number, ids in enumerate(requests):
            engine.add_request(f"{name}-{number}", {"prompt_token_ids": ids}, params)
        return engine

    def run(case: dict[str, Any], name: str) -> dict[str, Any]:
        point = Point(case["cr"], case["batch"], case["context"], case["new_tokens"])
        release_memory()  # of the case before
        tested.settings["num_pages"] = None
        tested.share_pages([point])
        if point.max_num_seqs is None:
            case |= {"batch": tested.largest_batch(point), "cache_bytes": asked["cache_bytes"]}
            point = replace(point, max_num_seqs=case["batch"])
        is_filled = asked["filled_caches"]
        engine = filled_engine(tested, point)[0] if is_filled else prompted(case, point, name)
        progress = cases.Progress(case, asked["clock"])
        while engine.has_unfinished_requests:
            progress.step(output.request_id for output in engine.step())
        row = (
            case
            | progress.row()
            | {
                "copy_bytes_per_s": bandwidth,
                "bound_tokens_per_s": bound(case, engine.stats().entry_bytes),
            }
        )
        return row | {"prefill_s": None} if is_filled else row

    run(all_cases[0] | {"batch": 1, "context": 8, "new_tokens": 2}, "warm-up")
    version = importlib.metadata.version("megatron-dmc")
    for number, case in enumerate(all_cases):
        yield run(case, str(number)) | {"version": version}


if __name__ == "__main__":
    cases.answer(measure)
