"""One rank of `test_engine_tp.py`. Arguments: model folder, size, output file, mode."""

import json
import os
import signal
import sys
import time

import torch

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.errors import EngineDead


def main():
    path, size, out, mode = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    options = {"num_pages": 60, "max_num_batched_tokens": 24} if mode != "plenty" else {}
    if "int8" in mode:
        options["kv_cache_dtype"] = "int8"
    if mode == "cached":
        options |= {"num_pages": 300, "enable_prefix_caching": True, "prefix_block_size": 4}
    llm = LLM(
        path, dtype="float64", block_size=4, max_model_len=64, max_num_seqs=4,
        tensor_parallel_size=size, **options,
    )  # fmt: skip
    if mode == "killed" and llm.engine.parallel.rank == size - 1:
        step = llm.engine._step

        def die_in_third_step(count=[0]):  # noqa: B006
            count[0] += 1
            if count[0] == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return step()

        llm.engine._step = die_in_third_step
    if llm.follow():
        return
    with open(out + ".prompts") as f:
        prompts = json.load(f)
    params = [
        SamplingParams(temperature=0, max_tokens=12) if i % 2 else
        SamplingParams(max_tokens=12, seed=i)
        for i in range(len(prompts))
    ]  # fmt: skip
    began = time.monotonic()
    try:
        for _ in range(2 if mode == "cached" else 1):
            outputs = llm.generate(
                [{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False
            )  # fmt: skip
    except EngineDead as error:
        with open(out, "w") as f:
            json.dump({"error": str(error), "seconds": time.monotonic() - began}, f)
        return
    stats = llm.stats()
    llm.engine.check_integrity()
    llm.close()
    with open(out, "w") as f:
        json.dump(
            {"tokens": [o.outputs[0].token_ids for o in outputs],
             "entries": stats.entries_LG, "preemptions": stats.num_preemptions,
             "in_use": stats.num_pages_in_use, "hits": stats.num_prefix_hit_tokens,
             "evicted": stats.num_evicted_prefixes}, f,
        )  # fmt: skip


if __name__ == "__main__":
    main()
