"""One file with what docs/results.md's tables and figures are made of, and the tables.

    python examples/experiments/results.py --output experiments --to docs/results/metrics.json
    python examples/experiments/results.py --from docs/results/metrics.json [--table quality ...]
    python examples/experiments/results.py --from docs/results/metrics.json --into docs/results.md

The first gathers what run.py and analyse.py left, the second prints Markdown, the third puts it into a page.
Values are means over seeds, with the standard deviation where there are several.
"""

import argparse
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1]
MODEL = EXAMPLES / "models" / "stdlib-llama-3m"

type Data = dict[str, Any]

CONTROLS = {"ablation": "ablation-control"}
"""Of a group without a plain arm; else it is the arm "continued"."""

BESIDE = {
    "combined": ("gqa-4x", "dmc-4x", "dmc-8x"),
    "distillation": ("gqa-4x", "dmc-4x", "dmc-8x"),
}
"""Arms of other groups that stand in a group's table."""


def collect(output: Path, analysis: Path) -> Data:
    """Finished results in the folders."""
    # an arm with half of the base model's heads has twice the CR of its entries
    num_kv_heads = json.loads((MODEL / "config.json").read_text())["num_key_value_heads"]
    arms: dict[str, Any] = {}
    environments = []
    for file in sorted(output.glob("*/metrics.json")):
        run = json.loads(file.read_text())
        arm = run["arm"]
        factor = num_kv_heads / arm.get("kv_heads", num_kv_heads)
        entry = arms.setdefault(arm["name"], {"arm": arm, "runs": {}})
        figures = {
            part: {
                at: {"perplexity": v["perplexity"], "cr": factor * v["measured_cr"]}
                for at, v in run[part].items()
            }
            for part in ("lengths", "curve")
        }
        own_length = str(arm.get("seq_length", 256))
        figures["heads"] = run["lengths"].get(own_length, {}).get("measured_cr_per_layer_head")
        entry["runs"][str(run["seed"])] = figures
        if run["environment"] not in environments:
            environments.append(run["environment"])
    for entry in arms.values():  # one map of heads is drawn
        for seed in sorted(entry["runs"])[1:]:
            entry["runs"][seed].pop("heads")
    measured: dict[str, Any] = {}
    for file in sorted(analysis.glob("*/*.json")):
        content = json.loads(file.read_text())
        if content.get("done"):
            measured.setdefault(file.parent.name, {})[file.stem] = content["result"]
    return {
        "num_kv_heads": num_kv_heads,
        "arms": arms,
        "measured": measured,
        "environments": environments,
    }


def rounded(value: Any) -> Any:
    """Floats to six digits, in whatever holds them."""
    match value:
        case float():
            return float(f"{value:.6g}")
        case dict():
            return {key: rounded(inner) for key, inner in value.items()}
        case list():
            return [rounded(inner) for inner in value]
    return value


