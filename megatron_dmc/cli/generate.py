"""`megatron-dmc generate`: stream a completion, then print its speed, CR and cache size."""

import argparse
import sys
import time

from megatron_dmc.engine.flags import add_engine_arguments, is_follower, make_llm, model_path
from megatron_dmc.errors import DMCError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command, named as vLLM's where it has them."""
    add_engine_arguments(parser, max_num_seqs=1)
    group = parser.add_argument_group("generation")
    group.add_argument("--prompt", help="text to continue; default: standard input")
    group.add_argument("--max-tokens", type=int, default=128, help="most tokens to generate")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    group.add_argument("--top-k", type=int, default=0, help="0: no limit")
    group.add_argument("--top-p", type=float, default=1.0)
    group.add_argument("--stop", action="append", default=[], help="text that ends it; repeatable")
    group.add_argument("--ignore-eos", action="store_true", help="continue after end of text")


def run(args: argparse.Namespace) -> int:
    """Run the command. The engine's --seed is also the seed of the completion."""
    from megatron_dmc.engine.sampling_params import SamplingParams

    params = SamplingParams(
        temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, seed=args.seed,
        stop=args.stop, max_tokens=args.max_tokens, ignore_eos=args.ignore_eos,
    )  # fmt: skip
    follows = is_follower(args)
    prompt = sys.stdin.read() if args.prompt is None and not follows else args.prompt
    llm = make_llm(args)
    if follows:
        llm.follow()
        return 0
    engine = llm.engine
    if engine.tokenizer is None:
        raise DMCError(
            f"{model_path(args)}: the checkpoint has no tokenizer; give its folder with --tokenizer"
        )
    engine.add_request("0", prompt, params)
    print(prompt, end="", flush=True)
    shown, output = 0, None
    began = time.perf_counter()
    while engine.has_unfinished_requests:
        for output in engine.step():
            text = output.outputs[0].text
            print(text[shown:], end="", flush=True)
            shown = len(text)
    seconds = time.perf_counter() - began
    llm.close()
    assert output is not None
    print(flush=True)
    metrics = output.metrics
    first = (metrics.first_token_time or 0.0) - metrics.arrival_time
    new = len(output.outputs[0].token_ids)
    stats = engine.stats()
    held = metrics.num_pages * stats.page_bytes
    plain = metrics.num_cached_tokens * stats.plain_entry_bytes
    print(
        f"\n{len(output.prompt_token_ids)} prompt tokens, {new} generated in {seconds:.2f} s: "
        f"{new / seconds:.1f} tokens/s (first token after {first:.2f} s)\n"
        f"measured CR {output.cr or 1.0:.2f}: cache {held:,} bytes, uncompressed {plain:,} bytes",
        file=sys.stderr,
    )
    return 0
