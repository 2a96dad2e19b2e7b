"""The report's figures: inline SVG for the page and one PNG for the README.

Dimension letters: L layers, G key/value heads of a layer, T tokens of the sample text.
"""

import io
import itertools
import math
import os
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from megatron_dmc.plotting import (
    BLUE,
    GREEN,
    GRID,
    HEAT,
    INK,
    MUTED,
    ORANGE,
    PALE,
    heat_text_colour,
    hide_spines,
    styled,
)
from megatron_dmc.quality.report.data import ReportData, write_atomically
from megatron_dmc.quality.report.svg import new_figure, to_svg
from megatron_dmc.quality.report.text_layout import ADVANCE, PITCH, chars_of_line, fit

# --- figures for the page -----------------------------------------------------------------------


def training_curves(data: ReportData, *, width: int = 960) -> str:
    """Loss, CR and compression loss over the stages, one above the other on one step axis."""
    heights = [250, 200] if _has_cr(data) else [250]
    if any(point["compression_loss"] is not None for point in data.curves):
        heights.append(120)
    left, right, bottom = 50, 14, 44
    legend = 0 if width >= 600 else 42  # a narrow figure has it in rows of its own
    above = [74 + legend, 52 + legend, 52][: len(heights)]
    height = sum(above) + sum(heights) + bottom
    with styled(13):
        figure = new_figure(width, height)
        axes, y = [], height
        for panel, space in zip(heights, above, strict=True):
            y -= space
            box = (left / width, (y - panel) / height, (width - left - right) / width)
            axes.append(figure.add_axes((*box, panel / height), sharex=axes[0] if axes else None))
            y -= panel
        _draw_loss(axes[0], data)
        lift = _draw_stages(axes[0], data, 13) + 10
        _panel_title(axes[0], "Loss per token (nats)", lift=lift, rows=legend)
        if len(axes) > 1:
            _draw_cr(axes[1], data)
            _panel_title(axes[1], "Compression ratio", lift=10, rows=legend)
        if len(axes) > 2:
            _draw_compression_loss(axes[2], data)
            _panel_title(axes[2], "Compression loss", lift=10)
        for ax in axes[1:]:
            _draw_boundaries(ax, data)
        for ax in axes[:-1]:
            ax.tick_params(labelbottom=False)
        axes[-1].set_xlabel("training step, all stages")
        return to_svg(figure, f"curves{width}", "Loss and compression ratio during training")


