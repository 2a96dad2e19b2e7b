"""Retrofit a small language model to a quarter of its KV cache and write a report.

    python examples/demo.py [--short] [--output demo]

What happens, each step a command that also works on its own:

 1. a text corpus from the Python standard library's own sources, cut into train, validation and held-out files;
 2. the pretrained model in examples/models converted to Megatron's format;
 3. zero-out, retrofit and finetune with pretrain_dmc.py through torchrun;
 4. both models measured on held-out text and through the paged engine;
 5. demo/report.html and demo/report.json.

Finished steps are skipped: after an interruption the same command resumes where it
stopped, training from its newest checkpoint.
"""

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_dmc.checkpoint.hf_config import from_hf_folder
from megatron_dmc.checkpoint.megatron_args import megatron_flags as model_flags
from megatron_dmc.cli.main import main as cli
from megatron_dmc.quiet import silence_optional_packages

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "models" / "stdlib-llama-3m"
SEQ_LENGTH = 256
BATCH = 8
SPLITS = ("train", "validation", "heldout")
STAGES = ("zero-out", "retrofit", "finetune", "plain")
"""The last is training without DMC, which only the experiments have."""


@dataclass
class Recipe:
    """Steps and settings of the three stages.

    The method is made for tens of thousands of steps and has offset 5, temperature 0.1 and noise 1. Here the
    last two are a quarter, so that a step moves a decision four times as far, and the offset is
    smaller still; the finetune has no noise, so that it decides as inference will. A low learning
    rate keeps what the model knows, and a higher one of the borrowed rows lets the decisions keep up.
    Chosen on the validation text.
    """

    zero_out: int = 20
    retrofit: int = 80
    finetune: int = 240
    lr: float = 5e-4
    borrowed_lr_mult: float = 2.0
    target_cr: float = 4.0
    merge_window: int = 12
    merge_delay: int = 16
    alpha_offset: float = 0.5
    temperature: float = 0.025
    noise_scale: float = 0.25
    finetune_noise_scale: float = 0.0
    loss_weight: float = 1.5
    seed: int = 1234

    @property
    def stages(self) -> dict[str, int]:
        return {"zero-out": self.zero_out, "retrofit": self.retrofit, "finetune": self.finetune}


MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""For glibc: keep large blocks. On a CPU it would else return every tensor's memory to the system,
which zeroes the pages of the next one; that costs about a tenth of a step."""

SHORT = Recipe(zero_out=4, retrofit=8, finetune=4)


def precision() -> list[str]:
    """Megatron's flag for bfloat16 where the machine multiplies it natively, else none (float32)."""
    import torch

    cpu = torch.cpu.get_capabilities()
    native = torch.cuda.is_available() or cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    return ["--bf16"] if native else []


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run(command: list[str], log: Path) -> None:
    """Run a step; its output goes to `log`, and the end of it to the screen if it fails."""
    run_together([command], log)


def run_together(commands: list[list[str]], log: Path) -> None:
    """`run` for several commands at a time."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as out:
        processes = [
            subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
            for command in commands
        ]
        codes = [process.wait() for process in processes]
    for command, code in zip(commands, codes, strict=True):
        if code:
            fail(command, log, code)


def fail(command: list[str], log: Path, code: int) -> None:
    tail = deque(log.read_text(errors="replace").splitlines(), maxlen=30)
    print(*tail, sep="\n", file=sys.stderr)
    sys.exit(f"demo: `{shlex.join(command[:6])} ...` ended with {code}; all of its output: {log}")


def digest(model: Path) -> str:
    """Names the weights of a Hugging Face folder."""
    checksum = hashlib.sha256()
    for file in sorted(model.glob("*.safetensors")):
        checksum.update(file.read_bytes())
    return checksum.hexdigest()[:16]


def is_done(marker: Path, wanted: str) -> bool:
    return marker.is_file() and marker.read_text() == wanted


def dmc_flags(stage: str, recipe: Recipe) -> list[str]:
    """A stage's own flags."""
    return [
        "--dmc-stage", stage, "--dmc-target-cr", str(recipe.target_cr),
        "--dmc-merge-window", str(recipe.merge_window), "--dmc-merge-delay", str(recipe.merge_delay),
        "--dmc-alpha-offset", str(recipe.alpha_offset), "--dmc-loss-weight", str(recipe.loss_weight),
        "--dmc-temperature", str(recipe.temperature), "--dmc-noise-scale",
        str(recipe.finetune_noise_scale if stage == "finetune" else recipe.noise_scale),
        "--dmc-borrowed-lr-mult", str(recipe.borrowed_lr_mult),
    ]  # fmt: skip


