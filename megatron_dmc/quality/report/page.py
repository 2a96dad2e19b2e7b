"""The report as one HTML page without external resources."""

import json
import os
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from megatron_dmc.quality.report import plots
from megatron_dmc.quality.report.data import ReportData, write_atomically

NOT_MEASURED = "not measured"


def render(data: ReportData) -> str:
    """The page's HTML. All texts are escaped; figures are inline SVG."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = resources.files("megatron_dmc.quality.report").joinpath("template.html")
    figures = {
        "curves_wide": plots.training_curves(data, width=960) if data.curves else None,
        "curves_narrow": plots.training_curves(data, width=400) if data.curves else None,
        "heat": plots.heat_map(data),
        "perplexity": plots.perplexity_bars(data),
        "cache": plots.cache_bars(data),
        "speed": plots.speed_bars(data),
    }
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        data=data,
        verdict=plots.verdict(data),
        details=_details(data),
        results=_results(data),
        figures={name: svg and Markup(svg) for name, svg in figures.items()},
        sample=_sample(data),
        stages=_stages(data),
        settings=[(name, _value(value)) for name, value in data.settings.items()],
        environment=[(name, _value(value)) for name, value in data.environment.items()],
        json_of_starts=_json_of_starts(data),
    )


def write_page(data: ReportData, path: str | os.PathLike) -> None:
    """Write the page, whole or not at all."""
    write_atomically(path, render(data).encode())


def write_report(data: ReportData, folder: str | os.PathLike) -> dict[str, str]:
    """Write `report.json`, `report.html` and `report.png`; returns their paths by kind."""
    paths = {kind: os.path.join(folder, f"report.{kind}") for kind in ("json", "html", "png")}
    data.to_json(paths["json"])
    plots.picture(data, paths["png"])
    write_page(data, paths["html"])
    return paths


def _details(data: ReportData) -> str:
    """One or two sentences under the headline."""
    share = data.measured_cr / data.target_cr
    reached = "met" if share >= 1 else f"reached to {100 * share:.0f} %"
    text = (
        f"On held-out text {data.measured_cr:.2f} tokens share one cache entry; the target of "
        f"{data.target_cr:g} is {reached}."
    )
    if data.cache_cr is not None and data.settings.get("merge_delay"):
        text += (
            f" The newest {data.settings['merge_delay']} tokens of a head stay unmerged, so over the"
            f" windows the cache itself is {data.cache_cr:.2f}x smaller; the longer the text, the"
            " closer the two."
        )
    if data.base_continued_perplexity is not None:
        ratio = data.dmc_perplexity / data.base_continued_perplexity
        text += (
            f" Against the base model trained on for the same steps, the DMC model has {ratio:.2f}x"
            " the perplexity."
        )
    return text


def _results(data: ReportData) -> list[tuple[str, str, str]]:
    """Rows of the table: what, value, remark."""

    def number(value: float | None, form: str, unit: str = "") -> str:
        return NOT_MEASURED if value is None else f"{value:{form}}{unit}"

    def of_base(value: float | None) -> str:
        return "" if value is None else f"{value / data.base_perplexity:.3f}x the base model's"

    def size(count: int | None) -> str:
        return NOT_MEASURED if count is None else f"{plots.human_bytes(count)} ({count:,} bytes)"

    speed = ""
    if data.tokens_per_second is not None and data.tokens_per_second_base is not None:
        speed = f"{data.tokens_per_second / data.tokens_per_second_base:.2f}x the base model's"
    ratio = "" if data.cache_ratio is None else f"{data.cache_ratio:.2f}x smaller"
    continued = data.base_continued_perplexity
    return [
        ("Perplexity, base model", number(data.base_perplexity, ".3f"), "held-out text"),
        ("Perplexity, base model trained on", number(continued, ".3f"), of_base(continued)),
        ("Perplexity, DMC model", number(data.dmc_perplexity, ".3f"),
         of_base(data.dmc_perplexity)),
        ("Target CR", number(data.target_cr, "g", "x"), "tokens per cache entry"),
        ("Decided CR", number(data.measured_cr, ".3f", "x"), "held-out text, all heads together"),
        ("Cache CR", number(data.cache_cr, ".3f", "x"), "slots in use, summed over each window"),
        ("KV cache, uncompressed", size(data.cache_bytes_uncompressed), "generation run"),
        ("KV cache, DMC", size(data.cache_bytes), ratio),
        ("Generation, base model", number(data.tokens_per_second_base, ",.1f", " tokens/s"), ""),
        ("Generation, DMC model", number(data.tokens_per_second, ",.1f", " tokens/s"), speed),
        ("Engine against one full forward",
         number(data.engine_vs_full_forward_max_abs_diff, ".2e"),
         "largest absolute difference of logits, hard decisions"),
    ]  # fmt: skip


def _sample(data: ReportData) -> dict[str, Any] | None:
    """The sample for the template: per token its pieces, segment and counts."""
    if data.sample is None:
        return None
    tokens, starts = data.sample["tokens"], data.sample["starts"]
    layer, head = data.sample["layer_head"]
    heads = [flags for row in starts for flags in row]
    shown, segment, spans = starts[layer][head], -1, []
    for i, token in enumerate(tokens):
        segment += bool(shown[i])
        spans.append({
            "pieces": token.split("\n"),
            "shade": "ab"[segment % 2],
            "start": bool(shown[i]),
            "count": sum(bool(flags[i]) for flags in heads),
        })  # fmt: skip
    return {
        "spans": spans, "layer": layer, "head": head, "num_heads": len(heads),
        "layers": len(starts), "heads": len(starts[0]), "num_tokens": len(tokens),
        "num_entries": sum(map(bool, shown)),
    }  # fmt: skip


def _json_of_starts(data: ReportData) -> Markup:
    """[L][G] strings of 0 and 1: no character of it needs escaping."""
    starts = data.sample["starts"] if data.sample else []
    rows = [["".join("01"[bool(x)] for x in flags) for flags in row] for row in starts]
    return Markup(json.dumps(rows))


def _stages(data: ReportData) -> list[tuple[str, str]]:
    rows = [(stage, f"{steps:,} steps") for stage, steps in data.steps.items()]
    if data.seconds is None:
        return [*rows, ("wall time of everything", NOT_MEASURED)]
    minutes, seconds = divmod(round(data.seconds), 60)
    text = f"{data.seconds:.1f} s" + (f" ({minutes} min {seconds} s)" if minutes else "")
    return [*rows, ("wall time of everything", text)]


def _value(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)
