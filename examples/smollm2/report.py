"""The report of a run: README.md with tables and figures, and smollm2.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dmc.quality.report.measure import environment

from experiments.drawing import EVICTIONS
from smollm2.corpus import KINDS
from smollm2.figures import Evicted, Results, draw, retrofits
from smollm2.measure import CHAT_PROMPTS
from smollm2.settings import Settings
from smollm2.steps import Run

PARAMETERS = 134_515_008
"""Of SmolLM2-135M, embeddings included."""


def summary(settings: Settings, results: Results, evicted: Evicted) -> dict[str, Any]:
    """The contents of smollm2.json."""

    def by_target(policy: str) -> dict[str, Any]:
        return {
            f"{arm.target_cr:g}": _figures(results[name])
            for name, arm in retrofits(settings, policy).items()
        }

    return {
        "base_perplexity": results["base"]["perplexity"]["perplexity"],
        "control_perplexity": results["control"]["perplexity"]["perplexity"],
        "control_long_perplexity": results["control"]["long_perplexity"]["perplexity"],
        "targets": by_target("merge"),
        "dms": by_target("evict"),
        "eviction": evicted,
        "tokens_per_arm": {name: _tokens(settings, name) for name in settings.arms},
        "environment": environment(),
    }


def _figures(found: dict[str, Any]) -> dict[str, Any]:
    figures = {
        name: found["perplexity"][name] for name in ("perplexity", "measured_cr", "cache_cr")
    }
    if longer := found.get("long_perplexity"):
        figures["long_perplexity"] = longer["perplexity"]
        figures["long_cache_cr"] = longer["cache_cr"]
    if of_code := found.get("human_eval"):
        figures["human_eval_bits_per_byte"] = of_code["bits_per_byte"]
        figures["human_eval_pass_at_1"] = of_code["pass_at_1"]
    return figures


def _tokens(settings: Settings, arm: str) -> int:
    t = settings.training
    return sum(settings.arms[arm].stages.values()) * t.batch * t.seq_length


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown; all columns but the first to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def quality_table(results: Results) -> str:
    control = results["control"]["perplexity"]["perplexity"]
    rows = []
    for name, found in results.items():
        p, h = found["perplexity"], found.get("human_eval")
        rows.append([
            name, *(f"{p['kinds'][kind]['perplexity']:.2f}" for kind in KINDS),
            f"{p['perplexity']:.2f}", f"{100 * (p['perplexity'] / control - 1):+.1f} %",
            f"{p['measured_cr']:.2f}", f"{p['cache_cr']:.2f}", f"{h['bits_per_byte']:.3f}" if h else "",
            f"{100 * h['pass_at_1']:.1f} %" if h else "",
        ])  # fmt: skip
    head = ["model", *(f"perplexity, {kind}" for kind in KINDS), "both", "against the control",
            "decided CR", "cache CR", "HumanEval, bits per byte", "pass@1"]  # fmt: skip
    return table(head, rows)


def long_table(results: Results) -> str:
    control = results["control"]["long_perplexity"]["perplexity"]
    rows = [
        [name, f"{p['perplexity']:.2f}", f"{100 * (p['perplexity'] / control - 1):+.1f} %",
         f"{p['measured_cr']:.2f}", f"{p['cache_cr']:.2f}"]
        for name, found in results.items() if (p := found.get("long_perplexity"))
    ]  # fmt: skip
    return table(["model", "perplexity", "against the control", "decided CR", "cache CR"], rows)


def eviction_table(evicted: Evicted) -> str:
    whole = evicted["perplexity"]
    return table(
        ["policy", "entries of a head", "cache CR", "perplexity against the whole cache"],
        [
            [EVICTIONS[policy][0], str(row["budget"]), f"{row['cache_cr']:.2f}",
             f"{100 * (row['perplexity'] / whole - 1):+.1f} %"]
            for policy, rows in evicted["policies"].items() for row in rows
        ],
    )  # fmt: skip


def by_length(results: Results, what: str, cell: Callable[[Any], str]) -> str:
    lengths = list(results["base"][what])
    rows = [
        [name, *(cell(found[what][length]) for length in lengths)]
        for name, found in results.items()
        if what in found
    ]
    return table(["model", *lengths], rows)


def chat_section(results: Results) -> str:
    parts = []
    for i, prompt in enumerate(CHAT_PROMPTS.read_text(encoding="utf-8").splitlines()):
        answers = "\n\n".join(
            f"*{name}*\n\n{_quoted(found['chat'][i])}"
            for name, found in results.items()
            if "chat" in found
        )
        parts.append(f"**{prompt}**\n\n{answers}")
    return "\n\n".join(parts)


def _quoted(text: str) -> str:
    fenced = text.replace("```", "'''").strip() or "(nothing)"
    return "```text\n" + fenced + "\n```"


def write(
    folder: Path, settings: Settings, results: Results, evicted: Evicted,
    counts: dict[str, int], seconds: dict[str, float], runs: list[Run],
) -> None:  # fmt: skip
    """Write the report's files; those of an older report go.

    Args:
        counts: tokens of the tokenised files.
        seconds: of every step.
        runs: of the command.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = summary(settings, results, evicted)
    (folder / "smollm2.json").write_text(json.dumps(figures, indent=1) + "\n")
    draw(folder, settings, results, evicted)
    trained = max(figures["tokens_per_arm"].values())
    kinds = table(
        ["model", *(f"CR, {kind}" for kind in KINDS)],
        [
            [name, *(f"{found['perplexity']['kinds'][kind]['measured_cr']:.2f}" for kind in KINDS)]
            for name, found in results.items()
        ],
    )
    held = ", ".join(f"{counts[f'heldout-{kind}']:,} of {kind}" for kind in KINDS)
    time_table = table(
        ["step", "seconds"], [[name, f"{value:,.0f}"] for name, value in seconds.items()]
    )
    together = "; ".join(
        f"{run.steps} steps in {run.seconds / 60:,.0f} minutes, {run.jobs} at a time"
        for run in runs
    )
    machine = ", ".join(f"{name} {value}" for name, value in figures["environment"].items())
    (folder / "README.md").write_text(f"""# SmolLM2-135M with a compressed KV cache

Made by `python examples/smollm2/run.py`. *base* is the original, *control* the same model after as many steps on
the same data with the same loss and no DMC; the others were retrofitted. An arm saw {trained:,} tokens,
{trained / PARAMETERS:.4f} a parameter; {counts["train"]:,} were available. The paper's rule (3,000
steps of 1024 x 4096 tokens for each unit of CR above 1, 250 before and 2,000 after) gives Llama 2 7B 47 billion tokens to
4x, 7 a parameter, and 98 billion to 8x.

![Perplexity against cache bytes; cache and decode speed against context](overview.svg)

## Quality

{quality_table(results)}

Held-out documents ({held} tokens), windows of {settings.measure.window_length} tokens. Decided CR counts the decisions, cache CR
the slots in use over time, raw tokens of the merge delay ({settings.training.merge_delay}) included. pass@1: greedy, asked as a chat for the whole
function in a code block, each answer run in a process with limits.

Windows of {settings.measure.long_window_length} tokens, {settings.measure.long_windows} of each kind, where those of training \
have {settings.training.seq_length}:

{long_table(results)}

The control under eviction without training, at the budgets that hold as many slots over time as the
retrofits ({settings.measure.eviction_windows} windows of each kind):

{eviction_table(evicted)}

Needles found, by tokens of context ({settings.measure.needle_samples} at each length):

{by_length(results, "needle", lambda part: f"{100 * part:.0f} %")}

## Memory and speed

Pages of the cache by tokens of context:

{by_length(results, "cache", lambda row: f"{sum(row[kind] for kind in KINDS) / len(KINDS) / 2**20:.2f} MiB")}

Decode tokens per second, one stream through `megatron-dmc serve`, bfloat16:

{by_length(results, "speed", lambda value: f"{value:.1f}")}

## Compression

{kinds}

![CR by layer and KV head](heads.svg)

## Chat

Twenty prompts, greedy, at most {settings.measure.chat_tokens} tokens; none was picked.

{chat_section(results)}

## Steps

{time_table}

The command: {together}. Steps that ran at the same time share the cores.

{machine}
""")
