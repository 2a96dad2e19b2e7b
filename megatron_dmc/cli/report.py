"""`megatron-dmc report`: flags and run."""

import argparse
from pathlib import Path

from megatron_dmc.engine.flags import CHECKPOINT_SETTINGS, add_settings
from megatron_dmc.errors import DMCError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
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


def run(args: argparse.Namespace) -> int:
    """Run `megatron-dmc report`."""
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
