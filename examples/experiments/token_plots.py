"""Figures of docs/results.md by layer and head, token, kind of text, and distance."""

import math
import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from megatron_dmc.plotting import BLUE, HEAT, INK, MUTED, heat_text_colour, hide_spines

from drawing import COLORS, DASHES, EVICTIONS, FAMILIES, Missing, grid, panels
from result_data import Data, deviation, mean, measured

WARM = LinearSegmentedColormap.from_list("merge", ["#ffffff", "#f6c89f", "#d9772b"])


def heads(data: Data) -> Figure:
    """CR of every layer and head."""
    names = [a for a in ("dmc-4x", "dmc-8x", "dms-4x", "dmc-c-4x") if a in data["arms"]]
    maps = {a: data["arms"][a]["runs"][min(data["arms"][a]["runs"])].get("heads") for a in names}
    maps = {name: rows for name, rows in maps.items() if rows}
    if not maps:
        raise Missing("no DMC arm of the quality group")
    figure, axes = panels(1 + 3.4 * len(maps), 2.6, len(maps))
    top = max(cr for rows in maps.values() for row in rows for cr in row)
    for ax, (name, rows) in zip(axes, maps.items(), strict=True):
        shades = [[math.log(max(cr, 1.0)) / math.log(max(top, 1.01)) for cr in row] for row in rows]
        ax.imshow(shades, cmap=HEAT, vmin=0, vmax=1, aspect="auto")
        for layer, row in enumerate(rows):
            for head, cr in enumerate(row):
                ax.text(head, layer, f"{cr:.1f}" if cr < 100 else f"{cr:.0f}", ha="center",
                        va="center", size=8, color=heat_text_colour(shades[layer][head]))  # fmt: skip
        ax.set_title(name, size=11)
        ax.set(xticks=range(len(rows[0])), yticks=range(len(rows)), xlabel="KV head")
        hide_spines(ax)
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
        grid(ax)
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


def kinds(data: Data) -> Figure:
    """CR and relative perplexity by kind of text."""
    names = [
        a for a in ("dmc-2x", "dmc-4x", "dmc-8x", "gqa-4x", "dms-4x") if measured(data, a, "kinds")
    ]
    control = measured(data, "continued", "kinds")
    if not control or not names:
        raise Missing("`kinds` of `continued` and of a compressed arm")
    rows = list(control[0]["kinds"])
    figure, (left, right) = panels(10, 0.45 * len(rows) + 1.4, 2, sharey=True)
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
        grid(ax, "both")
    left.set_xlim(1, 1.06 * left.get_xlim()[1])
    figure.legend(*right.get_legend_handles_labels(), loc="outside upper right", ncols=len(names),
                  fontsize=9)  # fmt: skip
    return figure


def copying(data: Data) -> Figure:
    """Accuracy in a string's second occurrence, by distance."""
    names = [a for a in ("base", "continued", *(a for arms, *_ in FAMILIES.values() for a in arms))
             if measured(data, a, "copying")]  # fmt: skip
    if len(names) < 2:
        raise Missing("`copying` of two models")
    figure, axes = panels(10, 4.2, 2)
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
        grid(ax)
    axes[0].set_ylabel("accuracy of the next token (± standard error)")
    axes[1].legend(fontsize=8)
    return figure
