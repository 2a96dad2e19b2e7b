"""`megatron-dmc`: the command line.

A subcommand is a function that adds its parser and sets `run` (Namespace -> exit code); heavy
modules are imported when it runs, so that `--help` is quick. Add the function to `SUBCOMMANDS`.
"""

import argparse
import sys
from collections.abc import Callable

from megatron_dmc import __version__
from megatron_dmc.engine.flags import CHECKPOINT_SETTINGS, add_settings
from megatron_dmc.errors import DMCError, EngineDead
from megatron_dmc.quiet import silence_optional_packages

type Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_convert(subparsers: Subparsers) -> None:
    """`megatron-dmc convert`."""
    parser = subparsers.add_parser(
        "convert",
        help="convert between Hugging Face folders and Megatron torch_dist checkpoints, and from GGUF",
        description="Convert a checkpoint, DMC or plain, with its tokenizer, one tensor at a time. "
        "Without --dtype and --kv-heads every weight keeps its bits. Families: docs/checkpoints.md.",
    )
    parser.add_argument(
        "path", metavar="PATH", help="checkpoint folder, Hugging Face Hub id, or GGUF file"
    )
    parser.add_argument("out", metavar="OUT", help="folder to make")
    parser.add_argument(
        "--from", dest="from_format", choices=["hf", "megatron", "gguf", "dmc-release"],
        help="default: found out. dmc-release: the released Llama-2 DMC checkpoints",
    )  # fmt: skip
    parser.add_argument("--to", dest="to_format", choices=["hf", "megatron"], required=True)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: as stored"
    )
    parser.add_argument(
        "--kv-heads", type=int, metavar="N",
        help="mean-pool the KV heads to N: grouped-query attention, to be trained further",
    )  # fmt: skip
    parser.add_argument("--tokenizer", metavar="PATH", help="where PATH's checkpoint has none")
    parser.add_argument(
        "--dmc-target-cr", type=float, metavar="CR",
        help="of a released DMC checkpoint that does not say it",
    )  # fmt: skip
    add_settings(parser, [*CHECKPOINT_SETTINGS, "revision"])
    parser.add_argument("--force", action="store_true", help="replace what is in OUT")
    card = parser.add_argument_group("model card", "of a DMC model, with --to hf")
    card.add_argument("--base-model", metavar="ID", help="the model that was retrofitted")
    card.add_argument("--license", metavar="ID", help="as the Hub names it, such as apache-2.0")
    card.add_argument(
        "--report", metavar="FILE", help="report.json of `megatron-dmc report`: CR and perplexity"
    )
    parser.set_defaults(run=run_convert)


def run_convert(args: argparse.Namespace) -> int:
    """Run `megatron-dmc convert`."""
    import functools

    from megatron_dmc.checkpoint.convert import FLAGS_FILE, convert
    from megatron_dmc.checkpoint.description import parse_dtype
    from megatron_dmc.checkpoint.gqa import pool_kv_heads
    from megatron_dmc.checkpoint.model_card import BASE_MODEL, LICENCE, report_facts

    given = {BASE_MODEL: args.base_model, LICENCE: args.license}
    facts = {name: value for name, value in given.items() if value is not None}
    if args.report is not None:
        facts |= report_facts(args.report)
    transform = None
    if args.kv_heads is not None:
        transform = functools.partial(pool_kv_heads, num_kv_heads=args.kv_heads)
    description = convert(
        args.from_format,
        args.to_format,
        args.path,
        args.out,
        dtype=parse_dtype(args.dtype) if args.dtype else None,
        force=args.force,
        progress=True,
        transform=transform,
        target_cr=args.dmc_target_cr,
        tokenizer=args.tokenizer,
        allow_pickle=args.allow_pickle,
        verify_checkpoint=args.verify_checkpoint,
        trust_remote_code=args.trust_remote_code,
        revision=args.revision,
        facts=facts,
    )
    print(f"{args.out}: {args.to_format} checkpoint, {description.summary()}")
    if args.to_format == "megatron":
        print(
            f"train it: pretrain_dmc.py $(cat {args.out}/{FLAGS_FILE}) "
            f"--pretrained-checkpoint {args.out} ..."
        )
    return 0


def add_generate(subparsers: Subparsers) -> None:
    """`megatron-dmc generate`."""
    from megatron_dmc.cli.generate import add_arguments

    parser = subparsers.add_parser(
        "generate",
        help="stream a completion, then say its speed, measured CR and cache size",
        description="Continue a prompt with a DMC or plain model through the paged engine.",
    )
    add_arguments(parser)
    parser.set_defaults(run=run_generate)


def run_generate(args: argparse.Namespace) -> int:
    """Run `megatron-dmc generate`."""
    from megatron_dmc.cli.generate import run

    return run(args)


def add_chat(subparsers: Subparsers) -> None:
    """`megatron-dmc chat`."""
    from megatron_dmc.cli.chat import add_arguments

    parser = subparsers.add_parser(
        "chat",
        help="talk with a model in the terminal, and see its KV cache grow",
        description="A conversation with a DMC or plain model; below each answer its speed, and the KV "
        "cache's size against the uncompressed one.",
    )
    add_arguments(parser)
    parser.set_defaults(run=run_chat)


def run_chat(args: argparse.Namespace) -> int:
    """Run `megatron-dmc chat`."""
    from megatron_dmc.cli.chat import run

    return run(args)


