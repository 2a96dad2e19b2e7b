"""`megatron-dmc`: the table of commands.

A command's flags come from a module that is quick to import, so that `--help` is; the module with its
`run(Namespace) -> exit code` is imported when it runs.
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

from megatron_dmc import __version__
from megatron_dmc.bench import command as bench
from megatron_dmc.cli import chat, convert, generate, report, serve
from megatron_dmc.cli import eval as evaluate
from megatron_dmc.errors import DMCError, EngineDead
from megatron_dmc.plan import arguments as plan
from megatron_dmc.quiet import silence_optional_packages


@dataclass(frozen=True)
class Command:
    """A line of the table.

    Attributes:
        module: has `run(Namespace) -> int`.
        add_arguments: adds the flags.
    """

    name: str
    module: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    help: str
    description: str


COMMANDS = (
    Command(
        "convert", "megatron_dmc.cli.convert", convert.add_arguments,
        "convert between Hugging Face folders and Megatron torch_dist checkpoints, and from GGUF",
        "Convert a checkpoint, DMC or plain, with its tokenizer, one tensor at a time. "
        "Without --dtype and --kv-heads every weight keeps its bits. Families: docs/checkpoints.md.",
    ),
    Command(
        "generate", "megatron_dmc.cli.generate", generate.add_arguments,
        "stream a completion, then report its speed, measured CR and cache size",
        "Continue a prompt with a DMC or plain model through the paged engine.",
    ),
    Command(
        "chat", "megatron_dmc.cli.chat", chat.add_arguments,
        "talk with a model in the terminal, and see its KV cache grow",
        "A conversation with a DMC or plain model; below each answer its speed, and the KV "
        "cache's size against the uncompressed one.",
    ),
    Command(
        "serve", "megatron_dmc.cli.serve", serve.add_arguments,
        "an OpenAI-compatible server, with a live page and Prometheus metrics",
        "Serve a DMC or plain model: /v1/completions, /v1/chat/completions, /v1/models, "
        "/health, /version, /metrics, and a live page at /.",
    ),
    Command(
        "plan", "megatron_dmc.cli.plan", plan.add_arguments,
        "layouts of a retrofit that fit a cluster, their memory, tokens and GPU-hours",
        "Estimate memory per GPU and step time of every tensor, pipeline, context and "
        "data parallel layout, rank those that fit, and print Megatron's flags for the best.",
    ),
    Command(
        "report", "megatron_dmc.cli.report", report.add_arguments,
        "compare a DMC model with its base on held-out text, write report.html and .json",
        "Measure perplexity, CR per layer and head, cache bytes and speed of a DMC model "
        "and its base; with --stage also the training curves.",
    ),
    Command(
        "bench", "megatron_dmc.bench.command", bench.add_arguments,
        "benchmarks; the last line of each is a JSON document",
        "Measure this machine, each result with its ceiling or its alternatives.",
    ),
    Command(
        "eval", "megatron_dmc.cli.eval", evaluate.add_arguments,
        "lm-eval's tasks on the engine",
        "Run tasks of EleutherAI's lm-eval through the paged engine, the cache compressed as "
        "in decoding, and report the measured CR with every result.",
    ),
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; a command sets `command` in the namespace."""
    parser = argparse.ArgumentParser(
        prog="megatron-dmc",
        description="Dynamic Memory Compression of the KV cache: checkpoints and inference.",
    )
    parser.add_argument("--version", action="version", version=f"megatron-dmc {__version__}")
    names = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        sub = names.add_parser(command.name, help=command.help, description=command.description)
        command.add_arguments(sub)
        sub.set_defaults(command=command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        exit code: 0; 1 where the engine failed; 2 for a user's error. Both print one line.
    """
    args = build_parser().parse_args(argv)
    silence_optional_packages()
    try:
        return importlib.import_module(args.command.module).run(args)
    except DMCError as e:
        print(f"megatron-dmc: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 1 if isinstance(e, EngineDead) else 2


if __name__ == "__main__":
    sys.exit(main())
