"""The report's figures: quality, memory and speed; CR by layer and head."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from megatron_dmc.plotting import (
    BLUE,
    GREEN,
    HEAT,
    INK,
    MUTED,
    heat_text_colour,
    hide_spines,
    styled,
)

from experiments.drawing import EVICTIONS, NAVY, grid, panels
from smollm2.corpus import KINDS
from smollm2.settings import Arm, Settings

type Results = dict[str, dict[str, Any]]
"""Model -> measurement -> figures."""

type Evicted = dict[str, Any]
"""Of `measure.evicted`."""


def retrofits(settings: Settings, policy: str) -> dict[str, Arm]:
    """Name -> arm, of the arms that compress with this policy."""
    return {
        name: arm
        for name, arm in settings.arms.items()
        if arm.target_cr is not None and arm.policy == policy
    }


def overview(settings: Settings, results: Results, evicted: Evicted) -> Figure:
    """Quality against the cache's memory; memory and decode speed against context."""
    figure, (quality, memory, speed) = panels(13, 3.9, 3)
    control = results["control"]["perplexity"]["perplexity"]
    for policy, label, color, marker in (("merge", "DMC", NAVY, "*"), ("evict", "DMS", GREEN, "^")):
        found = [results[name]["perplexity"] for name in retrofits(settings, policy)]
        if found:
            quality.plot([100 / f["cache_cr"] for f in found],
                         [f["perplexity"] / control for f in found],
                         color=color, marker=marker, ms=9, lw=1.6,
                         label=f"{label}, delay {settings.training.merge_delay}")  # fmt: skip
    for policy, rows in evicted["policies"].items():
        label, color, marker = EVICTIONS[policy]
        quality.plot([100 / row["cache_cr"] for row in rows],
                     [row["perplexity"] / evicted["perplexity"] for row in rows],
                     color=color, marker=marker, ms=6, lw=1.2, ls=(0, (3, 2)),
                     label=f"{label}, untrained")  # fmt: skip
    quality.axhline(1, color=INK, lw=1.2, label="control, uncompressed")
    quality.set(
        title="held-out perplexity / control's", xlabel="cache bytes over time / uncompressed"
    )
    quality.set_xscale("log", base=2)
    quality.xaxis.set_major_locator(FixedLocator([12.5, 25, 50, 100]))
    quality.xaxis.set_minor_locator(NullLocator())
    quality.xaxis.set_major_formatter(StrMethodFormatter("{x:g} %"))
    quality.set_xlim(110, 10)
    quality.legend(fontsize=8)

    shown = {"base": MUTED} | dict(
        zip(retrofits(settings, "merge"), (BLUE, NAVY), strict=False)
    )  # fmt: skip
    _by_length(memory, results, shown, _cache_mib)
    memory.set(title="KV cache, MiB", xlabel="tokens of context")
    memory.legend(fontsize=8)
    _by_length(speed, results, shown, lambda found: found["speed"])
    speed.set(title="decode tokens/s, one stream", xlabel="tokens of context")
    for axes in (quality, memory, speed):
        grid(axes)
    return figure


def _cache_mib(found: dict[str, Any]) -> dict[str, float]:
    return {
        length: sum(row[kind] for kind in KINDS) / len(KINDS) / 2**20
        for length, row in found["cache"].items()
    }


def _by_length(
    axes: Axes,
    results: Results,
    colors: dict[str, str],
    of: Callable[[dict[str, Any]], dict[str, float]],
) -> None:
    for name, color in colors.items():
        points = {int(length): value for length, value in of(results[name]).items()}
        axes.plot(list(points), list(points.values()), marker="o", color=color, label=name)
    axes.set_ylim(0, None)


def heads(settings: Settings, results: Results) -> Figure:
    """CR of every layer and KV head."""
    maps = {
        name: results[name]["perplexity"]["measured_cr_per_layer_head"]
        for name, arm in settings.arms.items()
        if arm.target_cr is not None
    }
    top = max(cr for rows in maps.values() for row in rows for cr in row)
    figure = Figure(figsize=(13, 0.6 + 0.8 * len(maps)), layout="constrained")
    every = list(figure.subplots(len(maps), 1, squeeze=False)[:, 0])
    for axes, (name, rows) in zip(every, maps.items(), strict=True):
        columns = list(zip(*rows, strict=True))  # head by layer: a wide picture
        shades = [
            [math.log(max(cr, 1)) / math.log(max(top, 1.01)) for cr in row] for row in columns
        ]
        axes.imshow(shades, cmap=HEAT, vmin=0, vmax=1, aspect="auto")
        for head, row in enumerate(columns):
            for layer, cr in enumerate(row):
                axes.text(layer, head, f"{cr:.1f}" if cr < 10 else f"{cr:.0f}", ha="center",
                          va="center", size=7, color=heat_text_colour(shades[head][layer]))  # fmt: skip
        axes.set(xticks=range(len(rows)), yticks=range(len(columns)), ylabel=f"{name}\nKV head")
        hide_spines(axes)
    every[-1].set_xlabel("layer")
    return figure


def draw(folder: Path, settings: Settings, results: Results, evicted: Evicted) -> None:
    """Write overview.svg and heads.svg."""
    with styled(9):
        for name, figure in (
            ("overview", overview(settings, results, evicted)),
            ("heads", heads(settings, results)),
        ):
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
