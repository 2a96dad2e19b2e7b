"""The figures of docs/results.md as SVG, from the file that results.py writes.

    python examples/experiments/plots.py [--from docs/results/metrics.json] [--to docs/pictures] [--figure NAME ...]

A figure whose runs are not in the file is left out, with a line that says so. The background is white, so that a
picture reads the same in a light and in a dark page. Error bars are standard deviations over seeds; without one,
there is one seed.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from megatron_dmc.quality.report.plots import BLUE, GREEN, GRID, INK, MUTED, ORANGE, styled

from results import (
    Data,
    arm_order,
    control_of,
    deviation,
    fewer_heads,
    group,
    load,
    mean,
    measured,
    values,
)

ROOT = Path(__file__).resolve().parents[2]
SKY, PINK, GOLD = "#56b4e9", "#cc79a7", "#e69f00"
FAMILIES = {
    "DMC": (["dmc-2x", "dmc-4x", "dmc-8x"], BLUE, "o"),
    "DMC-C": (["dmc-c-4x"], SKY, "D"),
    "GQA": (["gqa-2x", "gqa-4x"], ORANGE, "s"),
    "DMS": (["dms-4x", "dms-8x"], GREEN, "^"),
}
"""Trained methods: arms in order of their CR, colour, marker."""
EVICTIONS = {
    "h2o": ("H2O", PINK, "v"),
    "tova": ("TOVA", GOLD, "x"),
    "window": ("window", MUTED, "+"),
}
COLORS = {
    arm: color for names, color, _ in FAMILIES.values() for arm in names
} | {"continued": INK, "base": MUTED}  # fmt: skip
DASHES = {"dmc-2x": (0, (4, 2)), "dmc-8x": (0, (1, 1.5)), "gqa-2x": (0, (4, 2)),
          "dms-8x": (0, (1, 1.5))}  # fmt: skip
"""Of arms that have the colour of another."""
HEAT = LinearSegmentedColormap.from_list("cr", ["#eef4f8", "#9fcae1", "#2f86bd", "#08407a"])
WARM = LinearSegmentedColormap.from_list("merge", ["#ffffff", "#f6c89f", "#d9772b"])


class Missing(Exception):
    """The runs of a figure are not there."""


def _panels(width: float, height: float, count: int, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), facecolor="#ffffff", layout="constrained")
    axes = figure.subplots(1, count, squeeze=False, **kwargs)[0]
    return figure, list(axes)


def _grid(ax: Axes, axis: str = "y") -> None:
    ax.grid(axis=axis, color=GRID, lw=1)


def _cr_axis(ax: Axes, highest: float) -> None:
    ax.set_xscale("log", base=2)
    ticks = [cr for cr in (1, 2, 3, 4, 6, 8, 12, 16) if cr <= 1.3 * highest]
    ax.xaxis.set_major_locator(FixedLocator(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}x"))


def _family_points(data: Data, arms: list[str], which: str) -> list[tuple[float, float, float]]:
    """(CR, perplexity / continued's, its deviation) of the arms that have run."""
    control = mean(values(data, "continued", 256, "perplexity"))
    points = []
    for arm in arms:
        perplexities = values(data, arm, 256, "perplexity")
        if not perplexities or control is None:
            continue
        factor = fewer_heads(data, arm)
        cr = mean(factor * found[which] for found in measured(data, arm, "cache"))
        if cr is None and data["arms"][arm]["arm"].get("policy") == "evict":
            continue  # its decisions say less than its cache holds
        cr = cr or mean(values(data, arm, 256, "cr"))
        assert cr is not None
        points.append((cr, mean(perplexities) / control, deviation(perplexities) / control))
    return points


def quality(data: Data) -> Figure:
    """Perplexity against CR, over time and at the end."""
    if not any(_family_points(data, arms, "mean_cr") for arms, *_ in FAMILIES.values()):
        raise Missing("no compressed arm to compare with `continued`")
    figure, axes = _panels(10, 4.4, 2, sharey=True)
    titles = {"mean_cr": "CR over time: tokens / entries, both summed over the window",
              "final_cr": "CR at the window's end"}  # fmt: skip
    for ax, (which, title) in zip(axes, titles.items(), strict=True):
        highest = 8.0
        for label, (arms, color, marker) in FAMILIES.items():
            if points := _family_points(data, arms, which):
                x, y, error = zip(*points, strict=True)
                ax.errorbar(x, y, error, label=label, color=color, marker=marker, ms=6, lw=1.6,
                            capsize=3)  # fmt: skip
                highest = max(highest, *x)
        for result in measured(data, "continued", "eviction")[:1]:
            plain = result["none"]["perplexity"]
            for policy, (label, color, marker) in EVICTIONS.items():
                rows = sorted((r for r in result.values() if r.get("policy") == policy),
                              key=lambda r: r["budget"], reverse=True)  # fmt: skip
                ax.plot([r[which] for r in rows], [r["perplexity"] / plain for r in rows],
                        label=f"{label}, untrained", color=color, marker=marker, ms=6, lw=1.2,
                        ls=(0, (3, 2)))  # fmt: skip
                highest = max([highest, *(r[which] for r in rows)])
        ax.axhline(1, color=INK, lw=1.2, label="uncompressed, trained on")
        base = mean(r["perplexity"] for r in measured(data, "base", "cache"))
        control = mean(r["perplexity"] for r in measured(data, "continued", "cache"))
        if base and control:
            ax.axhline(base / control, color=MUTED, lw=1.2, ls=(0, (1, 2)), label="base model")
        _cr_axis(ax, highest)
        ax.set_xlim(0.93, 1.1 * highest)
        _grid(ax)
        ax.set_xlabel(title)
    axes[0].set_ylabel("held-out perplexity / uncompressed model's")
    axes[0].legend(fontsize=9)
    return figure


def steps(data: Data) -> Figure:
    """Perplexity and CR on the way through training."""
    names = [a for a in ("continued", "dmc-2x", "dmc-4x", "dmc-8x", "gqa-4x", "dms-4x")
             if a in data["arms"]]  # fmt: skip
    if len(names) < 2:
        raise Missing("fewer than two arms of the quality group")
    figure, (left, right) = _panels(10, 4.2, 2)
    for name in names:
        runs = list(data["arms"][name]["runs"].values())
        at = sorted({int(step) for run in runs for step in run["curve"]})
        for ax, key in ((left, "perplexity"), (right, "cr")):
            rows = [
                [run["curve"][str(s)][key] for run in runs if str(s) in run["curve"]] for s in at
            ]
            style = dict(color=COLORS[name], ls=DASHES.get(name, "-"), lw=1.6)
            ax.plot(at, [statistics.mean(r) for r in rows], label=name, marker=".", **style)
            if len(runs) > 1:
                ax.fill_between(at, [min(r) for r in rows], [max(r) for r in rows],
                                color=COLORS[name], alpha=0.15, lw=0)  # fmt: skip
    for ax in (left, right):
        ax.set_xlabel("training steps of 2,048 tokens")
        _grid(ax)
    _cut_beginning(left, data, [a for a in names if not a.startswith("gqa")])
    left.set_ylabel("held-out perplexity, 64 windows")
    right.set_ylabel("CR: tokens / entries")
    left.legend(fontsize=9)
    return figure


def distance(data: Data) -> Figure:
    """Perplexity against the control's after as many steps of the same schedule: short and three times as long."""
    pairs = [("dmc-4x", "continued", "620 steps", BLUE, "-"),
             ("long-dmc-4x", "long-continued", "1860 steps", BLUE, (0, (4, 2))),
             ("gqa-4x", "continued", "620 steps", ORANGE, "-")]  # fmt: skip
    pairs = [pair for pair in pairs if {pair[0], pair[1]} <= set(data["arms"])]
    if not any(arm == "long-dmc-4x" for arm, *_ in pairs):
        raise Missing("`long-dmc-4x` and `long-continued`")
    figure, (ax,) = _panels(6.5, 4, 1)
    for arm, control, label, color, dashes in pairs:
        runs, plain = (list(data["arms"][name]["runs"].values()) for name in (arm, control))
        at = [
            s
            for s in map(int, runs[0]["curve"])
            if s > 20 and all(str(s) in r["curve"] for r in plain)
        ]
        ratios = [statistics.mean(r["curve"][str(s)]["perplexity"] for r in runs)
                  / statistics.mean(r["curve"][str(s)]["perplexity"] for r in plain) for s in at]  # fmt: skip
        name = arm.removeprefix("long-")
        ax.plot(at, ratios, color=color, ls=dashes, marker=".", lw=1.6, label=f"{name}, {label}")
    ax.axhline(1, color=INK, lw=1.2)
    ax.set_xlabel("training steps of 2,048 tokens")
    ax.set_ylabel("perplexity / control's after as many steps")
    _grid(ax)
    ax.legend(fontsize=9)
    return figure


def _cut_beginning(ax: Axes, data: Data, names: list[str]) -> None:
    """The axis ends above the curves of these arms; a curve that begins higher is named with its value."""
    points = [point["perplexity"] for name in names for run in data["arms"][name]["runs"].values()
              for point in run["curve"].values()]  # fmt: skip
    spare = 0.12 * (max(points) - min(points))
    high = [f"{line.get_label()} begins at {max(line.get_ydata()):.0f}" for line in ax.lines
            if max(line.get_ydata()) > max(points) + spare]  # fmt: skip
    if high:
        ax.set_ylim(min(points) - spare, max(points) + spare)
        ax.annotate(
            ", ".join(high), (0.98, 0.03), xycoords="axes fraction", color=MUTED, ha="right"
        )


def heads(data: Data) -> Figure:
    """CR of every layer and head."""
    names = [a for a in ("dmc-4x", "dmc-8x", "dms-4x", "dmc-c-4x") if a in data["arms"]]
    maps = {a: data["arms"][a]["runs"][min(data["arms"][a]["runs"])].get("heads") for a in names}
    maps = {name: rows for name, rows in maps.items() if rows}
    if not maps:
        raise Missing("no DMC arm of the quality group")
    figure, axes = _panels(1 + 3.4 * len(maps), 2.6, len(maps))
    top = max(cr for rows in maps.values() for row in rows for cr in row)
    for ax, (name, rows) in zip(axes, maps.items(), strict=True):
        shades = [[math.log(max(cr, 1.0)) / math.log(max(top, 1.01)) for cr in row] for row in rows]
        ax.imshow(shades, cmap=HEAT, vmin=0, vmax=1, aspect="auto")
        for layer, row in enumerate(rows):
            for head, cr in enumerate(row):
                dark = shades[layer][head] > 0.55
                ax.text(head, layer, f"{cr:.1f}" if cr < 100 else f"{cr:.0f}", ha="center",
                        va="center", size=8, color="#ffffff" if dark else INK)  # fmt: skip
        ax.set_title(name, size=11)
        ax.set(xticks=range(len(rows[0])), yticks=range(len(rows)), xlabel="KV head")
        for spine in ax.spines.values():
            spine.set_visible(False)
    axes[0].set_ylabel("layer")
    figure.supxlabel(
        "CR of every layer and KV head; 256: one entry for a whole window", size=10, color=MUTED
    )
    return figure


def tokens(data: Data) -> Figure:
    """Merge rate by class of token and by place in a word."""
    arm = "dmc-4x"
    found = measured(data, arm, "kinds")
    if not found:
        raise Missing(f"{arm} has no `kinds`")
    figure = Figure(figsize=(10, 4), facecolor="#ffffff", layout="constrained")
    parts = {part: [n for n, row in found[0][part].items() if "merge_rate" in row]
             for part in ("classes", "places")}  # fmt: skip
    axes = figure.subplots(1, 2, width_ratios=[len(n) for n in parts.values()], sharey=True)
    for ax, (part, names) in zip(axes, parts.items(), strict=True):
        names.sort(key=lambda n, part=part: -found[0][part][n]["merge_rate"])
        rates = [[f[part][name]["merge_rate"] for f in found] for name in names]
        ax.bar(range(len(names)), [statistics.mean(r) for r in rates], width=0.6, color="#c9dfee",
               yerr=[deviation(r) for r in rates] if len(found) > 1 else None)  # fmt: skip
        for i, name in enumerate(names):
            for layer, rate in enumerate(found[0][part][name]["merge_rate_L"]):
                shade = HEAT(
                    0.35 + 0.65 * layer / max(1, len(found[0][part][name]["merge_rate_L"]) - 1)
                )
                ax.plot(i - 0.21 + 0.14 * layer, rate, "o", ms=5, color=shade, clip_on=False,
                        label=f"layer {layer}" if i == 0 and part == "classes" else None)  # fmt: skip
        ax.set_xticks(range(len(names)), names, rotation=20 if part == "classes" else 0)
        ax.set_ylim(0, 1.13)
        _grid(ax)
    axes[0].set_ylabel("merge rate: share of tokens merged")
    axes[0].set_xlabel(f"class of token ({arm}; bar: all layers)")
    axes[1].set_xlabel("place in a word")
    axes[0].legend(fontsize=9, ncols=4, loc="upper center")
    return figure


def sample(data: Data) -> Figure:
    """A text, each token shaded by the share of heads that merge it, its segments in one head marked."""
    found = measured(data, "dmc-4x", "sample")
    if not found:
        raise Missing("dmc-4x has no `sample`")
    text = found[0]
    lowest, highest = min(text["merge_share"][1:]), max(text["merge_share"])
    places, line, column = [], 0, 0
    for token, share, start in zip(
        text["tokens"], text["merge_share"], text["starts"], strict=True
    ):
        for i, part in enumerate(token.expandtabs(4).split("\n")):
            if i:
                line, column = line + 1, 0
            places.append((line, column, part, share, start and i == 0, "\n" in token and i == 0))
            column += len(part)
    width = max(76, *(column + len(part) + 2 for _, column, part, *_ in places))
    advance, pitch = 0.602 * 10.5, 17.0
    size = ((width * advance + 20) / 72, ((line + 1) * pitch + 52) / 72)
    figure = Figure(figsize=size, facecolor="#ffffff")
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, size[0] * 72), ylim=(size[1] * 72, 0))
    ax.axis("off")
    layer, head = text["layer_head"]
    ax.text(10, 14, "shade: share of all heads that merge the token into the entry before it, "
            f"{lowest:.0%} (white) to {highest:.0%}",
            size=10, color=MUTED, va="center")  # fmt: skip
    ax.text(10, 30, f"bar: layer {layer}, head {head} starts a new entry", size=10, color=BLUE,
            va="center")  # fmt: skip
    for row, column, part, share, start, ends_line in places:
        x, y = 10 + column * advance, 44 + row * pitch
        shown = part + ("\u21b5" if ends_line else "")
        if not shown:
            continue
        ax.add_patch(
            Rectangle(
                (x, y),
                len(shown) * advance,
                pitch - 3,
                color=WARM((share - lowest) / max(highest - lowest, 1e-9)),
                lw=0,
            )
        )
        if start:
            ax.add_patch(Rectangle((x - 0.6, y), 1.6, pitch - 3, color=BLUE, lw=0, zorder=3))
        # one text element for each character: another font must not shift the line
        for i, character in enumerate(shown):
            if not character.isspace():
                ax.text(x + (i + 0.5) * advance, y + pitch / 2 - 1, character, size=10.5,
                        family="DejaVu Sans Mono", va="center_baseline", ha="center",
                        color=MUTED if character == "\u21b5" else INK)  # fmt: skip
    return figure


