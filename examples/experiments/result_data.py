"""The file of figures behind docs/results.md: its contents, and how to look them up."""

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parents[1]
MODEL = EXAMPLES / "models" / "stdlib-llama-3m"

type Data = dict[str, Any]

CONTROLS = {"ablation": "ablation-control"}
"""Of a group without a plain arm; else it is the arm "continued"."""

COMPARED_WITH = {
    "delay": ("dmc-2x", "dmc-4x", "dmc-8x", "dms-4x", "dms-8x"),
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
                | ({"cache_cr": factor * v["cache_cr"]} if "cache_cr" in v else {})
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


def add(data: Data, new: Data) -> None:
    """Put runs, measurements and environments of `new` into `data`; a run that both have is the new one."""
    for name, entry in new["arms"].items():
        known = data["arms"].setdefault(name, {"arm": entry["arm"], "runs": {}})
        if known["arm"] != entry["arm"]:
            sys.exit(f"{name}: the settings of the file differ from those of the folder")
        known["runs"] |= entry["runs"]
    for name, results in new["measured"].items():
        data["measured"].setdefault(name, {}).update(results)
    data["environments"] += [e for e in new["environments"] if e not in data["environments"]]


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
    at_length = [run["lengths"].get(str(length), {}) for run in runs]
    return [figures[key] for figures in at_length if key in figures]


def cache_crs(data: Data, arm: str, length: int | str) -> list[float]:
    """CR of the cache over time, of each seed: where a delay makes it differ from that of the decisions, as it
    was measured, else the latter."""
    settings = data["arms"].get(arm, {"arm": {}})["arm"]
    if found := values(data, arm, length, "cache_cr"):
        return found
    if settings.get("policy") == "evict" or settings.get("merge_delay"):
        at_length = int(length) == settings.get("seq_length", 256)
        return [r["mean_cr"] for r in measured(data, arm, "cache")] if at_length else []
    return values(data, arm, length, "cr")


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
