"""A sentence in a long text, and the question for it."""

import random
from typing import Any

import numpy as np

from megatron_dmc import LLM, SamplingParams

WORDS = (
    "anchor",
    "basket",
    "candle",
    "desert",
    "engine",
    "forest",
    "garden",
    "harbour",
    "island",
    "jacket",
)
DIGITS = 5
QUESTION = "\n\nQuestion: What is the secret number of the {word}?\nAnswer: The secret number of the {word} is"


def prompts(
    tokenizer: Any, filler: np.ndarray, length: int, samples: int
) -> list[tuple[list[int], str]]:
    """(token ids, answer): `length` tokens of held-out text with a needle at depths from start to end."""
    rows = []
    for i in range(samples):
        draw = random.Random(f"{length} {i}")
        word, number = draw.choice(WORDS), str(draw.randrange(10 ** (DIGITS - 1), 10**DIGITS))
        needle = tokenizer.encode(f"\nThe secret number of the {word} is {number}.\n")
        question = tokenizer.encode(QUESTION.format(word=word))
        room = length - len(needle) - len(question)
        at = draw.randrange(max(1, len(filler) - room))
        text = filler[at : at + room].tolist()
        depth = round(room * i / max(1, samples - 1))
        rows.append((text[:depth] + needle + text[depth:] + question, number))
    return rows


def accuracy(llm: LLM, filler: np.ndarray, length: int, samples: int) -> float:
    """Part of the questions that are answered with exactly the number."""
    tokenizer = llm.get_tokenizer()
    rows = prompts(tokenizer, filler, length, samples)
    params = SamplingParams(temperature=0, max_tokens=2 * DIGITS)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in rows], params)
    texts = [output.outputs[0].text.strip() for output in outputs]
    found = [
        text.startswith(number) and not text[DIGITS : DIGITS + 1].isdigit()
        for text, (_, number) in zip(texts, rows, strict=True)
    ]
    return sum(found) / len(found)
