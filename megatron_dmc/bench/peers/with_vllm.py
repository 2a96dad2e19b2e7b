"""vLLM's engine in this process, stepped as `LLM.generate` does; no prefix caching."""

import os
from collections.abc import Iterator
from typing import Any

from . import cases

GIBIBYTES_OF_CACHE = "4"


def measure(asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the row of each case of a request that `cases` describes; raises what the engine raises."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", GIBIBYTES_OF_CACHE)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the memory is this process's
    import torch
    import vllm

    torch.set_num_threads(asked["threads"])
    all_cases = asked["cases"]
    llm = vllm.LLM(
        asked["model"], dtype=asked["dtype"], enable_prefix_caching=False,
        max_model_len=max(c["context"] + c["new_tokens"] for c in all_cases),
        max_num_seqs=max(c["batch"] for c in all_cases), enforce_eager=asked["threads"] == 1,
    )  # fmt: skip
    engine = llm.llm_engine

    def run(case: dict[str, Any], name: str) -> dict[str, Any]:
        params = vllm.SamplingParams(
            temperature=0, max_tokens=case["new_tokens"], ignore_eos=True, detokenize=False
        )
        requests = cases.prompts(case)
        progress = cases.Progress(case, asked["clock"])
        for number, ids in enumerate(requests):
            engine.add_request(f"{name}-{number}", {"prompt_token_ids": ids}, params)
        while engine.has_unfinished_requests():
            progress.step(output.request_id for output in engine.step())
        return progress.row()

    run(all_cases[0] | {"context": 8, "new_tokens": 2}, "warm-up")
    for number, case in enumerate(all_cases):
        yield case | run(case, str(number)) | {"version": vllm.__version__}


if __name__ == "__main__":
    cases.answer(measure)
