"""The figures of docs/results.md as SVG, from the file that results.py writes.

    python examples/experiments/plots.py [--from docs/results/metrics.json] [--to docs/pictures] [--figure NAME ...]

A figure whose runs are not in the file is left out, with a line that says so. The background is white, so that a
picture reads the same in a light and in a dark page. Error bars are standard deviations over seeds; without one,
there is one seed.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from megatron_dmc.plotting import (
    BLUE,
    INK,
    MUTED,
    ORANGE,
    styled,
)

from drawing import COLORS, DASHES, EVICTIONS, FAMILIES, Missing, grid, panels
from result_data import (
    Data,
    arm_order,
    cache_crs,
    control_of,
    deviation,
    group,
    load,
    mean,
    measured,
    values,
)
from token_plots import copying, heads, kinds, sample, tokens

ROOT = Path(__file__).resolve().parents[2]


def _family_points(data: Data, arms: list[str], length: int) -> list[tuple[float, float, float]]:
    """(CR over time, perplexity / continued's, its deviation) of the arms that have run."""
    control = mean(values(data, "continued", length, "perplexity"))
    points = []
    for arm in arms:
        perplexities, crs = values(data, arm, length, "perplexity"), cache_crs(data, arm, length)
        if perplexities and crs and control is not None:
            points.append(
                (mean(crs), mean(perplexities) / control, deviation(perplexities) / control)
            )
    return points


def _evicted_points(data: Data, policy: str, length: int) -> list[tuple[float, float]]:
    """(CR over time, perplexity / that of the same model with its whole cache), means over seeds."""
    found = measured(data, "continued", "eviction") if length == 256 else (
        measured(data, "base", f"eviction-{length}")
    )  # fmt: skip
    rows: dict[float, list[float]] = {}
    for result in found:
        for row in result.values():
            if row.get("policy") == policy:
                relative = row["perplexity"] / result["none"]["perplexity"]
                rows.setdefault(row["mean_cr"], []).append(relative)
    return [(cr, statistics.mean(rows[cr])) for cr in sorted(rows)]


def quality(data: Data) -> Figure:
    """Perplexity against the memory of the cache, summed over a window's tokens."""
    if not any(_family_points(data, arms, 256) for arms, *_ in FAMILIES.values()):
        raise Missing("no compressed arm to compare with `continued`")
    figure, axes = panels(11, 4.8, 2, sharey=True)
    for ax, length in zip(axes, (256, 512), strict=True):
        for label, (arms, color, marker) in FAMILIES.items():
            if points := _family_points(data, arms, length):
                x, y, error = zip(*points, strict=True)
                ax.errorbar([100 / cr for cr in x], y, error, label=label, color=color,
                            marker=marker, ms=7, lw=1.6, capsize=3)  # fmt: skip
        for policy, (label, color, marker) in EVICTIONS.items():
            if evicted := _evicted_points(data, policy, length):
                x, y = zip(*evicted, strict=True)
                ax.plot([100 / cr for cr in x], y, label=f"{label}, untrained", color=color,
                        marker=marker, ms=6, lw=1.2, ls=(0, (3, 2)))  # fmt: skip
        ax.axhline(1, color=INK, lw=1.2, label="uncompressed, trained on")
        base = mean(r[str(length)]["perplexity"] for r in measured(data, "base", "base"))
        control = mean(values(data, "continued", length, "perplexity"))
        if base and control:
            ax.axhline(base / control, color=MUTED, lw=1.2, ls=(0, (1, 2)), label="base model")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_locator(FixedLocator([6.25, 12.5, 25, 50, 100]))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g} %"))
        ax.invert_xaxis()
        grid(ax)
        ax.set_title(f"windows of {length} tokens")
        ax.set_xlabel("cache bytes over time / uncompressed (CR 4 is 25 %)")
    axes[0].set_ylabel("held-out perplexity / uncompressed model's")
    axes[0].set_ylim(0.985, 1.2)  # the untrained policies' far ends would flatten everything else
    axes[0].legend(fontsize=9)
    return figure


