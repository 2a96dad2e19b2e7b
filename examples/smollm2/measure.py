"""Measurements on one model. Every function returns plain JSON, with only the settings to choose how much."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.checkpoint.convert import open_checkpoint
from megatron_dmc.checkpoint.load import load_model
from megatron_dmc.quality.likelihood import Evaluation, evaluate, read_tokens

from smollm2 import human_eval, needle, speed
from smollm2.corpus import KINDS
from smollm2.settings import Settings

CHAT_PROMPTS = Path(__file__).with_name("chat_prompts.txt")


@dataclass
class Subject:
    """A model, and what it is measured with."""

    name: str
    checkpoint: Path
    settings: Settings
    data: Path
    """Folder of the tokenised held-out texts."""
    problems: list[dict[str, Any]]
    logs: Path

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def dtype(self) -> str:
        """Every model is measured in one dtype; a CPU without bfloat16 instructions is slow in it."""
        return "bfloat16" if self.device == "cuda" else "float32"

    def tokens(self, kind: str) -> np.ndarray:
        return read_tokens(self.data / f"heldout-{kind}_text_document")

    def llm(self, max_model_len: int, max_num_seqs: int = 8) -> LLM:
        """An engine for sequences of this length, or of the model's if that is shorter."""
        description = open_checkpoint(self.checkpoint, verify_checkpoint=False)[0]
        return LLM(
            self.checkpoint, dtype=self.dtype, max_num_seqs=max_num_seqs,
            max_model_len=min(max_model_len, description.max_position_embeddings),
        )  # fmt: skip


def perplexity(subject: Subject) -> dict[str, Any]:
    """Of each kind of text and of all, with the CR of the decisions, and of the cache over time."""
    loaded = load_model(
        subject.checkpoint, device=subject.device, dtype=getattr(torch, subject.dtype)
    )
    options = {"length": subject.settings.training.seq_length, "batch": 2,
               "limit": subject.settings.measure.windows}  # fmt: skip
    kinds = {
        kind: evaluate(loaded, subject.tokens(kind), label=f"{subject.name}, {kind}", **options)
        for kind in KINDS
    }
    total = Evaluation(
        *(sum(values) for values in zip(*(vars(e).values() for e in kinds.values()), strict=True))
    )

    def figures(found: Evaluation) -> dict[str, Any]:
        return {
            "perplexity": found.perplexity, "measured_cr": found.measured_cr,
            "cache_cr": found.cache_cr, "tokens": found.num_predicted,
        }  # fmt: skip

    return {
        **figures(total),
        "measured_cr_per_layer_head": total.measured_cr_LG,
        "kinds": {kind: figures(found) for kind, found in kinds.items()},
    }


def programs(subject: Subject) -> dict[str, Any]:
    """HumanEval."""
    amounts = subject.settings.measure
    problems = subject.problems[: amounts.problems]
    llm = subject.llm(1024 + amounts.answer_tokens, max_num_seqs=32)
    completions = human_eval.answers(llm, problems, amounts.answer_tokens)
    return {
        "problems": len(problems),
        "bits_per_byte": human_eval.bits_per_byte(llm, problems),
        "pass_at_1": human_eval.pass_at_1(problems, completions),
        "completions": completions,
    }


def needles(subject: Subject) -> dict[str, float]:
    """Context length -> part of the needles found."""
    amounts, filler = subject.settings.measure, subject.tokens("english")
    llm = subject.llm(max(amounts.needle_lengths) + 64, max_num_seqs=2)
    return {
        str(length): needle.accuracy(llm, filler, length, amounts.needle_samples)
        for length in amounts.needle_lengths
    }


def chats(subject: Subject) -> list[str]:
    """Greedy answers to `chat_prompts.txt`."""
    prompts = CHAT_PROMPTS.read_text(encoding="utf-8").splitlines()
    llm = subject.llm(512 + subject.settings.measure.chat_tokens)
    params = SamplingParams(temperature=0, max_tokens=subject.settings.measure.chat_tokens)
    outputs = llm.chat([[{"role": "user", "content": prompt}] for prompt in prompts], params)
    return [output.outputs[0].text for output in outputs]


def cache(subject: Subject) -> dict[str, dict[str, float]]:
    """Context length -> bytes of the pages that hold it, by kind of text, and uncompressed."""
    lengths = subject.settings.measure.context_lengths
    llm = subject.llm(max(lengths) + 8, max_num_seqs=1)
    found: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        tokens = subject.tokens(kind)
        for length in lengths:
            ids = {"prompt_token_ids": tokens[:length].tolist()}
            params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
            metrics = llm.generate(ids, params, use_tqdm=False)[0].metrics
            stats = llm.stats()
            row = found.setdefault(str(length), {})
            row[kind] = metrics.num_pages * stats.page_bytes
            row["uncompressed"] = metrics.num_cached_tokens * stats.plain_entry_bytes
    return found


def speeds(subject: Subject) -> dict[str, float]:
    """Context length -> decode tokens per second of one stream through the server."""
    amounts = subject.settings.measure
    return speed.by_context(
        subject.checkpoint, subject.tokens("english").tolist(), amounts.context_lengths,
        amounts.speed_tokens, subject.dtype, subject.logs / f"serve-{subject.name}.log",
    )  # fmt: skip


MEASUREMENTS = {
    "perplexity": perplexity,
    "human_eval": programs,
    "needle": needles,
    "chat": chats,
    "cache": cache,
    "speed": speeds,
}
