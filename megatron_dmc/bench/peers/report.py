"""Tables and the figure of the rows that `bench peers` writes."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_dmc.bench.output import Row, markdown
from megatron_dmc.bench.peers.environments import OURS, PEERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CASE = {"shape": "threads, batch x context", "cr": "CR"}


def tables(rows: Sequence[Row]) -> str:
    """Decode, then the time to the first token and memory, in Markdown; a line for each shape and CR. Then the servers,
    a line for each number of requests at a time. Where the cache sets the batch, a shape is its size, and the batch is
    in the cell.

    Of an engine's rows in several dtypes each table has the faster one.
    """
    parts = []
    for title, table in (
        ("Decode, tokens/s:", _decode(rows)),
        ("Seconds to the last request's first token, and peak memory in GiB:", _prefill(rows)),
        (
            "Through the engines' servers: tokens/s, median ms to the first token and between tokens:",
            _servers(rows),
        ),
    ):
        parts += [title, table] if table else []
    for engine, reason in _skipped(rows).items():
        parts.append(f"{engine} is not measured: {reason}.")
    return "\n\n".join(parts)


def _decode(rows: Sequence[Row]) -> str:
    found: list[Row] = []
    for line, measured in _lines([row for row in rows if row.get("decode_tokens_per_s")]):
        best = {
            e: max(same, key=lambda r: r["decode_tokens_per_s"]) for e, same in measured.items()
        }
        rates = {engine: row["decode_tokens_per_s"] for engine, row in best.items()}
        line |= {e: _digits(rate) + _marked(best[e]) for e, rate in rates.items()}
        if OURS in best:
            line |= {f"/ {e}": f"{rates[OURS] / rates[e]:.2f}" for e in rates}
            line["bound"] = _digits(best[OURS]["bound_tokens_per_s"])
        found.append(line)
    ratios = {"/ vllm": "ours / vLLM", "/ transformers": "ours / transformers"}
    return markdown(found, CASE | _titles(rows) | ratios | {"bound": "bound"}) if found else ""


def _prefill(rows: Sequence[Row]) -> str:
    found: list[Row] = []
    for line, measured in _lines([row for row in rows if row.get("prefill_s")]):
        for engine, same in measured.items():
            row = min(same, key=lambda r: r["prefill_s"])
            line[engine] = _digits(row["prefill_s"]) + _marked(row)
            if (size := row["peak_memory_bytes"]) is not None:
                line[engine] += f", {size / 2**30:.2f}"
        found.append(line)
    return markdown(found, CASE | _titles(rows)) if found else ""


def _servers(rows: Sequence[Row]) -> str:
    lines: dict[tuple[int, int], Row] = {}
    for row in rows:
        if row.get("output_throughput") is None:
            continue
        key = row["threads"], row["streams"]
        line = lines.setdefault(key, {"load": f"{key[0]}, {key[1]}"})
        rate = row["output_throughput"]
        line[f"rate of {row['engine']}"] = rate
        line[row["engine"]] = (
            f"{rate:.0f}, {row['median_ttft_ms']:.0f}, {row['median_tpot_ms']:.1f}{_marked(row)}"
        )
    for line in lines.values():
        if {f"rate of {OURS}", "rate of vllm"} <= set(line):
            line["ratio"] = f"{line[f'rate of {OURS}'] / line['rate of vllm']:.2f}"
    columns = {"load": "threads, requests at a time"} | _titles(rows) | {"ratio": "ours / vLLM"}
    return markdown([lines[key] for key in sorted(lines)], columns) if lines else ""


def _lines(rows: Sequence[Row]) -> Iterator[tuple[Row, dict[str, list[Row]]]]:
    """A line's first columns, and the rows of each engine; the others run uncompressed."""
    for shape in sorted(set(map(_shape, rows))):
        here = [row for row in rows if _shape(row) == shape]
        for cr in sorted({row["cr"] for row in here}):
            same: dict[str, list[Row]] = {}
            for row in here:
                if row["cr"] == (cr if row["engine"] == OURS else 1):
                    same.setdefault(row["engine"], []).append(row)
            threads, cache_bytes, batch, context = shape
            label = f"{cache_bytes / 2**30:g} GiB" if cache_bytes else str(batch)
            yield {"shape": f"{threads}, {label} x {context}", "cr": f"{cr:g}"}, same


