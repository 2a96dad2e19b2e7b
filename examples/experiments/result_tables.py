"""Tables of docs/results.md as Markdown. Values are means over seeds, with the standard deviation where there
are several."""

import statistics
from collections import Counter
from collections.abc import Callable

from result_data import (
    COMPARED_WITH,
    Data,
    arm_order,
    cache_crs,
    control_of,
    fewer_heads,
    group,
    measured,
    values,
)


def spread(numbers: list[float], digits: int = 3) -> str:
    if not numbers:
        return "-"
    text = f"{statistics.mean(numbers):.{digits}f}"
    return text + (f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else "")


def ratio(numbers: list[float], control: list[float]) -> str:
    if not numbers or not control:
        return "-"
    return f"{statistics.mean(numbers) / statistics.mean(control):.3f}"


def _lengths(data: Data, arm: str) -> set[str]:
    return {n for run in data["arms"][arm]["runs"].values() for n in run["lengths"]}


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def group_table(data: Data, name: str) -> str:
    """Perplexity and CR at the lengths that arms have in common, and the perplexity against the control's."""
    names = arm_order(data, group(data, name))
    control = control_of(data, name)
    others = [control, *COMPARED_WITH.get(name, ())]
    names = [a for a in others if a not in names and a in data["arms"]] + names
    counted = Counter(int(n) for a in names for n in _lengths(data, a))
    lengths = sorted(n for n, arms in counted.items() if arms > 1 or len(names) == 1)
    delayed = any(cache_crs(data, a, n) != values(data, a, n, "cr") for a in names for n in lengths)
    crs = ["CR", "cache CR"] if delayed else ["CR"]
    head = ["arm", "seeds"]
    for n in lengths:
        head += [*(f"{cr} at {n}" for cr in crs), f"perplexity at {n}", f"/ {control}"]
    rows = []
    for found in measured(data, "base", "base") if name == "quality" else []:
        row = ["base", ""]
        for n in lengths:
            perplexity = [found[str(n)]["perplexity"]] if str(n) in found else []
            row += [*["1.00"] * len(crs), spread(perplexity),
                    ratio(perplexity, values(data, control, n, "perplexity"))]  # fmt: skip
        rows.append(row)
    for arm in names:
        row = [arm, str(len(data["arms"][arm]["runs"]))]
        for n in lengths:
            perplexity = values(data, arm, n, "perplexity")
            row.append(spread(values(data, arm, n, "cr"), 2))
            if delayed:
                row.append(spread(cache_crs(data, arm, n), 2))
            row += [spread(perplexity),
                    ratio(perplexity, values(data, control, n, "perplexity"))]  # fmt: skip
        rows.append(row)
    return markdown(head, rows)


def baselines_table(data: Data) -> str:
    """Eviction and the arms, on the same windows, by CR over time and at the end."""
    head = ["model", "method", "CR over time", "CR at the end", "perplexity", "/ uncompressed"]
    rows = []
    for arm in ("base", "continued"):
        found = measured(data, arm, "eviction")
        plain = [result["none"]["perplexity"] for result in found]
        if found:
            rows.append([arm, "none", "1.00", "1.00", spread(plain), "1.000"])
        for key in sorted(found[0].keys() - {"none"}) if found else ():
            of_seeds = [result[key] for result in found]
            perplexity = [row["perplexity"] for row in of_seeds]
            rows.append([arm, f"{of_seeds[0]['policy']}, {of_seeds[0]['budget']} entries",
                         spread([row["mean_cr"] for row in of_seeds], 2),
                         spread([row["final_cr"] for row in of_seeds], 2),
                         spread(perplexity), ratio(perplexity, plain)])  # fmt: skip
    control = [r["perplexity"] for r in measured(data, "continued", "cache")]
    for arm in arm_order(data, group(data, "quality")):
        found = measured(data, arm, "cache")
        if arm != "continued" and found:
            factor = fewer_heads(data, arm)
            perplexity = [r["perplexity"] for r in found]
            rows.append([arm, "trained", spread([factor * r["mean_cr"] for r in found], 2),
                         spread([factor * r["final_cr"] for r in found], 2), spread(perplexity),
                         ratio(perplexity, control)])  # fmt: skip
    return markdown(head, rows)