def save_interval(steps: int) -> int:
    """Steps of a stage between checkpoints."""
    return max(4, steps // 4)


def train(
    stage: str, steps: int, recipe: Recipe, work: Path, previous: Path | None, flags: list[str]
) -> None:
    """One stage through torchrun, with a progress bar; resumes from its own newest checkpoint.

    Args:
        previous: the checkpoint to start from; None: random weights.
        flags: Megatron's and DMC's; they win over the stage's own.
    """
    from tqdm import tqdm

    folder = work / stage
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1",
        f"--master-port={free_port()}", "pretrain_dmc.py",
        "--seed", str(recipe.seed + STAGES.index(stage)),  # another order of the data
        "--train-iters", str(steps), *learning_rate(stage, steps, recipe),
        "--load", str(folder), "--save", str(folder),
        "--save-interval", str(save_interval(steps)), "--tensorboard-dir", str(folder / "tensorboard"),
        *(["--pretrained-checkpoint", str(previous)] if previous else []), *flags,
    ]  # fmt: skip
    log = work / f"{stage}.log"
    with tqdm(total=steps, desc=f"{stage:9}", unit="step") as bar:

        def show(line: str) -> None:
            if found := re.search(r" iteration +(\d+)/", line):
                step = int(found[1])
                if bar.n == 0:
                    bar.initial = bar.n = step - 1  # resumed: the rate is of this run's steps
                bar.update(step - bar.n)
                figures = dict(re.findall(r"(lm loss|measured cr): ([0-9.E+-]+)", line))
                bar.set_postfix({k: f"{float(v):.2f}" for k, v in figures.items()})

        code = follow(command, log, show)
    if code:
        fail(command, log, code)


def follow(command: list[str], log: Path, show: Callable[[str], None]) -> int:
    """Run a command that appends to `log`, hand `show` each line, and return the exit code.

    The log, not a pipe, carries the output: a worker that outlives a killed trainer would keep a pipe open.
    """
    with open(log, "ab") as out, open(log, encoding="utf-8", errors="replace") as output:
        output.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT,
            env=dict(os.environ, CUDA_DEVICE_MAX_CONNECTIONS="1", **MALLOC),
        )  # fmt: skip
        rest = ""
        try:
            is_running = True
            while is_running:
                is_running = process.poll() is None
                *lines, rest = (rest + output.read()).split("\n")
                for line in lines:
                    show(line)
                if is_running:
                    time.sleep(0.2)
        except BaseException:
            process.terminate()
            raise
        finally:
            process.wait()
    return process.returncode


