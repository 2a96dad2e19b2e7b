"""HumanEval: bits per byte of the canonical solutions, and pass@1 of greedy answers."""

import math
from typing import Any

from megatron_dmc import LLM, SamplingParams

from smollm2.sandbox import passes

STOPS = [
    "\nclass ",
    "\ndef ",
    "\n#",
    "\nif ",
    "\nprint(",
    "\nassert ",
    "\nfrom ",
    "\nimport ",
    "\n```",
]
"""Text that follows a completed function."""

type Problem = dict[str, Any]


def bits_per_byte(llm: LLM, problems: list[Problem]) -> float:
    """Bits that the model needs for the canonical solutions after their prompts, by byte of the solutions."""
    tokenizer = llm.get_tokenizer()
    assert tokenizer is not None
    prompts, starts = [], []
    for problem in problems:
        before = tokenizer.encode(problem["prompt"])
        prompts.append(
            {"prompt_token_ids": before + tokenizer.encode(problem["canonical_solution"])}
        )
        starts.append(len(before))
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    nats = 0.0
    for output, start in zip(llm.generate(prompts, params), starts, strict=True):
        assert output.prompt_logprobs is not None
        for token_id, found in list(
            zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        )[start:]:
            assert found is not None
            nats -= found[token_id].logprob
    num_bytes = sum(len(problem["canonical_solution"].encode()) for problem in problems)
    return nats / math.log(2) / num_bytes


def answers(llm: LLM, problems: list[Problem], max_tokens: int) -> list[str]:
    """Greedy completions of the prompts, each up to the end of its function."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, stop=STOPS)
    outputs = llm.generate([problem["prompt"] for problem in problems], params)
    return [output.outputs[0].text for output in outputs]


def pass_at_1(problems: list[Problem], completions: list[str]) -> float:
    """Part of the problems whose tests the completion passes, each in a process of its own."""
    passed = [
        passes(f"{p['prompt']}{text}\n\n{p['test']}\n\ncheck({p['entry_point']})")
        for p, text in zip(problems, completions, strict=True)
    ]
    return sum(passed) / len(passed)
