"""The output of a benchmark: rows, tables, plots, and one JSON document as the last line. No torch."""

import csv
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_dmc.errors import DMCError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]


class Case(NamedTuple):
    """A part of a benchmark: `run` gives its rows as they are measured."""

    name: str
    run: Callable[[], Iterable[Row]]


OURS = ("cuda", "triton", "cpu", "DMC", "megatron-dmc")
"""Variants and engines whose bars have a colour."""


class Panel(NamedTuple):
    """Horizontal bars under one title: `column` of each of `rows` that has it, labelled by the columns `labels`."""

    title: str
    unit: str
    rows: Sequence[Row]
    column: str
    labels: Sequence[str]

    def bars(self) -> list[tuple[str, float, bool]]:
        """Label, value, and whether it has a colour."""

        def label(row: Row) -> str:
            shown = {key: row[key] for key in self.labels if row.get(key) is not None}
            return " ".join(f"{key.replace('_', ' ')} {value}" for key, value in shown.items())

        return [
            (label(row), row[self.column], row.get("variant", row.get("engine")) in OURS)
            for row in self.rows
            if row.get(self.column) is not None
        ]


@dataclass(frozen=True)
class Curves:
    """A plot of `y` over `x`, two columns of `rows`: a line for each combination of the columns `series`."""

    rows: Sequence[Row]
    x: str
    y: str
    series: Sequence[str]
    title: str

    def lines(self) -> dict[str, list[tuple[float, float]]]:
        """The points of each line; empty where no line has two. Rows without x or y are left out."""
        found: dict[str, list[tuple[float, float]]] = {}
        for row in self.rows:
            if row.get(self.y) is not None and row.get(self.x) is not None:
                name = ", ".join(f"{key} {row.get(key)}" for key in self.series)
                found.setdefault(name, []).append((row[self.x], row[self.y]))
        return {name: points for name, points in found.items() if len({x for x, _ in points}) > 1}


@dataclass
class Result:
    """The return value of a benchmark's `run`; `finish` writes and prints it.

    Attributes:
        document: of plain numbers and texts, with the keys `benchmark` and `note`.
        folder: where the document, the CSV and the plots go; None: nowhere.
        panels: a plot of bars, named as the benchmark.
        curves: plots of lines, by file name.
        figures: what draws other plots, by file name.
        csv: rows that are also written as `BENCHMARK.csv`.
    """

    document: Row
    folder: Path | None = None
    panels: list[Panel] = field(default_factory=list)
    curves: dict[str, Curves] = field(default_factory=dict)
    figures: dict[str, Callable[[], "Figure"]] = field(default_factory=dict)
    csv: Sequence[Row] = ()
    exit_code: int = 0

    def write(self) -> None:
        """Write what belongs into the folder.

        Raises:
            DMCError: a file cannot be written, or matplotlib is not installed.
        """
        if self.folder is None:
            return
        name = self.document["benchmark"]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{name}.json").write_text(json.dumps(self.document) + "\n")
        if self.csv:
            write_csv(self.csv, self.folder / f"{name}.csv")
        drawn = {file: (c, lines) for file, c in self.curves.items() if (lines := c.lines())}
        panels = [(p.title, p.unit, bars) for p in self.panels if (bars := p.bars())]
        if not panels and not drawn and not self.figures:
            return
        try:
            from megatron_dmc import plotting
        except ModuleNotFoundError as e:
            raise DMCError(
                "--output draws with matplotlib: pip install 'megatron-dmc[report]'"
            ) from e
        if panels:
            plotting.save(plotting.bar_panels(panels), self.folder / name)
        for file, (c, lines) in drawn.items():
            x, y = (key.replace("_", " ") for key in (c.x, c.y))
            plotting.save(plotting.lines(lines, x=x, y=y, title=c.title), self.folder / file)
        for file, draw in self.figures.items():
            plotting.save(draw(), self.folder / file)


def finish(result: Result) -> int:
    """Write the result's files and print its document on one line, the last one; returns the exit code."""
    result.write()
    if result.document.get("note"):
        print(result.document["note"], file=sys.stderr)
    print(json.dumps(result.document), flush=True)
    return result.exit_code


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