def length(data: Data) -> Figure:
    """Trained on one length, tested on others, against the same without compression."""
    names = group(data, "length")
    control = "length-continued"
    if control not in names or len(names) < 2:
        raise Missing("the arms of the group `length`")
    figure, (left, right) = _panels(9, 3.8, 2)
    tested = sorted(
        map(int, data["arms"][control]["runs"][min(data["arms"][control]["runs"])]["lengths"])
    )
    at = range(len(tested))
    for name in arm_order(data, names):
        color = INK if name == control else BLUE
        plain = [mean(values(data, control, n, "perplexity")) for n in tested]
        found = [values(data, name, n, "perplexity") for n in tested]
        left.errorbar(at, [statistics.mean(f) / p for f, p in zip(found, plain, strict=True)],
                      [deviation(f) / p for f, p in zip(found, plain, strict=True)], label=name,
                      color=color, marker="o", capsize=3)  # fmt: skip
        right.plot(at, [mean(values(data, name, n, "cr")) for n in tested], color=color, marker="o")
    for ax in (left, right):
        ax.set_xticks(at, [f"{n}" for n in tested])
        ax.set_xlabel("tokens of a test window (trained on 128)")
        _grid(ax)
    left.set_ylabel(f"perplexity / {control}'s")
    right.set_ylabel("CR: tokens / entries")
    left.legend(fontsize=9, loc="center")
    return figure


