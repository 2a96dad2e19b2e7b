"""Colours, markers and axes shared by the figures of docs/results.md."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_dmc.plotting import BLUE, GREEN, GRID, INK, MUTED, ORANGE

SKY, PINK, GOLD, NAVY, TEAL = "#56b4e9", "#cc79a7", "#e69f00", "#17375e", "#7fbf7b"
FAMILIES = {
    "DMC": (["dmc-2x", "dmc-4x", "dmc-8x"], BLUE, "o"),
    "DMC, delay 4": ([f"delay-4-dmc-{x}x" for x in (2, 4, 8, 16)], NAVY, "p"),
    "DMC, delay 16": ([f"delay-16-dmc-{x}x" for x in (2, 4, 8, 16)], NAVY, "*"),
    "DMC-C": (["dmc-c-4x"], SKY, "D"),
    "GQA": (["gqa-2x", "gqa-4x"], ORANGE, "s"),
    "DMS, delay 4": ([f"delay-4-dms-{x}x" for x in (2, 4, 8, 16)], TEAL, "<"),
    "DMS, delay 16": (["delay-16-dms-2x", "dms-4x", "dms-8x", "delay-16-dms-16x"], GREEN, "^"),
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


class Missing(Exception):
    """The runs of a figure are not there."""


def panels(width: float, height: float, count: int, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), facecolor="#ffffff", layout="constrained")
    axes = figure.subplots(1, count, squeeze=False, **kwargs)[0]
    return figure, list(axes)


def grid(ax: Axes, axis: str = "y") -> None:
    ax.grid(axis=axis, color=GRID, lw=1)
