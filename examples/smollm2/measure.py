"""Measurements on one model. Every function returns plain JSON, with only the settings to choose how much."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.checkpoint.convert import open_checkpoint
from megatron_dmc.checkpoint.load import full_forward, load_model
from megatron_dmc.engine.config import EngineConfig
from megatron_dmc.quality.likelihood import Evaluation, evaluate, read_tokens, windows

from experiments.eviction import evicting_forward, mean_budget, measured_crs
from smollm2 import human_eval, needle, speed
from smollm2.corpus import KINDS
from smollm2.settings import Arm, Settings

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
        """Of all that is not timed: full forwards in bfloat16 are slow on a CPU without its instructions."""
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
    amounts = subject.settings.measure
    return _perplexity(subject, amounts.window_length, amounts.windows, batch=2)


def long_perplexity(subject: Subject) -> dict[str, Any]:
    """The same in longer windows."""
    amounts = subject.settings.measure
    return _perplexity(subject, amounts.long_window_length, amounts.long_windows, batch=1)


def _perplexity(subject: Subject, length: int, limit: int, batch: int) -> dict[str, Any]:
    loaded = load_model(
        subject.checkpoint, device=subject.device, dtype=getattr(torch, subject.dtype)
    )
    kinds = {
        kind: evaluate(
            loaded, subject.tokens(kind), length=length, limit=limit, batch=batch,
            label=f"{subject.name}, {kind}, windows of {length}",
        )
        for kind in KINDS
    }  # fmt: skip
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


POLICIES = ("h2o", "tova", "window")


@torch.no_grad()
def evicted(subject: Subject, cache_crs: list[float]) -> dict[str, Any]:
    """A plain model under H2O, TOVA and the window, at budgets with the same slots in use over time as these CRs.

    Returns:
        perplexity: with the whole cache, of the same windows; policies: of each its rows (budget, cache_cr,
        perplexity).
    """
    length, batch = subject.settings.measure.window_length, 4
    loaded = load_model(
        subject.checkpoint, device=subject.device, dtype=getattr(torch, subject.dtype)
    )
    limit = subject.settings.measure.eviction_windows
    rows = torch.cat(
        [part for kind in KINDS for part in windows(subject.tokens(kind), length, batch, limit)]
    ).to(subject.device)

    def perplexity_of(forward: Callable[[Tensor], Tensor], label: str) -> float:
        nll = 0.0
        for part in tqdm(rows.split(batch), desc=f"{subject.name}, {label}", unit="batch"):
            logits = forward(part[:, :-1])[..., : loaded.description.vocab_size]
            nll += float(torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum"
            ))  # fmt: skip
        return math.exp(nll / rows[:, 1:].numel())

    found: dict[str, Any] = {
        "perplexity": perplexity_of(lambda ids: full_forward(loaded.model, ids), "whole cache"),
        "policies": {},
    }
    for policy in POLICIES:
        for cr in cache_crs:
            budget = mean_budget(length, cr)

            def forward(ids: Tensor, policy: str = policy, budget: int = budget) -> Tensor:
                return evicting_forward(loaded.model, ids, policy, budget)

            found["policies"].setdefault(policy, []).append({
                "budget": budget, "cache_cr": measured_crs(length, budget)[1],
                "perplexity": perplexity_of(forward, f"{policy}, {budget} entries"),
            })  # fmt: skip
    return found


def programs(subject: Subject) -> dict[str, Any]:
    """HumanEval."""
    amounts = subject.settings.measure
    problems = subject.problems[: amounts.problems]
    llm = subject.llm(1024 + amounts.answer_tokens, max_num_seqs=64)
    answers = human_eval.programs(llm, problems, amounts.answer_tokens)
    return {
        "problems": len(problems),
        "bits_per_byte": human_eval.bits_per_byte(llm, problems),
        "pass_at_1": human_eval.pass_at_1(problems, answers),
        "answers": answers,
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
    """Context length -> decode tokens per second of one stream through the server, in bfloat16."""
    amounts = subject.settings.measure
    return speed.by_context(
        subject.checkpoint, subject.tokens("english").tolist(), amounts.context_lengths,
        amounts.speed_tokens, "bfloat16", subject.logs / f"serve-{subject.name}.log",
        # raw tokens of the delay must fill whole pages to be shared
        prefix_caching=subject.settings.training.merge_delay % EngineConfig.block_size == 0,
    )  # fmt: skip


FUNCTIONS: dict[str, Callable[[Subject], Any]] = {
    "human_eval": programs, "needle": needles, "perplexity": perplexity, "long_perplexity": long_perplexity,
    "cache": cache, "chat": chats, "speed": speeds,
}  # fmt: skip


def wanted(arm: Arm | None) -> tuple[str, ...]:
    """Names of an arm's measurements; None: the original model. The control leaves out what it shares with it."""
    if arm is not None and arm.policy == "evict":
        return ("perplexity", "long_perplexity")
    if arm is not None and arm.target_cr is None:
        return ("perplexity", "long_perplexity", "human_eval", "chat")
    return tuple(FUNCTIONS)
