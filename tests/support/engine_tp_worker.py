"""One rank of `test_engine_tp.py`. Arguments: model folder, size, output file, mode."""

import functools
import json
import os
import signal
import sys
import time

import torch

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.errors import EngineDead, RequestFailed

TIMEOUT_S = 6.0


def main():
    path, size, out, mode = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    short = mode not in ("plenty", "killed", "failed")
    options = {"num_pages": 108 // size, "max_num_batched_tokens": 24} if short else {}
    if "int8" in mode:
        options |= {"kv_cache_dtype": "int8", "num_pages": 60}
    if "cached" in mode:
        num_pages = 450 if "delay" in mode else 300  # copies of the rings
        options |= {"num_pages": num_pages, "enable_prefix_caching": True, "prefix_block_size": 4}
    llm = LLM(
        path, dtype="float32" if "float32" in mode else "float64", block_size=4, max_model_len=64, max_num_seqs=4,
        tensor_parallel_size=size, distributed_timeout_seconds=TIMEOUT_S, device="cpu", **options,
    )  # fmt: skip
    parallel = llm.engine.parallel
    own = [] if parallel.children is None else [p.pid for p in parallel.children.processes]
    if mode == "killed" and parallel.rank == size - 1:
        in_third_step(llm.engine, lambda: os.kill(os.getpid(), signal.SIGKILL))
    if mode == "stopped":
        in_third_step(llm.engine, lambda: os.kill(own[-1], signal.SIGSTOP))
    if mode == "failed" and parallel.rank == 0:
        fail_on_this_rank(llm.engine, number=2)
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
        for _ in range(2 if "cached" in mode else 1):
            outputs = llm.generate(
                [{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False
            )  # fmt: skip
    except RequestFailed as error:
        outputs = error.outputs
    except EngineDead as error:
        with open(out, "w") as f:
            json.dump(
                {"error": str(error), "seconds": time.monotonic() - began,
                 "alive": [pid for pid in own if is_alive(pid)]}, f,
            )  # fmt: skip
        return
    stats = llm.stats()
    llm.engine.check_integrity()
    llm.close()
    with open(out, "w") as f:
        json.dump(
            {"alive": [pid for pid in own if is_alive(pid)], "tokens": [o.outputs[0].token_ids for o in outputs],
             "errors": [o.error for o in outputs], "entries": stats.entries_LG, "preemptions": stats.num_preemptions,
             "in_use": stats.num_pages_in_use, "hits": stats.num_prefix_hit_tokens,
             "reclaimed": stats.num_reclaimed_prefixes,
             "has_own_block": isinstance(llm.engine.runner.model.decoder.forward, functools.partial)}, f,
        )  # fmt: skip


def in_third_step(engine, act):
    run, count = engine.runner._forward, 0

    def counted(*arguments):
        nonlocal count
        count += 1
        if count == 3:
            act()
        return run(*arguments)

    engine.runner._forward = counted


def fail_on_this_rank(engine, number):
    """One request's own work, in its fourth token."""
    append = engine.output_processor.append

    def broken(request, token):
        if request.number == number and len(request.output_token_ids) == 3:
            raise KeyError("injected")
        return append(request, token)

    engine.output_processor.append = broken


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    main()