def kinds(data: Data) -> Figure:
    """CR and relative perplexity by kind of text."""
    names = [
        a for a in ("dmc-2x", "dmc-4x", "dmc-8x", "gqa-4x", "dms-4x") if measured(data, a, "kinds")
    ]
    control = measured(data, "continued", "kinds")
    if not control or not names:
        raise Missing("`kinds` of `continued` and of a compressed arm")
    rows = list(control[0]["kinds"])
    figure, (left, right) = _panels(10, 0.45 * len(rows) + 1.4, 2, sharey=True)
    markers = {arm: marker for arms, _, marker in FAMILIES.values() for arm in arms}
    fills = {"dmc-2x": "#ffffff", "dmc-8x": "#08407a"}
    for name in names:
        found = measured(data, name, "kinds")
        style = dict(marker=markers[name], ms=7, ls="none", color=COLORS[name],
                     markerfacecolor=fills.get(name, COLORS[name]), label=name, capsize=3)  # fmt: skip
        crs = [[f["kinds"][kind]["measured_cr"] for f in found] for kind in rows]
        if data["arms"][name]["arm"]["kind"] == "dmc":
            left.errorbar([statistics.mean(c) for c in crs], range(len(rows)),
                          xerr=[deviation(c) for c in crs], **style)  # fmt: skip
        plain = [mean(c["kinds"][kind]["perplexity"] for c in control) for kind in rows]
        ratios = [[f["kinds"][kind]["perplexity"] / p for f in found]
                  for kind, p in zip(rows, plain, strict=True)]  # fmt: skip
        right.errorbar([statistics.mean(r) for r in ratios], range(len(rows)),
                       xerr=[deviation(r) for r in ratios], **style)  # fmt: skip
    left.set_yticks(range(len(rows)), rows)
    left.invert_yaxis()
    left.set_xlabel("CR of the decisions: tokens / entries")
    right.set_xlabel("perplexity / uncompressed model's on the same text")
    right.axvline(1, color=INK, lw=1.2)
    for ax in (left, right):
        _grid(ax, "both")
    left.set_xlim(1, 1.06 * left.get_xlim()[1])
    figure.legend(*right.get_legend_handles_labels(), loc="outside upper right", ncols=len(names),
                  fontsize=9)  # fmt: skip
    return figure


