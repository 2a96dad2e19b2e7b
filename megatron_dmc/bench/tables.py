"""Rows of results as CSV, as Markdown and as curves."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dmc.errors import DMCError

Row = dict[str, Any]


def write_csv(rows: Sequence[Row], path: str | Path) -> None:
    """One line for each row, a column for each key of any of them; what is not a scalar as JSON.

    Raises:
        DMCError: it cannot be written.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    try:
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            for row in rows:
                writer.writerow(
                    {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()}
                )
    except OSError as e:
        raise DMCError(f"--csv {path}: {e.strerror}") from e


def markdown(rows: Sequence[Row], columns: dict[str, str]) -> str:
    """A table.

    Args:
        columns: keys of a row and their titles; what a row lacks shows as a dash.
    """

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, float):
            return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
        return str(value).replace("|", "\\|")

    lines = [list(columns.values()), ["---"] * len(columns)]
    lines += [[cell(row.get(key)) for key in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def curves(
    rows: Sequence[Row], *, x: str, y: str, series: Sequence[str], path: Path, title: str
) -> None:
    """Write a line plot: `y` over `x`, a line for each combination of `series`; none where no line would
    have two points. Rows without `y` are left out.

    Raises:
        DMCError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as e:
        raise DMCError("plots need matplotlib: pip install 'megatron-dmc[report]'") from e
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get(y) is not None and row.get(x) is not None:
            name = ", ".join(f"{key} {row.get(key)}" for key in series)
            lines.setdefault(name, []).append((row[x], row[y]))
    lines = {name: points for name, points in lines.items() if len({x for x, _ in points}) > 1}
    if not lines:
        return
    figure = Figure(figsize=(6.4, 4), layout="constrained", dpi=160)
    ax = figure.subplots()
    for name, points in lines.items():
        ax.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    ax.set(xlabel=x.replace("_", " "), ylabel=y.replace("_", " "), title=title, ylim=(0, None))
    ax.spines[["top", "right"]].set_visible(False)
    if series:
        ax.legend(fontsize=7)
    FigureCanvasAgg(figure).print_png(str(path))