def tasks_table(data: Data) -> str:
    columns = {"next line": ("next_line", "acc"), "rest of line": ("rest_of_line", "exact_match"),
               "recall": ("recall", "acc"), "bits per byte": ("sources", "bits_per_byte")}  # fmt: skip
    rows = []
    for arm in ("base", *arm_order(data, group(data, "quality"))):
        found = measured(data, arm, "tasks")
        if not found:
            continue
        row = [arm, str(found[0]["documents"])]
        for task, metric in columns.values():
            scores = [f["tasks"][task][metric] for f in found]
            error = found[0]["tasks"][task].get(f"{metric}_stderr")
            row.append(spread(scores) + (f" (se {error:.3f})" if error is not None else ""))
        factor = 1.0 if arm == "base" else fewer_heads(data, arm)
        row.append(spread([factor * f["tasks"]["sources"]["measured_cr"] for f in found], 2))
        rows.append(row)
    return markdown(["arm", "documents", *columns, "measured CR"], rows)


def kinds_table(data: Data) -> str:
    """CR, and perplexity against the continued model's, by kind of text."""
    arms = [a for a in arm_order(data, group(data, "quality")) if measured(data, a, "kinds")]
    control = measured(data, "continued", "kinds")
    kinds = list(control[0]["kinds"]) if control else []
    head = ["kind of text", "perplexity, continued"]
    for arm in arms:
        if arm != "continued":
            head += [f"{arm}: CR", "perplexity / continued"]
    rows = []
    for kind in kinds:
        plain = [c["kinds"][kind]["perplexity"] for c in control]
        row = [kind, spread(plain, 2)]
        for arm in arms:
            if arm != "continued":
                found = [f["kinds"][kind] for f in measured(data, arm, "kinds")]
                factor = fewer_heads(data, arm)
                row += [spread([factor * f["measured_cr"] for f in found], 2),
                        ratio([f["perplexity"] for f in found], plain)]  # fmt: skip
        rows.append(row)
    return markdown(head, rows)


def classes_table(data: Data) -> str:
    """Merge rate by class of token, mean over heads, layer by layer."""
    rows, num_layers = [], 0
    for arm in arm_order(data, group(data, "quality")):
        for found in measured(data, arm, "kinds")[:1]:
            for part in ("classes", "places"):
                for name, row in found[part].items():
                    if "merge_rate" in row:
                        layers = row["merge_rate_L"]
                        num_layers = len(layers)
                        rows.append([arm, name, str(row["tokens"]), f"{row['merge_rate']:.3f}",
                                     *(f"{rate:.3f}" for rate in layers)])  # fmt: skip
    head = ["arm", "token", "tokens", "merge rate", *(f"layer {i}" for i in range(num_layers))]
    return markdown(head, rows)


def copying_table(data: Data) -> str:
    rows, distances = [], []
    for arm in ("base", *(arm for name in ("quality", "delay")
                          for arm in arm_order(data, group(data, name)))):  # fmt: skip
        found = {}
        for result in measured(data, arm, "copying")[:1]:
            found[arm] = result
        for result in measured(data, arm, "copying-evicted")[:1]:
            found |= {f"{arm}, {policy}": inner for policy, inner in result.items()}
        for label, result in found.items():
            for variant, by_distance in result.items():
                distances = list(by_distance)
                rows.append([label, variant, *(
                    f"{v['accuracy']:.3f} ± {v['standard_error']:.3f}"
                    for v in by_distance.values())])  # fmt: skip
    return markdown(["model", "repeated", *(f"at {d}" for d in distances)], rows)


def gates_table(data: Data) -> str:
    rows = []
    for arm in arm_order(data, data["arms"]):
        if found := measured(data, arm, "gates"):
            hard, soft = ([f[kind]["perplexity"] for f in found] for kind in ("hard", "soft"))
            crs = [spread([f[kind]["measured_cr"] for f in found], 2) for kind in ("hard", "soft")]
            rows.append([arm, str(len(found)), spread(hard), spread(soft), ratio(hard, soft), *crs])
    head = [
        "arm",
        "seeds",
        "perplexity, hard",
        "perplexity, soft",
        "hard / soft",
        "CR, hard",
        "CR, soft",
    ]
    return markdown(head, rows)


def tables(data: Data) -> dict[str, Callable[[], str]]:
    """By name, those of which there are figures."""
    groups = dict.fromkeys(entry["arm"]["group"] for entry in data["arms"].values())
    found: dict[str, Callable[[], str]] = {
        name: (lambda name=name: group_table(data, name)) for name in groups
    }
    by_measure = {"eviction": ("baselines", baselines_table), "tasks": ("tasks", tasks_table),
                  "kinds": ("kinds", kinds_table), "copying": ("copying", copying_table), "gates": ("gates", gates_table)}  # fmt: skip
    for measure, (name, make) in by_measure.items():
        if any(measure in results for results in data["measured"].values()):
            found[name] = lambda make=make: make(data)
    if "kinds" in found:
        found["classes"] = lambda: classes_table(data)
    return found
