"""Tables and the figure of the rows that `bench peers` writes."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from megatron_dmc.bench.output import Row, markdown
from megatron_dmc.bench.peers.environments import OURS, PEERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHAPE = ("threads", "batch", "context")


def tables(rows: Sequence[Row]) -> str:
    """Decode, then the time to the first token and memory, in Markdown; a line for each shape and CR."""
    parts = [_decode(rows), _prefill(rows)]
    for engine, reason in _skipped(rows).items():
        parts.append(f"{engine} is not measured: {reason}.")
    return "\n\n".join(parts)


def _decode(rows: Sequence[Row]) -> str:
    found: list[Row] = []
    for shape, cr, measured in _lines(rows):
        rates = {e: row.get("decode_tokens_per_s") for e, row in measured.items()}
        line = _named(shape, cr) | rates | {"bound": measured[OURS].get("bound_tokens_per_s")}
        for peer in ("vllm", "transformers"):
            if rates.get(OURS) and rates.get(peer):
                line[f"/ {peer}"] = f"{rates[OURS] / rates[peer]:.2f}"
        found.append(line)
    titles = {"shape": "threads, batch x context", "cr": "CR"} | _titles(rows)
    titles |= {"/ vllm": "ours / vLLM", "/ transformers": "ours / transformers", "bound": "bound"}
    return "Decode, tokens/s:\n\n" + markdown(found, titles)


def _prefill(rows: Sequence[Row]) -> str:
    found: list[Row] = []
    for shape, cr, measured in _lines(rows):
        line = _named(shape, cr)
        for engine, row in measured.items():
            if row.get("prefill_s"):
                line[engine] = f"{row['prefill_s']:.3g}"
                if (size := row.get("peak_memory_bytes")) is not None:
                    line[engine] += f", {size / 2**30:.2f}"
        found.append(line)
    titles = {"shape": "threads, batch x context", "cr": "CR"} | _titles(rows)
    return "Seconds to the last request's first token, and peak memory in GiB:\n\n" + markdown(
        found, titles
    )


def _lines(rows: Sequence[Row]) -> Iterable[tuple[tuple[Any, ...], float, dict[str, Row]]]:
    """Shape, this engine's CR, and the row of each engine; the others run uncompressed."""
    for shape in dict.fromkeys(tuple(row[key] for key in SHAPE) for row in rows):
        same = [row for row in rows if tuple(row[key] for key in SHAPE) == shape]
        peers = {row["engine"]: row for row in same if row["engine"] != OURS}
        for ours in [row for row in same if row["engine"] == OURS] or [{"cr": 1.0}]:
            yield shape, ours["cr"], {OURS: ours} | peers


def _named(shape: tuple[Any, ...], cr: float) -> Row:
    threads, batch, context = shape
    return {"shape": f"{threads}, {batch} x {context}", "cr": f"{cr:g}"}


def _titles(rows: Sequence[Row]) -> dict[str, str]:
    versions = {row["engine"]: row["version"] for row in rows if "version" in row}
    return {e: f"{e} {versions[e]}" if e in versions else e for e in PEERS}


def _skipped(rows: Sequence[Row]) -> dict[str, str]:
    """Why an engine has not a single row with figures."""
    measured = {row["engine"] for row in rows if "skipped" not in row}
    return {r["engine"]: r["skipped"] for r in rows if r["engine"] not in measured}


def plotted_batches(rows: Sequence[Row]) -> list[int]:
    """Batches that were measured at several contexts."""
    contexts: dict[int, set[int]] = {}
    for row in rows:
        if row.get("decode_tokens_per_s"):
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
    with styled(9):
        drawn = Figure(figsize=(3.6 * len(batches) + 0.4, 3.4), layout="constrained")
        panels = drawn.subplots(1, len(batches), squeeze=False)[0]
        for ax, batch in zip(panels, batches, strict=True):
            here = [r for r in rows if r["batch"] == batch]
            for engine, colour in zip(PEERS, (BLUE, GREEN, ORANGE, MUTED), strict=True):
                points = sorted((r["context"], r["decode_tokens_per_s"]) for r in here
                                if r["engine"] == engine and r["cr"] == 1)  # fmt: skip
                if points:
                    ax.plot(*zip(*points, strict=True), marker="o", label=engine, color=colour)
            ours = [r for r in here if r["engine"] == OURS]
            bound = sorted((r["context"], r["bound_tokens_per_s"]) for r in ours if r["cr"] == 1)
            if bound:
                ax.plot(*zip(*bound, strict=True), "--", color=INK, label="bound")
            for row in (r for r in ours if r["cr"] != 1):
                at = (row["context"], row["decode_tokens_per_s"])
                ax.plot(*at, marker="s", color=BLUE)
                ax.annotate(f"CR {row['cr']:g} ", at, ha="right", va="center", color=BLUE)
            ax.set(xscale="log", xlabel="context, tokens", title=f"batch {batch}", ylim=(0, None))
            contexts = sorted({r["context"] for r in here})
            ax.set_xticks(contexts, [str(c) for c in contexts])
            ax.minorticks_off()
        panels[0].set_ylabel("decode, tokens/s")
        panels[0].legend(fontsize=7)
    return drawn