def _shape(row: Row) -> tuple[int, int, int, int]:
    """Threads, bytes of cache, batch and context; the batch is 0 where it is the largest that the cache holds."""
    cache_bytes = row.get("cache_bytes", 0)
    return row["threads"], cache_bytes, 0 if cache_bytes else row["batch"], row["context"]


def _digits(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _marked(row: Row) -> str:
    notes = ["float32"] if row["dtype"] == "float32" else []
    if "shared_prompt" in row:
        notes.append("one prompt")
    if "cache_bytes" in row:
        notes.append(f"batch {row['batch']}")
    return f" ({', '.join(notes)})" if notes else ""


def _titles(rows: Sequence[Row]) -> dict[str, str]:
    versions = {row["engine"]: row["version"] for row in rows if "version" in row}
    return {e: f"{e} {versions[e]}" if e in versions else e for e in PEERS}


def _skipped(rows: Sequence[Row]) -> dict[str, str]:
    """Reasons of the engines without a single row of figures."""
    measured = {row["engine"] for row in rows if "skipped" not in row}
    return {r["engine"]: r["skipped"] for r in rows if r["engine"] not in measured}


def plotted_batches(rows: Sequence[Row]) -> list[int]:
    """Batches that were measured at several contexts."""
    contexts: dict[int, set[int]] = {}
    for row in rows:
        if row.get("decode_tokens_per_s") and "cache_bytes" not in row:
            contexts.setdefault(row["batch"], set()).add(row["context"])
    return sorted(batch for batch, found in contexts.items() if len(found) > 1)


def figure(rows: Sequence[Row]) -> "Figure":
    """Decode tokens per second over context, a panel for each of `plotted_batches`; with matplotlib.

    The bound is dashed: the bytes of a step at the rate of a copy. Points beyond CR 1 carry their CR.
    """
    from matplotlib.figure import Figure

    from megatron_dmc.plotting import BLUE, GREEN, INK, MUTED, ORANGE, styled

    threads, batches = max(row["threads"] for row in rows), plotted_batches(rows)
    rows = [r for r in rows if r["threads"] == threads and r.get("decode_tokens_per_s")]
    rows = [r for r in rows if "cache_bytes" not in r]
    with styled(9):
        drawn = Figure(figsize=(3.6 * len(batches) + 0.4, 3.4), layout="constrained")
        panels = drawn.subplots(1, len(batches), squeeze=False)[0]
        for ax, batch in zip(panels, batches, strict=True):
            here = [r for r in rows if r["batch"] == batch]
            for engine, colour in zip(PEERS, (BLUE, GREEN, ORANGE, MUTED), strict=True):
                plain = [r for r in here if r["engine"] == engine and r["cr"] == 1]
                points = {  # the faster dtype's replaces the slower one's
                    r["context"]: r["decode_tokens_per_s"]
                    for r in sorted(plain, key=lambda r: r["decode_tokens_per_s"])
                }
                if points:
                    ax.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=engine,
                            color=colour)  # fmt: skip
            ours = [r for r in here if r["engine"] == OURS]
            bound = sorted((r["context"], r["bound_tokens_per_s"]) for r in ours if r["cr"] == 1)
            if bound:
                ax.plot(*zip(*bound, strict=True), "--", color=INK, label="bound")
            for row in (r for r in ours if r["cr"] != 1):
                at = (row["context"], row["decode_tokens_per_s"])
                ax.plot(*at, marker="s", color=BLUE)
                ax.annotate(f"CR {row['cr']:g}", at, (-8, 3), textcoords="offset points", ha="right",
                            color=BLUE)  # fmt: skip
            ax.set(xscale="log", xlabel="context, tokens", title=f"batch {batch}", ylim=(0, None))
            contexts = sorted({r["context"] for r in here})
            ax.set_xticks(contexts, [str(c) for c in contexts])
            ax.minorticks_off()
        panels[0].set_ylabel("decode, tokens/s")
        named = panels[0].get_legend_handles_labels()
        drawn.legend(*named, loc="outside upper center", ncols=len(named[1]), fontsize=8)
    return drawn
