"""Figures with matplotlib: colours, style, bars, lines, heat maps, and their files.

Importing this needs matplotlib (`pip install 'megatron-dmc[report]'`). pyplot is not used: nothing global changes.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can distinguish
INK, MUTED, GRID = "#1f2a33", "#5b6873", "#dfe4e8"
BLUE, ORANGE, GREEN, PALE = "#0072b2", "#d55e00", "#009e73", "#9fb4c4"
HEAT = LinearSegmentedColormap.from_list("cr", ["#eef4f8", "#9fcae1", "#2f86bd", "#08407a"])
FONT = "DejaVu Sans"
_STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "megatron-dmc",
    "text.parse_math": False, "font.family": FONT,
    "text.color": INK, "axes.labelcolor": MUTED, "axes.edgecolor": GRID,
    "xtick.color": GRID, "ytick.color": GRID,
    "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "axes.axisbelow": True, "axes.unicode_minus": False,
    "xtick.major.size": 0, "ytick.major.size": 0,
    "legend.frameon": False, "legend.handlelength": 1.6, "legend.columnspacing": 1.6,
    "legend.borderpad": 0, "legend.borderaxespad": 0, "legend.handletextpad": 0.5,
    "lines.solid_capstyle": "round",
}  # fmt: skip


def styled(font_size: float) -> AbstractContextManager[None]:
    """A context in which to draw: this module's colours and fonts, at this size in points."""
    return matplotlib.rc_context({**_STYLE, "font.size": font_size})


type Panel = tuple[str, str, list[tuple[str, float, bool]]]
"""Horizontal bars: title, unit, and of each bar its label, its value and whether it is in colour."""


def bar_panels(panels: Sequence[Panel]) -> Figure:
    """The panels, one below the other."""
    heights = [len(bars) + 1.2 for _, _, bars in panels]
    with styled(8):
        figure = Figure(figsize=(8, 0.32 * sum(heights) + 0.4), layout="constrained")
        axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
        for ax, (title, unit, bars) in zip(axes, panels, strict=True):
            labels, values, coloured = zip(*bars, strict=True)
            colours = [BLUE if own else PALE for own in coloured]
            drawn = ax.barh(range(len(values)), values, color=colours, height=0.7)
            ax.bar_label(drawn, fmt="%.3g", padding=3, color=MUTED)
            ax.set_yticks(range(len(values)), labels)
            ax.set_title(title, fontsize=9, loc="left")
            ax.set_xlabel(unit)
            ax.invert_yaxis()
            ax.margins(x=0.12)
    return figure


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, title: str
) -> Figure:
    """One line for each series of (x, y) points, which are sorted; the y axis starts at 0."""
    with styled(9):
        figure = Figure(figsize=(6.4, 4), layout="constrained")
        ax = figure.subplots()
        for name, points in series.items():
            ax.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
        ax.set(xlabel=x, ylabel=y, title=title, ylim=(0, None))
        ax.grid(axis="y", color=GRID)
        ax.legend(fontsize=7)
    return figure


def heat_text_colour(depth: float) -> str:
    """A colour that can be read on `HEAT(depth)`."""
    return "#ffffff" if depth > 0.55 else "#0b1f33"


def save(figure: Figure, path: str | Path) -> None:
    """Write `path`.svg and `path`.png, whose bytes depend on the figure alone."""
    save_svg(figure, path)
    with styled(9):
        figure.dpi = 160
        FigureCanvasAgg(figure).print_png(f"{path}.png")


def save_svg(figure: Figure, path: str | Path) -> None:
    """Write `path`.svg alone."""
    with styled(9):
        FigureCanvasSVG(figure).print_svg(f"{path}.svg", metadata={"Date": None, "Creator": None})


def hide_spines(ax: Axes) -> None:
    """Remove the axes' frame."""
    for spine in ax.spines.values():
        spine.set_visible(False)