def heat_map(data: ReportData) -> str:
    """CR of every layer and KV head, and of every layer, with the values in the cells."""
    layers, heads = len(data.measured_cr_per_layer_head), len(data.measured_cr_per_layer_head[0])
    cell_width, cell_height = max(34, min(64, 560 // (heads + 1))), 30
    width, height = 70 + int(cell_width * (heads + 1.25)), 52 + cell_height * layers
    with styled(13):
        figure = new_figure(width, height)
        ax = figure.add_axes((62 / width, 44 / height, (width - 70) / width, 1 - 52 / height))
        _draw_heat(ax, data, size=13 if cell_width >= 44 else 11)
        return to_svg(figure, "heat", "Compression ratio of every layer and key/value head")


def perplexity_bars(data: ReportData) -> str:
    """Perplexity on held-out text: base, base trained on (if measured), DMC."""
    rows = [("base model", data.base_perplexity, PALE)]
    if data.base_continued_perplexity is not None:
        rows.append(("base, trained on", data.base_continued_perplexity, PALE))
    rows.append(("DMC model", data.dmc_perplexity, BLUE))
    labels = [f"{value:.3f}  ({value / data.base_perplexity:.3f}x)" for _, value, _ in rows]
    return _bars(rows, labels, "perplexity", "Perplexity on held-out text")


def cache_bars(data: ReportData) -> str | None:
    """Bytes of the cache without and with DMC; None where they were not measured."""
    if data.cache_ratio is None:
        return None
    rows = [("uncompressed", float(data.cache_bytes_uncompressed), PALE),
            ("DMC", float(data.cache_bytes), BLUE)]  # fmt: skip
    labels = [human_bytes(int(value)) for _, value, _ in rows]
    return _bars(rows, labels, "cache", "Bytes of the KV cache")


def speed_bars(data: ReportData) -> str | None:
    """Tokens per second of both models; None unless both were measured."""
    if data.tokens_per_second is None or data.tokens_per_second_base is None:
        return None
    rows = [("base model", data.tokens_per_second_base, PALE),
            ("DMC model", data.tokens_per_second, BLUE)]  # fmt: skip
    return _bars(rows, [f"{value:,.1f} / s" for _, value, _ in rows], "speed", "Generation speed")


def human_bytes(count: int) -> str:
    """1289748 -> '1.23 MiB'."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{count} B" if units[0] == "B" else f"{value:.2f} {units[0]}"


def verdict(data: ReportData) -> str:
    """The result in one sentence."""
    perplexity = f"{data.perplexity_ratio:.2f}x the perplexity"
    if data.measured_cr < 1.005:
        return f"The KV cache is not smaller, at {perplexity}"
    if data.settings.get("merge_delay"):  # raw tokens take slots besides
        return f"{data.measured_cr:.1f} tokens share a cache entry at {perplexity}"
    return f"The KV cache is {data.measured_cr:.1f}x smaller at {perplexity}"


# --- the picture for the README -----------------------------------------------------------------


def picture(data: ReportData, path_png: str | os.PathLike) -> None:
    """A 1600x900 PNG: curves, heat map, and where entries start in the sample text."""
    with styled(20):
        figure = Figure(figsize=(16, 9), dpi=100, facecolor="#ffffff")
        # points are 1/72 inch and the figure has 100 pixels per inch; sizes here are in pixels
        with matplotlib.rc_context({"font.size": 20 * 0.72}):
            figure.text(0.035, 0.94, verdict(data), size=38 * 0.72, weight="bold", va="center")
            figure.text(0.035, 0.888, f"{data.model_name}, measured on held-out text",
                        size=22 * 0.72, color=MUTED, va="center")  # fmt: skip
            loss, cr = figure.add_axes((0.07, 0.485, 0.265, 0.235)), None
            _draw_loss(loss, data)
            lift = _draw_stages(loss, data, 17, scale=0.72)
            _panel_title(loss, "Loss per token", lift=lift + 6, rows=40)
            if _has_cr(data):
                cr = figure.add_axes((0.4, 0.485, 0.265, 0.235))
                _draw_cr(cr, data)
                lift = _draw_stages(cr, data, 17, scale=0.72)
                _panel_title(cr, "Compression ratio", lift=lift + 6, rows=40)
            heat = figure.add_axes((0.735, 0.485, 0.23, 0.315))
            _draw_heat(heat, data, size=19 * 0.72)
            _panel_title(heat, "Compression ratio per head", lift=8)
            if data.sample is not None:
                _draw_segments(figure, data)
        canvas, buffer = FigureCanvasAgg(figure), io.BytesIO()
        canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    # few colours are used: a palette makes the file several times smaller
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    write_atomically(path_png, buffer.getvalue())


def _draw_segments(figure: Figure, data: ReportData) -> None:
    """The sample text in columns; shading alternates by segment, a bar marks a segment's start."""
    layer, head = data.sample["layer_head"]
    starts = data.sample["starts"][layer][head]
    figure.text(0.035, 0.372, "Where the model starts a new cache entry", weight="bold",
                size=20 * 0.72)  # fmt: skip
    figure.text(0.965, 0.372, f"layer {layer}, KV head {head}; one shade = tokens merged into one "
                "entry", size=19 * 0.72, color=MUTED, ha="right")  # fmt: skip
    width, height = 0.93 * 1600, 0.32 * 900
    size, columns, pieces = fit(data.sample["tokens"], starts, width, height)
    pitch, advance = size * PITCH, size * ADVANCE
    rows, chars = int(height // pitch), chars_of_line(width, size, columns)
    ax = figure.add_axes((0.035, 0.025, 0.93, 0.32))
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.axis("off")
    for text, segment, is_start, line, place in pieces:
        column, row = divmod(line, rows)
        if column >= columns:
            break
        x = column * (chars + 3) * advance + place * advance + 2
        y = row * pitch
        shade = "#d8eaf5" if segment % 2 else "#fbe3cf"
        ax.add_patch(Rectangle((x, y), len(text) * advance, pitch - 3, color=shade, lw=0))
        if is_start:
            ax.add_patch(Rectangle((x - 1, y), 3, pitch - 3, color=BLUE if segment % 2 else ORANGE,
                                   lw=0, zorder=3))  # fmt: skip
        if text.strip():
            ax.text(x, y + pitch / 2 - 1, text, family="DejaVu Sans Mono", size=size * 0.72,
                    va="center_baseline", color=INK)  # fmt: skip


# --- drawing into axes --------------------------------------------------------------------------


def stage_offsets(data: ReportData) -> dict[str, tuple[int, int]]:
    """First and last step of every stage on the axis that runs through all stages."""
    points = [*data.curves, *data.validation]
    drawn = {point["stage"] for point in points}
    order = [stage for stage in data.steps if stage in drawn]
    order += [s for s in dict.fromkeys(point["stage"] for point in points) if s not in order]
    offsets, offset = {}, 0
    for stage in order:
        seen = max(point["step"] for point in points if point["stage"] == stage)
        last = offset + max(seen, data.steps.get(stage, 0))
        offsets[stage] = (offset, last)
        offset = last
    return offsets


def _series(
    data: ReportData, points: Sequence[dict], key: str
) -> list[tuple[list[int], list[float]]]:
    """One line per stage: steps and values; None breaks the line."""
    lines = []
    for stage, (offset, _) in stage_offsets(data).items():
        own = [p for p in points if p["stage"] == stage and p.get(key) is not None]
        if own:
            lines.append(([offset + p["step"] for p in own], [p[key] for p in own]))
    return lines


def _has_cr(data: ReportData) -> bool:
    return any(point["measured_cr"] is not None for point in [*data.curves, *data.validation])


def _plot(ax: Axes, lines: list[tuple[list, list]], label: str, **style) -> None:
    for i, (x, y) in enumerate(lines):
        ax.plot(x, y, label=label if i == 0 else None, **style)


def _draw_loss(ax: Axes, data: ReportData) -> None:
    _plot(ax, _series(data, data.curves, "lm_loss"), "training", color=BLUE, lw=1.4)
    held_out = _series(data, data.validation, "lm_loss")
    _plot(ax, held_out, "held-out", color=ORANGE, lw=1.6, marker="o", ms=4.5, clip_on=False)
    ax.axhline(math.log(data.base_perplexity), color=MUTED, lw=1.2, ls=(0, (4, 3)), zorder=1,
               label="base model, held-out")  # fmt: skip
    _finish(ax, data)


def _draw_cr(ax: Axes, data: ReportData) -> None:
    per_layer = [p for p in data.curves if p.get("measured_cr_per_layer")]
    for layer in range(max((len(p["measured_cr_per_layer"]) for p in per_layer), default=0)):
        points = [{**p, "layer": p["measured_cr_per_layer"][layer]} for p in per_layer]
        lines = _series(data, points, "layer")
        _plot(ax, lines, "single layers" if layer == 0 else None, color=PALE, lw=0.8, alpha=0.8)
    target = _series(data, data.curves, "target_cr")
    _plot(ax, target, "target", color=MUTED, lw=1.6, ls=(0, (4, 3)))
    _plot(ax, _series(data, data.curves, "measured_cr"), "measured", color=BLUE, lw=1.8)
    held_out = _series(data, data.validation, "measured_cr")
    _plot(ax, held_out, "held-out", color=ORANGE, lw=1.6, marker="o", ms=4.5, clip_on=False)
    _finish(ax, data)
    highest = max((max(p["measured_cr_per_layer"]) for p in per_layer), default=0.0)
    # one layer that keeps almost nothing must not flatten the others
    if highest > 3 * data.target_cr:
        ax.set_yscale("log", base=4)
        ax.yaxis.set_major_locator(LogLocator(base=4, numticks=12))
        ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    ax.set_ylim(bottom=1)


def _draw_compression_loss(ax: Axes, data: ReportData) -> None:
    _plot(ax, _series(data, data.curves, "compression_loss"), None, color=GREEN, lw=1.4)
    _finish(ax, data)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set_ylim(bottom=0)


def _finish(ax: Axes, data: ReportData) -> None:
    ax.grid(axis="y", color=GRID, lw=1)
    ax.yaxis.set_major_locator(MaxNLocator(5))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    spans = list(stage_offsets(data).values())
    ax.set_xlim(0, spans[-1][1] if spans and spans[-1][1] > 0 else 1)


def _draw_boundaries(ax: Axes, data: ReportData) -> None:
    for first, _ in list(stage_offsets(data).values())[1:]:
        ax.axvline(first, color=MUTED, lw=1, alpha=0.55)


def _draw_stages(ax: Axes, data: ReportData, size: float, *, scale: float = 1.0) -> float:
    """Boundaries, and the stages' names above the axes; returns the height taken, in points."""
    _draw_boundaries(ax, data)
    stages = stage_offsets(data)
    points = ax.get_position().width * ax.figure.get_size_inches()[0] * 72
    per_step = points / max(ax.get_xlim()[1], 1)
    # neighbours' names must not touch: half of both names, against the distance of their middles
    half = {name: 0.5 * len(name) * size * scale * 0.62 + 3 for name in stages}
    middle = {name: (a + b) / 2 * per_step for name, (a, b) in stages.items()}
    names = list(stages)
    tight = any(middle[b] - middle[a] < half[a] + half[b] for a, b in itertools.pairwise(names))
    for i, (name, (first, last)) in enumerate(stages.items()):
        lift = 4 + (size * scale * 1.25 if tight and i % 2 else 0)
        ax.annotate(name, ((first + last) / 2, 1), (0, lift), xycoords=("data", "axes fraction"),
                    textcoords="offset points", ha="center", va="bottom", color=MUTED,
                    size=size * scale)  # fmt: skip
    return (4 + size * scale * (2.5 if tight else 1.25)) if stages else 0


def _panel_title(ax: Axes, text: str, *, lift: float, rows: float = 0) -> None:
    """Title and legend above the axes, `lift` points up.

    The legend stands at the title's right, or below the title where `rows` points are kept for it,
    or, where neither has room, within the axes.
    """
    size = matplotlib.rcParams["font.size"]
    ax.annotate(text, (0, 1), (0, lift + rows), xycoords="axes fraction",
                textcoords="offset points", va="bottom", weight="bold")  # fmt: skip
    handles, labels = ax.get_legend_handles_labels()
    if not handles:
        return
    position, inches = ax.get_position(), ax.figure.get_size_inches()
    top = 1 + lift / (position.height * inches[1] * 72)
    needed = sum(len(label) * 0.6 + 4 for label in labels) * size + len(text) * size * 0.7
    if rows:
        place = dict(loc="lower left", bbox_to_anchor=(0, top), ncols=2)
    elif needed <= position.width * inches[0] * 72:
        place = dict(loc="lower right", bbox_to_anchor=(1, top), ncols=len(labels))
    else:
        place = dict(loc="best", frameon=True, facecolor="white", edgecolor="none", borderpad=0.2)
    drawn = ax.legend(handles, labels, fontsize=size * 0.95, **place)
    for entry in drawn.get_texts():
        entry.set_color(INK)


def _draw_heat(ax: Axes, data: ReportData, *, size: float) -> None:
    rows, totals = data.measured_cr_per_layer_head, data.measured_cr_per_layer
    layers, heads = len(rows), len(rows[0])
    top = max(max(map(max, rows)), 1.01)
    pixel_height = ax.get_position().height * ax.figure.get_size_inches()[1] * 72 / layers
    pixel_width = ax.get_position().width * ax.figure.get_size_inches()[0] * 72 / (heads + 1.25)
    values_fit = pixel_height >= size * 1.1 and pixel_width >= size * 2.2

    def cell(x: float, layer: int, cr: float, weight: str) -> None:
        depth = max(0.0, math.log(max(cr, 1.0)) / math.log(top))
        patch = Rectangle((x, layer), 1, 1, facecolor=HEAT(depth), edgecolor="none")
        ax.add_patch(patch)
        if values_fit:
            ax.text(x + 0.5, layer + 0.5, f"{cr:.1f}" if cr >= 100 else f"{cr:.2f}", ha="center",
                    va="center_baseline", color=heat_text_colour(depth), size=size, weight=weight)  # fmt: skip

    for layer, row in enumerate(rows):
        for head, cr in enumerate(row):
            cell(head, layer, cr, "normal")
        cell(heads + 0.25, layer, totals[layer], "bold")
    every = max(1, math.ceil(layers * size * 1.2 / (pixel_height * layers)))
    ax.set_yticks([i + 0.5 for i in range(0, layers, every)], range(0, layers, every))
    ax.set_xticks([*(i + 0.5 for i in range(heads)), heads + 0.75], [*range(heads), "all"])
    ax.set(xlim=(0, heads + 1.25), ylim=(layers, 0), ylabel="layer", xlabel="KV head")
    hide_spines(ax)


def _bars(rows: list[tuple[str, float, str]], labels: list[str], name: str, title: str) -> str:
    width, pitch, left = 440, 34, 124
    height = pitch * len(rows) + 4
    top = max(value for _, value, _ in rows)
    with styled(13):
        figure = new_figure(width, height)
        ax = figure.add_axes((0, 0, 1, 1))
        ax.set(xlim=(0, width), ylim=(height, 0))
        ax.axis("off")
        room = width - left - 8 - max(len(label) for label in labels) * 7.6
        for i, ((text, value, color), label) in enumerate(zip(rows, labels, strict=True)):
            y, length = 2 + i * pitch, max(1.0, room * value / top)
            ax.add_patch(Rectangle((left, y + 5), length, pitch - 10, facecolor=color, lw=0))
            ax.text(left - 10, y + pitch / 2, text, ha="right", va="center_baseline", color=INK)
            ax.text(left + length + 8, y + pitch / 2, label, va="center_baseline", color=INK,
                    weight="bold" if i == len(rows) - 1 else "normal")  # fmt: skip
        return to_svg(figure, name, title)