def add_serve(subparsers: Subparsers) -> None:
    """`megatron-dmc serve`."""
    from megatron_dmc.cli.serve import add_arguments

    parser = subparsers.add_parser(
        "serve",
        help="an OpenAI-compatible server, with a live page and Prometheus metrics",
        description="Serve a DMC or plain model: /v1/completions, /v1/chat/completions, /v1/models, "
        "/health, /version, /metrics, and a live page at /.",
    )
    add_arguments(parser)
    parser.set_defaults(run=run_serve)


def run_serve(args: argparse.Namespace) -> int:
    """Run `megatron-dmc serve`."""
    from megatron_dmc.cli.serve import run

    return run(args)


def add_report(subparsers: Subparsers) -> None:
    """`megatron-dmc report`."""
    parser = subparsers.add_parser(
        "report",
        help="compare a DMC model with its base on held-out text, write report.html and .json",
        description="Measure perplexity, CR per layer and head, cache bytes and speed of a DMC model "
        "and its base; with --stage also the training curves.",
    )
    parser.add_argument("--base", required=True, help="the model before the retrofit")
    parser.add_argument("--model", required=True, help="the DMC model")
    parser.add_argument("--data", required=True, help="held-out .bin/.idx prefix")
    parser.add_argument("--output", default="report", help="folder to write to (default: report)")
    parser.add_argument("--seq-length", type=int, default=512, help="evaluation window in tokens")
    parser.add_argument("--max-windows", type=int, help="default: all of the data")
    parser.add_argument("--max-tokens", type=int, default=128, help="length of the completions")
    parser.add_argument(
        "--stage", action="append", default=[], metavar="NAME=FOLDER",
        help="TensorBoard folder of a training stage; repeatable, in order",
    )  # fmt: skip
    parser.add_argument("--device", help="default: the GPU if there is one")
    add_settings(parser, CHECKPOINT_SETTINGS)
    parser.set_defaults(run=run_report)


def run_report(args: argparse.Namespace) -> int:
    """Run `megatron-dmc report`."""
    from pathlib import Path

    try:
        from megatron_dmc.quality.report.measure import measure
        from megatron_dmc.quality.report.page import write_report
    except ModuleNotFoundError as e:
        if e.name not in ("matplotlib", "jinja2", "markupsafe"):
            raise
        raise DMCError(f"{e.name} is not installed: pip install 'megatron-dmc[report]'") from e

    stages = {}
    for item in args.stage:
        name, _, folder = item.partition("=")
        if not folder or not Path(folder).is_dir():
            raise DMCError(f"--stage {item}: use NAME=FOLDER with an existing TensorBoard folder")
        stages[name] = Path(folder)
    data = measure(
        args.base, args.model, args.data, seq_length=args.seq_length, stages=stages,
        num_windows=args.max_windows, max_tokens=args.max_tokens, device=args.device,
        allow_pickle=args.allow_pickle, verify_checkpoint=args.verify_checkpoint,
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    paths = write_report(data, args.output)
    print(
        f"CR {data.measured_cr:.2f} (target {data.target_cr:g}), perplexity "
        f"{data.base_perplexity:.3f} -> {data.dmc_perplexity:.3f}: {paths['html']}"
    )
    return 0


def add_bench(subparsers: Subparsers) -> None:
    """`megatron-dmc bench`."""
    from megatron_dmc.bench.command import add_benchmarks

    parser = subparsers.add_parser(
        "bench",
        help="benchmarks; the last line of each is a JSON document",
        description="Measure this machine, each result with its ceiling or its alternatives.",
    )
    add_benchmarks(parser)
    parser.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    """Run `megatron-dmc bench`."""
    from megatron_dmc.bench.command import run

    return run(args)


def add_plan(subparsers: Subparsers) -> None:
    """`megatron-dmc plan`."""
    parser = subparsers.add_parser(
        "plan",
        help="layouts of a retrofit that fit a cluster, their memory, tokens and GPU-hours",
        description="Estimate memory per GPU and step time of every tensor, pipeline, context and "
        "data parallel layout, rank those that fit, and print Megatron's flags for the best.",
    )
    from megatron_dmc.plan.arguments import add_arguments

    add_arguments(parser)
    parser.set_defaults(run=run_plan)


def run_plan(args: argparse.Namespace) -> int:
    """Run `megatron-dmc plan`."""
    from megatron_dmc.cli.plan import run

    return run(args)


def add_eval(subparsers: Subparsers) -> None:
    """`megatron-dmc eval`."""
    from megatron_dmc.cli.eval import add_arguments

    parser = subparsers.add_parser(
        "eval",
        help="lm-eval's tasks on the engine",
        description="Run tasks of EleutherAI's lm-eval through the paged engine, the cache compressed as "
        "in decoding, and report the measured CR of every result.",
    )
    add_arguments(parser)
    parser.set_defaults(run=run_eval)


def run_eval(args: argparse.Namespace) -> int:
    """Run `megatron-dmc eval`."""
    from megatron_dmc.cli.eval import run

    return run(args)


SUBCOMMANDS: list[Callable[[Subparsers], None]] = [
    add_convert,
    add_generate,
    add_chat,
    add_serve,
    add_plan,
    add_report,
    add_bench,
    add_eval,
]


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="megatron-dmc",
        description="Dynamic Memory Compression of the KV cache: checkpoints and inference.",
    )
    parser.add_argument("--version", action="version", version=f"megatron-dmc {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in SUBCOMMANDS:
        add(subparsers)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        exit code: 0; 1 if the engine failed; 2 for a user's error. Both print one line.
    """
    args = build_parser().parse_args(argv)
    silence_optional_packages()
    try:
        return args.run(args)
    except DMCError as e:
        print(f"megatron-dmc: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 1 if isinstance(e, EngineDead) else 2


if __name__ == "__main__":
    sys.exit(main())
