"""The report of a run: README.md with tables and figures, and smollm2.json."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_dmc.quality.report.measure import environment

from smollm2.corpus import KINDS
from smollm2.measure import CHAT_PROMPTS
from smollm2.settings import Settings

type Results = dict[str, dict[str, Any]]
"""Model -> measurement -> figures."""

PARAMETERS = 134_515_008
"""Of SmolLM2-135M, embeddings included."""


def summary(settings: Settings, results: Results) -> dict[str, Any]:
    """The contents of smollm2.json."""
    targets = {}
    for name, arm in settings.arms.items():
        if arm.target_cr is None:
            continue
        found, of_code = results[name]["perplexity"], results[name]["human_eval"]
        targets[f"{arm.target_cr:g}"] = {
            "perplexity": found["perplexity"],
            "measured_cr": found["measured_cr"],
            "cache_cr": found["cache_cr"],
            "human_eval_bits_per_byte": of_code["bits_per_byte"],
            "human_eval_pass_at_1": of_code["pass_at_1"],
        }
    return {
        "base_perplexity": results["base"]["perplexity"]["perplexity"],
        "control_perplexity": results["control"]["perplexity"]["perplexity"],
        "targets": targets,
        "tokens_per_arm": {name: _tokens(settings, name) for name in settings.arms},
        "environment": environment(),
    }


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
        p, h = found["perplexity"], found["human_eval"]
        rows.append([
            name, *(f"{p['kinds'][kind]['perplexity']:.2f}" for kind in KINDS),
            f"{p['perplexity']:.2f}", f"{100 * (p['perplexity'] / control - 1):+.1f} %",
            f"{p['measured_cr']:.2f}", f"{p['cache_cr']:.2f}", f"{h['bits_per_byte']:.3f}",
            f"{100 * h['pass_at_1']:.1f} %",
        ])  # fmt: skip
    head = ["model", *(f"perplexity, {kind}" for kind in KINDS), "both", "against the control",
            "decided CR", "cache CR", "HumanEval, bits per byte", "pass@1"]  # fmt: skip
    return table(head, rows)


def by_length(results: Results, what: str, cell: Callable[[Any], str]) -> str:
    lengths = list(next(iter(results.values()))[what])
    rows = [
        [name, *(cell(found[what][length]) for length in lengths)]
        for name, found in results.items()
    ]
    return table(["model", *lengths], rows)


def chat_section(results: Results) -> str:
    parts = []
    for i, prompt in enumerate(CHAT_PROMPTS.read_text(encoding="utf-8").splitlines()):
        answers = "\n\n".join(
            f"*{name}*\n\n{_quoted(found['chat'][i])}" for name, found in results.items()
        )
        parts.append(f"### {prompt}\n\n{answers}")
    return "\n\n".join(parts)


def _quoted(text: str) -> str:
    fenced = text.replace("```", "'''").strip() or "(nothing)"
    return "```text\n" + fenced + "\n```"


def draw(folder: Path, results: Results) -> None:
    """cache.svg, speed.svg and heads.svg."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def lines(file: str, label: str, of: Callable[[dict[str, Any]], dict[str, float]]) -> None:
        figure, axes = plt.subplots(figsize=(6, 3.6))
        for name, found in results.items():
            points = {int(length): value for length, value in of(found).items()}
            axes.plot(list(points), list(points.values()), marker="o", label=name)
        axes.set(xlabel="tokens of context", ylabel=label, ylim=(0, None))
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(folder / file, bbox_inches="tight")
        plt.close(figure)

    lines("cache.svg", "KV cache, MiB (mean of both kinds of text)", lambda found: {
        length: sum(row[kind] for kind in KINDS) / len(KINDS) / 2**20
        for length, row in found["cache"].items()
    })  # fmt: skip
    lines("speed.svg", "decode tokens/s, one stream", lambda found: found["speed"])

    compressed = {n: f for n, f in results.items() if f["perplexity"]["measured_cr"] > 1}
    if not compressed:
        return
    figure, every = plt.subplots(
        1, len(compressed), figsize=(3 * len(compressed), 6), squeeze=False
    )
    for axes, (name, found) in zip(every[0], compressed.items(), strict=True):
        image = axes.imshow(
            found["perplexity"]["measured_cr_per_layer_head"], aspect="auto", vmin=1
        )
        axes.set(title=name, xlabel="KV head", ylabel="layer")
        figure.colorbar(image, ax=axes, label="CR")
    figure.tight_layout()
    figure.savefig(folder / "heads.svg", bbox_inches="tight")
    plt.close(figure)


def write(
    folder: Path, settings: Settings, results: Results, counts: dict[str, int],
    seconds: dict[str, float],
) -> None:  # fmt: skip
    """Write the report's files; those of an older report go.

    Args:
        counts: tokens of the tokenised files.
        seconds: of every step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = summary(settings, results)
    (folder / "smollm2.json").write_text(json.dumps(figures, indent=1) + "\n")
    draw(folder, results)
    heads = "\n\n![CR by layer and KV head](heads.svg)" if (folder / "heads.svg").is_file() else ""
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
    machine = ", ".join(f"{name} {value}" for name, value in figures["environment"].items())
    (folder / "README.md").write_text(f"""# SmolLM2-135M with a compressed KV cache

Made by `python examples/smollm2/run.py`. *base* is the original, *control* the same model after as many steps on
the same data with the same loss and no DMC; the others were retrofitted. An arm saw {trained:,} tokens,
{trained / PARAMETERS:.4f} a parameter; {counts["train"]:,} were available. The paper's rule (3,000
steps of 1024 x 4096 tokens for each unit of CR above 1, 250 before and 2,000 after) gives Llama 2 7B 47 billion tokens to
4x, 7 a parameter, and 98 billion to 8x.

## Quality

{quality_table(results)}

Held-out documents ({held} tokens), windows of {settings.training.seq_length} tokens. Decided CR counts the decisions, cache CR
the slots in use over time, raw tokens of the merge delay ({settings.training.merge_delay}) included. pass@1: greedy, each answer run in a process
with limits.

Needles found, by tokens of context ({settings.measure.needle_samples} at each length):

{by_length(results, "needle", lambda part: f"{100 * part:.0f} %")}

## Memory and speed

![KV cache against context](cache.svg)

{by_length(results, "cache", lambda row: f"{sum(row[kind] for kind in KINDS) / len(KINDS) / 2**20:.2f} MiB")}

Decode tokens per second, one stream through `megatron-dmc serve`:

{by_length(results, "speed", lambda value: f"{value:.1f}")}

![decode speed against context](speed.svg)

## Compression

{kinds}{heads}

## Chat

Twenty prompts, greedy, at most {settings.measure.chat_tokens} tokens; none was picked.

{chat_section(results)}

## Steps

{time_table}

{machine}
""")
