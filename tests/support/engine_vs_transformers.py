"""The engine against `transformers` on the base model: greedy tokens, one by one, in float64. And with DMC
settings (`MODELS`) on the same weights against one full forward over each prompt and its completion.

`python tests/support/engine_vs_transformers.py` compares 200 prompts of source text, `--model w=16` of a DMC
model; the tests take a few.
Prompts come in groups of one length, so that `transformers` needs no padding.
"""

import argparse
import sysconfig
import time
from pathlib import Path

import torch

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.checkpoint.load import full_forward, load_model
from megatron_dmc.config import DMCConfig

MODEL = Path(__file__).parents[2] / "examples" / "models" / "stdlib-llama-3m"
LENGTHS = (2, 17, 64, 130, 200)
SOURCES = ("argparse.py", "ast.py", "shutil.py", "textwrap.py", "queue.py", "heapq.py")

MODELS = {
    "base": None,
    "w=0": {},
    "w=1": {"merge_delay": 1},
    "w=16": {"merge_delay": 16},
    "dms": {"policy": "evict", "eviction_delay": 15},
}
"""DMC settings; `base` is compared with transformers."""


def make_prompts(tokenizer, count):
    """`count` windows of the standard library's source, lengths in turn."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    tokens = [i for name in SOURCES for i in tokenizer.encode((folder / name).read_text())]
    stride = (len(tokens) - max(LENGTHS)) // count
    return [tokens[i * stride :][: LENGTHS[i % len(LENGTHS)]] for i in range(count)]


def with_transformers(prompts, max_tokens, eos_id):
    """Greedy completions up to and with the end-of-text token."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float64).eval()
    results = [None] * len(prompts)
    for length in LENGTHS:
        members = [i for i, p in enumerate(prompts) if len(p) == length]
        if not members:
            continue
        ids = torch.tensor([prompts[i] for i in members])
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False,
                max_new_tokens=max_tokens, pad_token_id=eos_id, eos_token_id=eos_id,
            )[:, length:].tolist()  # fmt: skip
        for i, row in zip(members, out, strict=True):
            results[i] = row[: row.index(eos_id) + 1] if eos_id in row else row
    return results


def compare(count, max_tokens, model="base", **options):
    """(prompts, completions that are right, the engine's, the engine's stats)."""
    source, settings = str(MODEL), MODELS[model]
    if settings is not None:
        # the base's own channel decides: about half of the tokens merge
        dmc = DMCConfig(stage="finetune", alpha_offset=0.1, **settings)
        source = load_model(MODEL, dtype=torch.float64, dmc=dmc)
    llm = LLM(source, dtype="float64", device="cpu", **options)
    prompts = make_prompts(llm.get_tokenizer(), count)
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    ours = [o.outputs[0].token_ids for o in outputs]
    if settings is None:
        theirs = with_transformers(prompts, max_tokens, llm.engine.eos_id)
    else:
        theirs = with_full_forward(source.model, prompts, ours)
    return prompts, theirs, ours, llm.stats()


def with_full_forward(model, prompts, completions):
    """The full forward's tokens in place of each completion's: a right completion has the same."""
    results = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = full_forward(model, torch.tensor([[*prompt, *completion]]))[0]
        results.append(logits[len(prompt) - 1 : -1].argmax(-1).tolist())
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--model", choices=list(MODELS), default="base")
    args = parser.parse_args()
    began = time.monotonic()
    prompts, theirs, ours, stats = compare(args.prompts, args.max_tokens, args.model)
    same = sum(a == b for a, b in zip(theirs, ours, strict=True))
    print(
        f"{same} of {len(prompts)} prompts agree in every token ({sum(map(len, ours))} tokens, "
        f"{stats.num_prompt_tokens} of prompts, CR {stats.measured_cr:.2f}, {time.monotonic() - began:.0f} s)"
    )
    raise SystemExit(same != len(prompts))


if __name__ == "__main__":
    main()