def ablations(data: Data) -> Figure:
    """Each one change from the control."""
    control = control_of(data, "ablation")
    names = [a for a in group(data, "ablation") if a != control]
    if control not in data["arms"] or not names:
        raise Missing("`ablation-control` and another arm of the group")
    names = [control, *sorted(names)]
    figure, axes = _panels(10, 0.32 * len(names) + 1.2, 2, sharey=True)
    for ax, key, label in ((axes[0], "perplexity", "held-out perplexity"),
                           (axes[1], "cr", "CR: tokens / entries")):  # fmt: skip
        own = values(data, control, 256, key)
        middle, spread = statistics.mean(own), deviation(own)
        ax.axvspan(middle - spread, middle + spread, color="#c9dfee", lw=0)
        ax.axvline(middle, color=BLUE, lw=1)
        for i, name in enumerate(names):
            found = values(data, name, 256, key)
            ax.plot(found, [i] * len(found), "o", ms=6, color=BLUE if name == control else ORANGE)
        ax.set_xlabel(label + " (band: control, ± 1 sd)")
        _grid(ax, "both")
    axes[0].set_yticks(range(len(names)), [name.removeprefix("ablation-") for name in names])
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def copying(data: Data) -> Figure:
    """Accuracy in a string's second occurrence, by distance."""
    names = [a for a in ("base", "continued", *(a for arms, *_ in FAMILIES.values() for a in arms))
             if measured(data, a, "copying")]  # fmt: skip
    if len(names) < 2:
        raise Missing("`copying` of two models")
    figure, axes = _panels(10, 4.2, 2)
    markers = {arm: marker for arms, _, marker in FAMILIES.values() for arm in arms}
    titles = {"name": "a random name", "code": "16 tokens of other code"}
    for ax, (variant, title) in zip(axes, titles.items(), strict=True):

        def line(result: dict, ax: Axes = ax, variant: str = variant, **style: Any) -> None:
            rows = {int(d): row for d, row in result[variant].items() if d != "none"}
            ax.errorbar(list(rows), [r["accuracy"] for r in rows.values()],
                        [r["standard_error"] for r in rows.values()], capsize=2, lw=1.4, **style)  # fmt: skip

        for name in names:
            result = measured(data, name, "copying")[0]
            line(result, label=name, color=COLORS[name], ls=DASHES.get(name, "-"),
                 marker=markers.get(name, "."))  # fmt: skip
            if name == "continued":
                evicted = (measured(data, name, "copying-evicted") or [{}])[0]
                for policy, (label, color, marker) in EVICTIONS.items():
                    if policy in evicted:
                        line(evicted[policy], label=f"{label}, CR 4 over time", color=color,
                             marker=marker, ls=(0, (3, 2)))  # fmt: skip
                chance = result[variant]["none"]["accuracy"]
                ax.axhline(chance, color=MUTED, lw=1, ls=(0, (1, 2)))
                ax.annotate("nothing to copy", (1, chance), (-2, 3), textcoords="offset points",
                            xycoords=("axes fraction", "data"), ha="right", color=MUTED)  # fmt: skip
        ax.set_title(f"second occurrence of {title}", size=11)
        ax.set_xlabel("distance to the first occurrence, tokens")
        ax.set_ylim(bottom=0)
        _grid(ax)
    axes[0].set_ylabel("accuracy of the next token (± standard error)")
    axes[1].legend(fontsize=8)
    return figure


