"""HumanEval: bits per byte of the canonical solutions, and pass@1 of greedy answers."""

import math
from typing import Any

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.checkpoint.chat_template import load_chat_template

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

QUESTION = (
    "Write a Python function that solves this problem. Answer with the whole function in one code block."
    "\n\n```python\n{prompt}\n```"
)
ANSWER = "```python\n"
"""The beginning of a chat model's answer."""

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


def programs(llm: LLM, problems: list[Problem], max_tokens: int) -> list[str]:
    """Greedy answers as programs. A model with a chat template is asked for the function, and its answer begun; a model
    without one continues the prompt."""
    template, tokenizer = load_chat_template(llm.engine.tokenizer, None), llm.get_tokenizer()
    if template is None or not template.exists:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, stop=STOPS)
        outputs = llm.generate([problem["prompt"] for problem in problems], params)
        return [p["prompt"] + o.outputs[0].text for p, o in zip(problems, outputs, strict=True)]
    begun = tokenizer.encode(ANSWER)
    prompts = [
        {"prompt_token_ids": template.token_ids(
            [{"role": "user", "content": QUESTION.format(prompt=problem["prompt"].rstrip())}],
            add_generation_prompt=True, arguments=None,
        ) + begun}
        for problem in problems
    ]  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=max_tokens, stop=["```"])
    outputs = llm.generate(prompts, params)
    return [
        f"{p['prompt'].split(f'def {p["entry_point"]}')[0]}\n{o.outputs[0].text}"
        for p, o in zip(problems, outputs, strict=True)
    ]


def pass_at_1(problems: list[Problem], answers: list[str]) -> float:
    """Part of the problems whose tests the answer passes, each in a process of its own."""
    passed = [
        passes(f"{answer}\n\n{p['test']}\n\ncheck({p['entry_point']})")
        for p, answer in zip(problems, answers, strict=True)
    ]
    return sum(passed) / len(passed)