def steps(data: Data) -> Figure:
    """Perplexity and CR on the way through training."""
    names = [a for a in ("continued", "dmc-2x", "dmc-4x", "dmc-8x", "gqa-4x", "dms-4x")
             if a in data["arms"]]  # fmt: skip
    if len(names) < 2:
        raise Missing("fewer than two arms of the quality group")
    figure, (left, right) = panels(10, 4.2, 2)
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
        grid(ax)
    _cut_beginning(left, data, [a for a in names if not a.startswith("gqa")])
    left.set_ylabel("held-out perplexity, 64 windows")
    right.set_ylabel("CR: tokens / entries")
    left.legend(fontsize=9)
    return figure


def distance(data: Data) -> Figure:
    """Perplexity against the control's after as many steps of the same schedule: short, and three and ten times as
    long."""
    pairs = [("dmc-4x", "continued", "620 steps", BLUE, "-"),
             ("long-dmc-4x", "long-continued", "1860 steps", BLUE, (0, (4, 2))),
             ("tenfold-dmc-4x", "tenfold-continued", "6200 steps", BLUE, (0, (1, 1))),
             ("gqa-4x", "continued", "620 steps", ORANGE, "-")]  # fmt: skip
    pairs = [pair for pair in pairs if {pair[0], pair[1]} <= set(data["arms"])]
    if not any(arm == "long-dmc-4x" for arm, *_ in pairs):
        raise Missing("`long-dmc-4x` and `long-continued`")
    figure, (ax,) = panels(6.5, 4, 1)
    for arm, control, label, color, dashes in pairs:
        runs, plain = (list(data["arms"][name]["runs"].values()) for name in (arm, control))
        at = [
            s
            for s in map(int, runs[0]["curve"])
            if s > 20 and all(str(s) in r["curve"] for r in plain)
        ]
        ratios = [statistics.mean(r["curve"][str(s)]["perplexity"] for r in runs)
                  / statistics.mean(r["curve"][str(s)]["perplexity"] for r in plain) for s in at]  # fmt: skip
        name = arm.removeprefix("long-").removeprefix("tenfold-")
        ax.plot(at, ratios, color=color, ls=dashes, marker=".", lw=1.6, label=f"{name}, {label}")
    ax.axhline(1, color=INK, lw=1.2)
    ax.set_xscale("log")
    ax.set_xticks([100, 300, 1000, 3000], ["100", "300", "1,000", "3,000"])
    ax.minorticks_off()
    ax.set_xlabel("training steps of 2,048 tokens")
    ax.set_ylabel("perplexity / control's after as many steps")
    grid(ax)
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


def length(data: Data) -> Figure:
    """Trained on one length, tested on others, against the same without compression."""
    names = group(data, "length")
    control = "length-continued"
    if control not in names or len(names) < 2:
        raise Missing("the arms of the group `length`")
    figure, (left, right) = panels(9, 3.8, 2)
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
        grid(ax)
    left.set_ylabel(f"perplexity / {control}'s")
    right.set_ylabel("CR: tokens / entries")
    left.legend(fontsize=9, loc="center")
    return figure


def ablations(data: Data) -> Figure:
    """Each one change from the control."""
    control = control_of(data, "ablation")
    names = [a for a in group(data, "ablation") if a != control]
    if control not in data["arms"] or not names:
        raise Missing("`ablation-control` and another arm of the group")
    names = [control, *sorted(names)]
    figure, axes = panels(10, 0.32 * len(names) + 1.2, 2, sharey=True)
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
        grid(ax, "both")
    axes[0].set_yticks(range(len(names)), [name.removeprefix("ablation-") for name in names])
    axes[0].set_ylim(len(names) - 0.5, -0.5)
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
