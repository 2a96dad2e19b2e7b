"""`megatron-dmc convert`: flags and run."""

import argparse
import functools

from megatron_dmc.engine.flags import CHECKPOINT_SETTINGS, add_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command."""
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
    parser.add_argument(
        "--calibration-data", metavar="PREFIX",
        help="tokenised text (.bin, .idx): choose the RoPE pair that a retrofit borrows a channel of and rotate "
        "it in each head, which changes no output, so that this channel carries as little as possible on "
        "it. With --to hf, whose plain models have one order of pairs, the last pair",
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


def run(args: argparse.Namespace) -> int:
    """Run `megatron-dmc convert`."""
    import torch

    from megatron_dmc.checkpoint.borrowed_pair import MOST_TOKENS, rotate_borrowed_pair
    from megatron_dmc.checkpoint.convert import FLAGS_FILE, convert
    from megatron_dmc.checkpoint.description import parse_dtype
    from megatron_dmc.checkpoint.gqa import pool_kv_heads
    from megatron_dmc.checkpoint.model_card import BASE_MODEL, LICENCE, report_facts
    from megatron_dmc.errors import DMCError
    from megatron_dmc.quality.likelihood import read_tokens

    given = {BASE_MODEL: args.base_model, LICENCE: args.license}
    facts = {name: value for name, value in given.items() if value is not None}
    if args.report is not None:
        facts |= report_facts(args.report)
    transform = None
    if args.kv_heads is not None:
        transform = functools.partial(pool_kv_heads, num_kv_heads=args.kv_heads)
    if args.calibration_data is not None:
        if args.kv_heads is not None:
            raise DMCError(
                "--calibration-data with --kv-heads: convert twice, and train the pooled model before"
            )
        tokens = torch.from_numpy(read_tokens(args.calibration_data, limit=MOST_TOKENS))
        transform = functools.partial(
            rotate_borrowed_pair, tokens=tokens, keep_order=args.to_format == "hf", report=print
        )
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
