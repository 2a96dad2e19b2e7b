"""Retrofit a Hugging Face model with transformers' Trainer, on one GPU or a CPU.

    python examples/hf_retrofit.py --model FOLDER --data train.jsonl --output OUT [--lora-rank 16]

Zero-out, retrofit and finetune in one process; OUT is a Hugging Face folder that
`AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True)` and megatron-dmc's engine load. The
targets of every step are `megatron_dmc.schedule`'s, and merge and attention `megatron_dmc.ops`'s: those
of Megatron's path. Needs `pip install 'megatron-dmc[hf]'`. Data: one `{"text": ...}` a line.
"""

import argparse
import json
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import megatron_dmc.ops
from megatron_dmc.checkpoint.hf_config import from_hf_folder
from megatron_dmc.checkpoint.remote_code import load_as_dmc, write_remote_code
from megatron_dmc.checkpoint.tokenizer import (
    Tokenizer,
    copy_tokenizer,
    find_tokenizer,
    load_tokenizer,
)
from megatron_dmc.config import DMCConfig
from megatron_dmc.quiet import silence_optional_packages
from megatron_dmc.schedule import target_cr, zero_out_scale

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Windows(Dataset):
    """Texts one after the other, cut into windows of equal length."""

    def __init__(self, file: Path, tokenizer: Tokenizer, seq_length: int):
        ids: list[int] = []
        for line in file.read_text().splitlines():
            ids += tokenizer.encode(json.loads(line)["text"])
            if tokenizer.eos_id is not None:
                ids.append(tokenizer.eos_id)
        self.ids = torch.tensor(ids)
        self.rows = self.ids[: len(ids) // seq_length * seq_length].view(-1, seq_length)
        if not len(self.rows):
            raise SystemExit(f"{file}: {len(ids)} tokens, fewer than one window of {seq_length}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Schedule(TrainerCallback):
    """Sets the step's target CR, or how far the borrowed channels have faded."""

    def __init__(self, stage: str, steps: int, dmc: DMCConfig):
        self.stage, self.steps, self.dmc = stage, steps, dmc

    def target(self, step: int) -> float:
        ramp = self.steps if self.stage == "retrofit" else 0
        return target_cr(step, ramp_steps=ramp, target=self.dmc.target_cr)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        step = state.global_step
        if self.stage == "zero-out":
            scale = zero_out_scale(step, steps=self.steps, fraction=self.dmc.zero_out_fraction)
            model.set_dmc_step(zero_out_scale=scale)
        else:
            model.set_dmc_step(target_cr=self.target(step))


class DMCTrainer(Trainer):
    """Logs the language-model loss and measured CR in addition to the loss, and keeps the log."""

    def __init__(self, *args, schedule: Schedule, **kwargs):
        super().__init__(*args, callbacks=[schedule], **kwargs)
        self.schedule = schedule
        self.history: list[dict[str, float]] = []
        self._seen: list[tuple[float, float]] = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch
        )
        if outputs.measured_cr is not None:
            self._seen.append(
                (float(outputs.compression_loss.detach()), float(outputs.measured_cr))
            )
        return (loss, outputs) if return_outputs else loss

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs["lm_loss"] = logs["loss"]
            if self._seen:  # windows are equally long: tokens / entries is the harmonic mean
                count = len(self._seen)
                logs["lm_loss"] -= sum(hinge for hinge, _ in self._seen) / count
                logs["measured_cr"] = count / sum(1 / cr for _, cr in self._seen)
                logs["target_cr"] = self.schedule.target(self.state.global_step - 1)
            self._seen.clear()
            self.history.append(dict(logs, stage=self.schedule.stage, step=self.state.global_step))
        super().log(logs, start_time)


def has_bfloat16() -> bool:
    """Whether the machine multiplies bfloat16 natively."""
    cpu = torch.cpu.get_capabilities()
    return bool(torch.cuda.is_available() or cpu.get("avx512_bf16") or cpu.get("amx_bf16"))


def train(model, data: Dataset, stage: str, steps: int, args: argparse.Namespace, dmc: DMCConfig):
    """One stage; returns what was logged."""
    noise = args.finetune_noise_scale if stage == "finetune" else None
    model.set_dmc(stage=stage, noise_scale=dmc.noise_scale if noise is None else noise)
    trainer = DMCTrainer(
        model,
        TrainingArguments(
            output_dir=str(args.output),
            max_steps=steps,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            gradient_checkpointing=args.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            learning_rate=args.lr,
            lr_scheduler_type="linear" if stage == "finetune" else "constant_with_warmup",
            warmup_steps=max(1, steps // 3) if stage == "zero-out" else 0,
            weight_decay=0.1,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            bf16=has_bfloat16(),
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=torch.cuda.is_available(),
            logging_steps=args.logging_steps,
            save_strategy="no",
            report_to="none",
            seed=args.seed + list(args.stages).index(stage),  # another order of the data
        ),
        train_dataset=data,
        schedule=Schedule(stage, steps, dmc),
    )
    trainer.train()
    if stage == "zero-out":
        model.zero_borrowed_channels()
    return trainer.history


def evaluation(args: argparse.Namespace, tokenizer: Tokenizer) -> str:
    """Held-out perplexity of the model before and after, and CR, through megatron-dmc."""
    from megatron_dmc.checkpoint.load import load_model
    from megatron_dmc.quality.likelihood import evaluate

    tokens = Windows(args.heldout, tokenizer, args.seq_length).ids.numpy()
    base, dmc = (
        evaluate(load_model(path), tokens, length=args.seq_length, limit=args.heldout_windows)
        for path in (args.model, args.output)
    )
    return (
        f"perplexity {dmc.perplexity:.3f} (before the retrofit {base.perplexity:.3f}), CR "
        f"{dmc.measured_cr:.2f}, on {dmc.num_tokens} tokens of {args.heldout.name} in windows of "
        f"{args.seq_length}"
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, help="JSONL with `text`")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--heldout", type=Path, help="JSONL; its perplexity goes to the model card")
    parser.add_argument("--heldout-windows", type=int, help="default: all")
    parser.add_argument("--zero-out-steps", type=int, default=250)
    parser.add_argument(
        "--retrofit-steps", type=int, help="default: 3,000 for each unit of CR above 1"
    )
    parser.add_argument("--finetune-steps", type=int, default=2000)
    for name in ("target_cr", "merge_window", "alpha_offset", "temperature", "noise_scale",
                 "loss_weight"):  # fmt: skip
        default = getattr(DMCConfig, name)
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(default), default=default, help=f"default: {default}")
    parser.add_argument("--finetune-noise-scale", type=float, help="default: --noise-scale")
    parser.add_argument("--lora-rank", type=int, default=0, help="0: train all weights")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--logging-steps", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1234)
    args = parser.parse_args(argv)
    if args.retrofit_steps is None:
        args.retrofit_steps = round(3000 * (args.target_cr - 1))
    args.stages = {
        "zero-out": args.zero_out_steps,
        "retrofit": args.retrofit_steps,
        "finetune": args.finetune_steps,
    }
    return args


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Train and save; returns what was logged, stage by stage."""
    args = parse(argv)
    silence_optional_packages()
    dmc = DMCConfig(
        stage="zero-out", target_cr=args.target_cr, merge_window=args.merge_window,
        alpha_offset=args.alpha_offset, temperature=args.temperature, noise_scale=args.noise_scale,
        loss_weight=args.loss_weight,
    )  # fmt: skip
    place = find_tokenizer(args.model)
    if place is None:
        raise SystemExit(f"{args.model}: has no tokenizer")
    tokenizer = load_tokenizer(place)
    data = Windows(args.data, tokenizer, args.seq_length)
    model = load_as_dmc(args.model, dmc, dtype=torch.float32)
    model.set_dmc_ops(megatron_dmc.ops)
    if args.lora_rank:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(
            r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules=LORA_TARGETS
        )
        model = get_peft_model(model, lora)
        model.print_trainable_parameters()
    history = []
    for stage, steps in args.stages.items():
        history += train(model, data, stage, steps, args, dmc)
    if args.lora_rank:
        model = model.merge_and_unload()
    stored = from_hf_folder(args.model).dtype
    model.to(stored).save_pretrained(args.output)
    copy_tokenizer(place, args.output)
    facts = {
        "Data": f"{args.data.name}: {sum(args.stages.values())} steps of "
        f"{args.batch_size * args.gradient_accumulation_steps} x {args.seq_length} tokens",
        "Stages": ", ".join(f"{stage} {steps} steps" for stage, steps in args.stages.items())
        + (f"; LoRA of rank {args.lora_rank}" if args.lora_rank else ""),
    }
    description = from_hf_folder(args.output)
    write_remote_code(args.output, description)  # the evaluation reads the folder
    if args.heldout:
        facts["Evaluation"] = evaluation(args, tokenizer)
        print(facts["Evaluation"])
    (args.output / "README.md").unlink()
    write_remote_code(args.output, description, facts=facts)
    print(f"{args.output}: {description.summary()}")
    return history


if __name__ == "__main__":
    main()
