"""`megatron-dmc bench throughput` and `bench latency`: the engine without a server.

Regime: throughput gives all requests at once and lets the engine batch them; latency runs one batch, all of
it together, again and again. Completions are full-length (the end-of-text token is ignored) and greedy.
Metric: wall-clock seconds; tokens per second are over the whole run, prefill included. Beside them: measured
CR, pages at the peak, preemptions. The last line printed is one JSON document; vLLM's keys where it has them.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from megatron_dmc.bench.load import percentile
from megatron_dmc.bench.measure import Panel, Settings, document, finish
from megatron_dmc.bench.serving import prompts
from megatron_dmc.engine import LLM, RequestOutput, SamplingParams
from megatron_dmc.engine_flags import is_follower, make_llm, model_path
from megatron_dmc.errors import DMCError


def run(args: argparse.Namespace) -> int:
    """Run the benchmark that `args.benchmark` names.

    Raises:
        DMCError: a flag is wrong, or a request can never run.
    """
    for name in ("num_prompts", "batch_size", "num_iters"):
        if getattr(args, name, 1) < 1:
            raise DMCError(f"--{name.replace('_', '-')} {getattr(args, name)}: use 1 or more")
    if is_follower(args):
        make_llm(args).follow()
        return 0
    llm = make_llm(args)
    weight = next(llm.engine.runner.model.parameters())
    settings = Settings(
        weight.device, weight.dtype, (), getattr(args, "num_iters", 1),
        Path(args.output) if args.output else None,
    )  # fmt: skip
    if args.benchmark == "throughput":
        content, panels = _throughput(args, llm)
    else:
        content, panels = _latency(args, llm)
    stats = llm.stats()
    llm.close()
    result = document(
        args.benchmark, settings, model=model_path(args), **content,
        measured_cr=stats.measured_cr, peak_pages=stats.peak_pages_in_use,
        num_pages=stats.num_pages, page_bytes=stats.page_bytes,
        num_preemptions=stats.num_preemptions,
    )  # fmt: skip
    return finish(result, panels, settings)


def _generate(
    llm: LLM, asked: list[tuple[Any, int]], bar: bool
) -> tuple[list[RequestOutput], float]:
    given = [
        prompt if isinstance(prompt, str) else {"prompt_token_ids": prompt} for prompt, _ in asked
    ]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for _, n in asked]
    _synchronize()
    began = time.perf_counter()
    outputs = llm.generate(given, params, use_tqdm=bar)
    _synchronize()
    return outputs, time.perf_counter() - began


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _throughput(args: argparse.Namespace, llm: LLM) -> tuple[dict[str, Any], list[Panel]]:
    asked = prompts(args, args.num_prompts, seed=args.seed)
    _generate(llm, [(prompt, 2) for prompt, _ in asked[:1]], False)  # warm-up
    outputs, seconds = _generate(llm, asked, True)
    num_in = sum(len(output.prompt_token_ids) for output in outputs)
    num_out = sum(len(output.outputs[0].token_ids) for output in outputs)
    content = {
        "elapsed_time": seconds,
        "num_requests": len(outputs),
        "total_num_tokens": num_in + num_out,
        "total_output_tokens": num_out,
        "requests_per_second": len(outputs) / seconds,
        "tokens_per_second": (num_in + num_out) / seconds,
        "output_tokens_per_second": num_out / seconds,
    }
    print(
        f"{len(outputs)} requests, {num_in} prompt and {num_out} generated tokens in {seconds:.2f} s: "
        f"{content['requests_per_second']:.2f} requests/s, {content['tokens_per_second']:.1f} tokens/s, "
        f"{content['output_tokens_per_second']:.1f} generated tokens/s"
    )
    bars = [
        ("prompt and generated", (num_in + num_out) / seconds, True),
        ("generated", num_out / seconds, True),
    ]
    return content, [Panel("throughput", "tokens/s", bars)]


def _latency(args: argparse.Namespace, llm: LLM) -> tuple[dict[str, Any], list[Panel]]:
    if args.batch_size > args.max_num_seqs:
        raise DMCError(
            f"--batch-size {args.batch_size} is more than --max-num-seqs {args.max_num_seqs}; raise it"
        )
    asked = prompts(args, args.batch_size, seed=args.seed)
    for _ in range(args.num_iters_warmup):
        _generate(llm, asked, False)
    latencies = sorted(_generate(llm, asked, False)[1] for _ in range(args.num_iters))
    percentiles = {f"{p}": percentile(latencies, p) for p in (10, 25, 50, 75, 90, 99)}
    average = statistics.fmean(latencies)
    longest = max(num_new for _, num_new in asked)
    content = {
        "batch_size": args.batch_size,
        "avg_latency": average,
        "latencies": latencies,
        "percentiles": percentiles,
        "ms_per_token": 1e3 * average / longest,
    }
    print(
        f"{args.num_iters} runs of {args.batch_size} requests: {average:.3f} s on average, "
        f"{content['ms_per_token']:.1f} ms for each of {longest} tokens"
    )
    bars = [(f"p{name}", value, True) for name, value in percentiles.items() if value is not None]
    return content, [Panel("latency of a batch", "s", bars)]