def save(data: Data, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # a line for each run and measurement
    parts = []
    for key, value in rounded(data).items():
        if key in ("arms", "measured"):
            rows = [f"  {json.dumps(name)}: {json.dumps(inner)}" for name, inner in value.items()]
            parts.append(f" {json.dumps(key)}: {{\n" + ",\n".join(rows) + "\n }")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def load(file: Path) -> Data:
    return json.loads(file.read_text(encoding="utf-8"))


# --- looking things up ------------------------------------------------------------------------------


def group(data: Data, name: str) -> list[str]:
    """Names of the group's arms that have run."""
    return [arm for arm, entry in data["arms"].items() if entry["arm"]["group"] == name]


def values(data: Data, arm: str, length: int | str, key: str) -> list[float]:
    """Of each seed."""
    runs = data["arms"].get(arm, {"runs": {}})["runs"].values()
    return [run["lengths"][str(length)][key] for run in runs if str(length) in run["lengths"]]


def measured(data: Data, arm: str, measure: str) -> list[Any]:
    """Results of each seed; the base model is the arm "base"."""
    names = ["base"] if arm == "base" else [
        f"{arm}-seed{seed}" for seed in data["arms"].get(arm, {"runs": {}})["runs"]
    ]  # fmt: skip
    found = (data["measured"].get(name, {}).get(measure) for name in names)
    return [result for result in found if result is not None]


def fewer_heads(data: Data, arm: str) -> float:
    """The factor that the arm's KV heads contribute to its CR, in addition to that of its entries."""
    return data["num_kv_heads"] / data["arms"][arm]["arm"].get("kv_heads", data["num_kv_heads"])


def mean(numbers: Iterable[float]) -> float | None:
    numbers = list(numbers)
    return statistics.mean(numbers) if numbers else None


def deviation(numbers: Iterable[float]) -> float:
    numbers = list(numbers)
    return statistics.stdev(numbers) if len(numbers) > 1 else 0.0


def control_of(data: Data, group_name: str) -> str:
    """Baseline of the group's arms."""
    if group_name in CONTROLS:
        return CONTROLS[group_name]
    plain = [a for a in group(data, group_name)
             if data["arms"][a]["arm"]["kind"] == "plain" and "kv_heads" not in data["arms"][a]["arm"]]  # fmt: skip
    return plain[0] if plain else "continued"


def arm_order(data: Data, names: Iterable[str]) -> list[str]:
    """Plain ones first, then by name."""
    return sorted(names, key=lambda a: (data["arms"][a]["arm"]["kind"] != "plain", a))


# --- tables -----------------------------------------------------------------------------------------


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
    others = [control, *BESIDE.get(name, ())]
    names = [a for a in others if a not in names and a in data["arms"]] + names
    counted = Counter(int(n) for a in names for n in _lengths(data, a))
    lengths = sorted(n for n, arms in counted.items() if arms > 1 or len(names) == 1)
    head = ["arm", "seeds"]
    for n in lengths:
        head += [f"CR at {n}", f"perplexity at {n}", f"/ {control}"]
    rows = []
    for found in measured(data, "base", "base") if name == "quality" else []:
        row = ["base", ""]
        for n in lengths:
            perplexity = [found[str(n)]["perplexity"]] if str(n) in found else []
            row += ["1.00", spread(perplexity),
                    ratio(perplexity, values(data, control, n, "perplexity"))]  # fmt: skip
        rows.append(row)
    for arm in names:
        row = [arm, str(len(data["arms"][arm]["runs"]))]
        for n in lengths:
            perplexity = values(data, arm, n, "perplexity")
            row += [spread(values(data, arm, n, "cr"), 2), spread(perplexity),
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
    for arm in ("base", *arm_order(data, group(data, "quality"))):
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


def fill(page: str, found: dict[str, Callable[[], str]]) -> str:
    """The page with each `<!-- table NAME -->` ... `<!-- end -->` holding its new table.

    Raises:
        KeyError: a table of which there are no figures.
    """

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{found[match[2]]()}\n\n{match[4]}"

    return re.sub(
        r"(<!-- table ([\w-]+) -->\n)((?:(?!<!-- end -->).)*)(<!-- end -->)",
        table,
        page,
        flags=re.DOTALL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="where the runs are")
    parser.add_argument("--analysis", type=Path, help="default: OUTPUT/analysis")
    parser.add_argument("--to", type=Path, help="write the file")
    parser.add_argument("--from", dest="source", type=Path, help="read the file instead")
    parser.add_argument("--table", nargs="+", help="only these")
    parser.add_argument("--into", type=Path, help="a page between whose marks the tables go")
    args = parser.parse_args()
    if (args.output is None) == (args.source is None):
        parser.error("give --output DIR to gather, or --from FILE to read")
    if args.source:
        data = load(args.source)
    else:
        data = collect(args.output, args.analysis or args.output / "analysis")
    if not data["arms"] and not data["measured"]:
        sys.exit(f"{args.output or args.source}: nothing has been measured there")
    if args.to:
        save(data, args.to)
        print(f"{args.to}: {len(data['arms'])} arms, {args.to.stat().st_size / 1024:.0f} KiB")
        if not args.table:
            return
    found = tables(data)
    if args.into:
        page = args.into.read_text(encoding="utf-8")
        args.into.write_text(fill(page, found), encoding="utf-8")
        return
    if unknown := set(args.table or []) - set(found):
        parser.error(f"--table {' '.join(sorted(unknown))}: there is {', '.join(found)}")
    for name in args.table or found:
        print(f"\n### {name}\n\n{found[name]()}")


if __name__ == "__main__":
    main()
