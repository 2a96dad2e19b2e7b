"""vLLM's engine in this process, stepped as `LLM.generate` does. No prefix caching, unless caches are to be filled: then
all requests of a case have the same prompt, which is in the prefix cache before the case begins."""

import os
from collections.abc import Iterator
from typing import Any

from . import cases

MOST_REQUESTS = 256
"""At a time, where the cache sets the batch."""
SHARED_BYTES = 2**30
"""Of the cache where requests share their prompt: more would not be used."""


def measure(asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the row of each case of a request that `cases` describes; raises what the engine raises."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the memory is this process's
    import torch
    import vllm

    torch.set_num_threads(asked["threads"])
    all_cases, is_filled = asked["cases"], asked["filled_caches"]
    cache_bytes = min(asked["cache_bytes"], SHARED_BYTES) if is_filled else asked["cache_bytes"]
    llm = vllm.LLM(
        asked["model"], dtype=asked["dtype"], enable_prefix_caching=is_filled,
        kv_cache_memory_bytes=cache_bytes,
        max_model_len=max(c["context"] + c["new_tokens"] for c in all_cases),
        max_num_seqs=max(c["batch"] or MOST_REQUESTS for c in all_cases), enforce_eager=asked["threads"] == 1,
    )  # fmt: skip
    engine = llm.llm_engine

    def largest_batch(case: dict[str, Any]) -> int:
        cache = engine.vllm_config.cache_config
        blocks = -(-(case["context"] + case["new_tokens"]) // cache.block_size)
        fitting = cache.num_gpu_blocks * asked["cache_bytes"] // (cache_bytes * blocks)
        return min(fitting, MOST_REQUESTS)

    def run(case: dict[str, Any], name: str) -> dict[str, Any]:
        params = vllm.SamplingParams(
            temperature=0, max_tokens=case["new_tokens"], ignore_eos=True, detokenize=False
        )
        requests = cases.prompts(case)
        if is_filled:
            requests = requests[:1] * case["batch"]
            prefill = vllm.SamplingParams(temperature=0, max_tokens=1, detokenize=False)
            llm.generate({"prompt_token_ids": requests[0]}, prefill, use_tqdm=False)
        progress = cases.Progress(case, asked["clock"])
        for number, ids in enumerate(requests):
            engine.add_request(f"{name}-{number}", {"prompt_token_ids": ids}, params)
        while engine.has_unfinished_requests():
            progress.step(output.request_id for output in engine.step())
        shared = {"prefill_s": None, "shared_prompt": True} if is_filled else {}
        return progress.row() | shared

    run(all_cases[0] | {"batch": 1, "context": 8, "new_tokens": 2}, "warm-up")
    for number, case in enumerate(all_cases):
        if case["batch"] is None:
            case |= {"batch": largest_batch(case), "cache_bytes": asked["cache_bytes"]}
        yield case | run(case, str(number)) | {"version": vllm.__version__}


if __name__ == "__main__":
    cases.answer(measure)