FIGURES: dict[str, Callable[[Data], Figure]] = {
    "quality": quality, "steps": steps, "distance": distance, "heads": heads, "tokens": tokens, "sample": sample,
    "length": length, "kinds": kinds, "ablations": ablations, "copying": copying,
}  # fmt: skip


def draw(data: Data, folder: Path, names: list[str]) -> list[str]:
    """Write results-NAME.svg for each that can be drawn; returns why the others cannot."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    skipped = []
    for name in names:
        with styled(10), matplotlib.rc_context({"xtick.labelcolor": INK, "axes.labelcolor": INK}):
            try:
                figure = FIGURES[name](data)
            except Missing as reason:
                skipped.append(f"{name}: not drawn, missing: {reason}")
                continue
            figure.savefig(folder / f"results-{name}.svg", metadata={"Date": None, "Creator": None})
    return skipped


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--from", dest="source", type=Path,
                        default=ROOT / "docs" / "results" / "metrics.json")  # fmt: skip
    parser.add_argument("--to", type=Path, default=ROOT / "docs" / "pictures")
    parser.add_argument("--figure", nargs="+", choices=FIGURES, help="default: all")
    args = parser.parse_args()
    if not args.source.is_file():
        sys.exit(f"{args.source}: no such file; write it with examples/experiments/results.py --to")
    skipped = draw(load(args.source), args.to, args.figure or list(FIGURES))
    print(*skipped, sep="\n")


if __name__ == "__main__":
    main()
