"""Pretrain the demo's base model from scratch, with plain Megatron (`--dmc-stage off`).

    python examples/pretrain_base.py [--output DIR]
    python examples/pretrain_base.py --control [--output DIR]

Corpus from the Python standard library, a sentencepiece tokenizer, a Llama of 3 million parameters
with plain multi-head attention, and an export as a Hugging Face checkpoint in bfloat16. It is trained
in two phases (`PHASES`): the first is ordinary pretraining; the second trains on at the demo's batch
and learning rate and decays as the demo decays, so that the demo's own training, were it without
DMC, would leave the model as it is. About 80 minutes on two cores that multiply bfloat16 natively;
resumes from its newest checkpoint when started again.

With --control the result is trained on without DMC for the demo's steps at the demo's learning
rates, and control.json says what that changes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_dmc.checkpoint.hf_config import to_hf_config
from megatron_dmc.cli.main import main as cli

import demo

ROOT = Path(__file__).resolve().parents[1]
VOCAB_SIZE = 512
CONTEXT = 512
PHASES = {
    "from-scratch": [
        "--train-iters", "4200", "--seq-length", "512", "--seed", "1234",
        "--lr", "2e-3", "--min-lr", "2e-5", "--lr-warmup-fraction", "0.025",
        "--lr-decay-style", "cosine", "--save-interval", "600",
    ],
    "settled": [
        "--train-iters", "1900", "--seq-length", "256", "--seed", "4321",
        "--lr", "1e-3", "--min-lr", "0", "--lr-warmup-iters", "50", "--lr-decay-style", "WSD",
        "--lr-wsd-decay-style", "linear", "--lr-wsd-decay-iters", "400",
        "--lr-decay-iters", "1900", "--save-interval", "500",
    ],
}  # fmt: skip
"""Megatron flags of the phases of pretraining; each starts from the weights of the one before."""


def torchrun(flags: list[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node=1", "pretrain_dmc.py", "--dmc-stage", "off", *flags]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, env=dict(os.environ, **demo.MALLOC))


def train_tokenizer(work: Path) -> Path:
    """The tokenizer's folder, trained on the corpus."""
    folder = work / "tokenizer"
    if not (folder / "tokenizer.model").is_file():
        corpus = work / "corpus"
        for command in (
            ["tools/build_corpus.py", "--output-dir", str(corpus)],
            ["tools/train_tokenizer.py", "--input", str(corpus / "train.jsonl"),
             "--output-dir", str(folder), "--vocab-size", str(VOCAB_SIZE)],
        ):  # fmt: skip
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    return folder


def pretrain(work: Path, output: Path) -> None:
    """Train from scratch and export to `output`."""
    from megatron_dmc.checkpoint.description import ModelDescription

    tokenizer = train_tokenizer(work)
    description = ModelDescription(
        num_layers=4, hidden_size=256, ffn_hidden_size=688, num_attention_heads=8,
        num_query_groups=8, kv_channels=32, vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT,
        share_embeddings_and_output_weights=True,
    )  # fmt: skip
    config = work / "config"
    config.mkdir(exist_ok=True)
    (config / "config.json").write_text(json.dumps(to_hf_config(description)))
    data = demo.prepare_data(work, tokenizer / "tokenizer.model")
    flags = demo.megatron_flags(config, data, work, tokenizer / "tokenizer.model")
    previous: list[str] = []
    for name, phase in PHASES.items():
        checkpoint = work / f"base-{name}"
        torchrun([*flags, *phase, *previous, "--load", str(checkpoint), "--save", str(checkpoint)])
        previous = ["--pretrained-checkpoint", str(checkpoint)]
    shutil.copytree(tokenizer, checkpoint / "tokenizer", dirs_exist_ok=True)
    if cli(
        ["convert", "--to", "hf", "--dtype", "bfloat16", "--force", str(checkpoint), str(output)]
    ):
        sys.exit(2)


def control(work: Path, model: Path, recipe: demo.Recipe) -> dict[str, Any]:
    """Held-out perplexity before and after the demo's steps, learning rate and data, without DMC."""
    from megatron_dmc.checkpoint.load import load_model
    from megatron_dmc.quality.likelihood import evaluate, read_tokens

    tokenizer = model / "tokenizer.model"
    data = demo.prepare_data(work, tokenizer)
    flags = demo.megatron_flags(model, data, work, tokenizer)
    previous = work / "control-base"
    if cli(["convert", "--to", "megatron", "--force", str(model), str(previous)]):
        sys.exit(2)
    for stage, steps in recipe.stages.items():
        folder = work / f"control-{stage}"
        shutil.rmtree(folder, ignore_errors=True)
        torchrun([
            *flags, "--train-iters", str(steps), *demo.learning_rate(stage, steps, recipe),
            "--seed", str(1234 + list(recipe.stages).index(stage)),
            "--pretrained-checkpoint", str(previous), "--load", str(folder),
            "--save", str(folder), "--save-interval", "100000",
        ])  # fmt: skip
        previous = folder
    tokens = read_tokens(data["heldout"])
    before, after = (
        evaluate(load_model(path), tokens, length=demo.SEQ_LENGTH).perplexity
        for path in (model, previous)
    )
    return {"stages": recipe.stages, "lr": recipe.lr, "base_perplexity": before,
            "base_continued_perplexity": after}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "demo" / "base", help="scratch folder")
    parser.add_argument("--output", type=Path, default=ROOT / "demo" / "stdlib-llama-3m")
    parser.add_argument("--control", action="store_true", help="only continue an existing --output")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.control:
        pretrain(args.work.resolve(), args.output.resolve())
        return
    result = control(args.work.resolve(), args.output.resolve(), demo.Recipe())
    (args.output / "control.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
