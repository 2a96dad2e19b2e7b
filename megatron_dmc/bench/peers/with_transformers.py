"""transformers' `generate`, a static batch with SDPA."""

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from . import cases


class Steps(StoppingCriteria):
    """Stops nothing: is called once for each token of the batch."""

    def __init__(self, progress: cases.Progress):
        self._progress = progress

    def __call__(self, input_ids, scores, **kwargs):
        self._progress.step(range(input_ids.shape[0]))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


def measure(asked: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the row of each case of a request that `cases` describes; raises what the engine raises."""
    torch.set_num_threads(asked["threads"])
    model = AutoModelForCausalLM.from_pretrained(
        asked["model"], dtype=getattr(torch, asked["dtype"]), attn_implementation="sdpa"
    )

    def run(case: dict[str, Any]) -> dict[str, Any]:
        ids = torch.tensor(cases.prompts(case, min(cases.VOCAB, model.config.vocab_size)))
        progress = cases.Progress(case, asked["clock"])
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
            min_new_tokens=case["new_tokens"], max_new_tokens=case["new_tokens"],
            stopping_criteria=StoppingCriteriaList([Steps(progress)]),
        )  # fmt: skip
        return progress.row()

    run(asked["cases"][0] | {"context": 8, "new_tokens": 2})  # warm-up
    for case in asked["cases"]:
        yield case | run(case) | {"version": transformers.__version__}


if __name__ == "__main__":
    cases.answer(measure)