def learning_rate(stage: str, steps: int, recipe: Recipe) -> list[str]:
    """Warm-up in the first stage, constant in the second, decay to zero in the last."""
    if stage == "zero-out":
        return ["--lr", str(recipe.lr), "--lr-decay-style", "constant",
                "--lr-warmup-iters", str(max(1, steps // 3))]  # fmt: skip
    if stage in ("retrofit", "plain"):
        return ["--lr", str(recipe.lr), "--lr-decay-style", "constant"]
    return ["--lr", str(recipe.lr), "--min-lr", "0", "--lr-decay-style", "linear",
            "--lr-decay-iters", str(steps)]  # fmt: skip


def prepare_data(work: Path, tokenizer: Path) -> dict[str, Path]:
    """Corpus and `.bin/.idx` files; returns the prefixes of the splits."""
    prefixes = {split: work / "data" / f"{split}_text_document" for split in SPLITS}
    corpus = work / "corpus"
    (work / "data").mkdir(parents=True, exist_ok=True)
    if not (corpus / "meta.json").is_file():
        print("Building a corpus from the Python standard library", flush=True)
        run(
            [sys.executable, "tools/build_corpus.py", "--output-dir", str(corpus)],
            work / "data.log",
        )
    run_together(
        [
            [sys.executable, "tools/preprocess_data.py", "--input", str(corpus / f"{split}.jsonl"),
             "--output-prefix", str(prefix).removesuffix("_text_document"),
             "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tokenizer),
             "--append-eod"]
            for split, prefix in prefixes.items()
            if not Path(f"{prefix}.idx").is_file()
        ],
        work / "data.log",
    )  # fmt: skip
    return prefixes


def megatron_flags(model: Path, data: dict[str, Path], work: Path, tokenizer: Path) -> list[str]:
    """Flags of all stages."""

    return [
        *model_flags(from_hf_folder(model)), *precision(),
        "--seq-length", str(SEQ_LENGTH),
        "--micro-batch-size", str(BATCH), "--global-batch-size", str(BATCH),
        "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tokenizer),
        "--train-data-path", str(data["train"]), "--valid-data-path", str(data["validation"]),
        "--test-data-path", str(data["heldout"]), "--data-cache-path", str(work / "cache"),
        "--eval-interval", "1000000", "--eval-iters", "2", "--log-interval", "1",
        "--adam-beta2", "0.95", "--weight-decay", "0.1", "--clip-grad", "1.0",
        "--ckpt-format", "torch_dist",
    ]  # fmt: skip


def continued_perplexity(model: Path, recipe: Recipe) -> float | None:
    """The control that examples/pretrain_base.py measured, if it was for these steps and learning rate."""
    file = model / "control.json"
    if not file.is_file():
        return None
    control = json.loads(file.read_text())
    same = control["stages"] == recipe.stages and control["lr"] == recipe.lr
    return control["base_continued_perplexity"] if same else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "demo", help="default: demo/")
    parser.add_argument(
        "--short", action="store_true", help="a few steps only, to see that it runs"
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="Hugging Face Llama folder")
    for name, kind in Recipe.__annotations__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    began = time.monotonic()
    silence_optional_packages()
    recipe = Recipe(**vars(SHORT)) if args.short else Recipe()
    for name in Recipe.__annotations__:
        if getattr(args, name) is not None:
            setattr(recipe, name, getattr(args, name))

    output = args.output / "short" if args.short else args.output
    work = output / "run"
    work.mkdir(parents=True, exist_ok=True)
    settings = json.dumps(
        vars(recipe)
        | {"model": str(args.model), "weights": digest(args.model), "precision": precision()},
        sort_keys=True,
    )
    if not is_done(work / "recipe.json", settings):
        for name in ("base", *recipe.stages):  # checkpoints of another recipe are of no use
            shutil.rmtree(work / name, ignore_errors=True)
            (work / f"{name}.done").unlink(missing_ok=True)
        (work / "recipe.json").write_text(settings)

    tokenizer = args.model / "tokenizer.model"
    data = prepare_data(work, tokenizer)
    base = work / "base"
    convert = ["convert", "--to", "megatron", "--force", str(args.model), str(base)]
    if not (base / "latest_checkpointed_iteration.txt").is_file() and cli(convert):
        sys.exit(2)
    flags = megatron_flags(args.model, data, work, tokenizer)
    previous, commands = base, []
    for stage, steps in recipe.stages.items():
        marker = work / f"{stage}.done"
        if not is_done(marker, settings):
            train(stage, steps, recipe, work, previous, [*flags, *dmc_flags(stage, recipe)])
            marker.write_text(settings)
        previous = work / stage
        commands.append(
            f"torchrun --nproc-per-node 1 pretrain_dmc.py --dmc-stage {stage} "
            f"--dmc-target-cr {recipe.target_cr:g} --train-iters {steps} ..."
        )

    from megatron_dmc.quality.report.measure import measure
    from megatron_dmc.quality.report.page import write_report

    report = measure(
        args.model, previous, data["heldout"], seq_length=SEQ_LENGTH,
        stages={s: work / s / "tensorboard" for s in recipe.stages},
        settings=vars(recipe) | {"sequence length": SEQ_LENGTH, "batch": BATCH},
        commands=["make demo", *commands],
        base_continued_perplexity=continued_perplexity(args.model, recipe),
        num_windows=8 if args.short else None,
        max_tokens=16 if args.short else 128,
    )  # fmt: skip
    seconds = time.monotonic() - began
    report.seconds = round(seconds, 1)
    write_report(report, output)
    print(
        f"\n{report.measured_cr:.2f} tokens share a cache entry (target {recipe.target_cr:g}), and a cache of "
        f"{SEQ_LENGTH} tokens is {report.cache_cr:.2f}x smaller over time, at "
        f"{report.dmc_perplexity / report.base_perplexity:.3f}x the perplexity "
        f"({report.base_perplexity:.2f} -> {report.dmc_perplexity:.2f}); "
        f"{seconds:.0f} s\nreport: {output / 'report.html'}"
    )


if __name__ == "__main__":
    main()
