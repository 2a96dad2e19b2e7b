"""`megatron-dmc`: the command line.

A subcommand is a function that adds its parser and sets `run` (Namespace -> exit code); heavy
modules are imported when it runs, so that `--help` is quick. Add the function to `SUBCOMMANDS`.
"""

import argparse
import sys
from collections.abc import Callable

from megatron_dmc import __version__
from megatron_dmc.errors import DMCError

type Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_convert(subparsers: Subparsers) -> None:
    """`megatron-dmc convert`."""
    parser = subparsers.add_parser(
        "convert",
        help="convert between Hugging Face folders and Megatron torch_dist checkpoints",
        description="Convert a Llama checkpoint, DMC or plain, with its tokenizer. Without --dtype "
        "every weight keeps its bits.",
    )
    parser.add_argument("path", metavar="PATH", help="checkpoint folder to read")
    parser.add_argument("out", metavar="OUT", help="folder to make")
    parser.add_argument(
        "--from", dest="from_format", choices=["hf", "megatron"], help="default: found out"
    )
    parser.add_argument("--to", dest="to_format", choices=["hf", "megatron"], required=True)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: as stored"
    )
    parser.add_argument("--force", action="store_true", help="replace what is in OUT")
    parser.set_defaults(run=run_convert)


def run_convert(args: argparse.Namespace) -> int:
    """Run `megatron-dmc convert`."""
    from megatron_dmc.checkpoint.convert import convert
    from megatron_dmc.checkpoint.description import parse_dtype

    description = convert(
        args.from_format,
        args.to_format,
        args.path,
        args.out,
        dtype=parse_dtype(args.dtype) if args.dtype else None,
        force=args.force,
        progress=True,
    )
    print(f"{args.out}: {args.to_format} checkpoint, {description.summary()}")
    return 0


SUBCOMMANDS: list[Callable[[Subparsers], None]] = [add_convert]


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
        exit code: 0, or 2 for an error of the user's, told in one line.
    """
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except DMCError as e:
        print(f"megatron-dmc: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
