"""The experiments' arms are runnable settings, and the table is over their results."""

import json
import sys
from argparse import ArgumentParser
from pathlib import Path

from megatron_dmc.config import DMCConfig
from megatron_dmc.training.arguments import add_dmc_args, dmc_config_from_args

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "experiments"))

import run as driver


def test_every_arm_is_a_valid_setting():
    arms = driver.read_arms(ROOT / "examples/experiments/arms.toml")
    assert {arm["kind"] for arm in arms.values()} == {"dmc", "plain"}
    settings = {f"--dmc-{name.replace('_', '-')}" for name in DMCConfig().to_dict()} | {
        "--dmc-no-stage-check",
        "--dmc-borrowed-lr-mult",
    }
    dmc_flags = add_dmc_args(ArgumentParser())
    dmc_flags.add_argument("--train-iters", type=int)
    steps: dict[str, set[int]] = {}
    for arm in arms.values():
        recipe = driver.recipe_of(arm, 1, short=False)
        total = sum(driver.stages_of(arm, recipe, short=False).values())
        steps.setdefault(arm["group"], set()).add(total)
        assert set(arm) <= driver.RECIPE_KEYS | driver.OWN_KEYS | set(DMCConfig().to_dict()), arm
        flags = driver.stage_flags(arm, "retrofit", recipe)
        assert {flag for flag in flags if flag.startswith("--")} <= settings
        parsed = dmc_flags.parse_args([*flags, "--train-iters", "10"])
        got = dmc_config_from_args(parsed).to_dict()  # refuses what is out of range
        if arm["kind"] == "dmc":
            assert got["stage"] == "retrofit"
            assert {name: got[name] for name in set(arm) & set(got)} == {
                name: value for name, value in arm.items() if name in got
            }
    assert all(arm["seeds"] == [1, 2, 3] for arm in arms.values() if arm["group"] == "quality")
    for group, totals in steps.items():
        assert max(totals) - min(totals) <= 20, (group, "arms of equal steps (except zero-out)")


def test_the_teacher_is_the_base_before_pooling(tmp_path, monkeypatch):
    conversions = []
    monkeypatch.setattr(driver, "cli", lambda command: conversions.append(command) and 0)
    arms = driver.read_arms(ROOT / "examples/experiments/arms.toml")
    base, flags = driver.start_of(arms["distill-dmc-4x"], tmp_path)
    assert base == tmp_path / "base" and flags == ["--dmc-teacher", str(base)]
    assert [Path(c[-1]).name for c in conversions] == ["base"]
    base, flags = driver.start_of(arms["distill-gqa-4x"], tmp_path)
    assert base == tmp_path / "base" and flags == ["--dmc-teacher", str(tmp_path / "teacher")]
    assert ["--kv-heads" in c for c in conversions[1:]] == [True, False]
    assert driver.start_of(arms["gqa-4x"], tmp_path)[1] == []


def test_table_is_over_seeds_and_counts_fewer_heads(tmp_path):
    for seed, perplexity in ((1, 6.0), (2, 6.5)):
        folder = tmp_path / f"gqa-4x-seed{seed}"
        folder.mkdir()
        lengths = {"256": {"perplexity": perplexity, "measured_cr": 1.0}}
        arm = {"name": "gqa-4x", "group": "quality", "kind": "plain", "kv_heads": 2}
        result = {"arm": arm, "seed": seed, "lengths": lengths, "curve": {}, "environment": {}}
        (folder / "metrics.json").write_text(json.dumps(result))
    lines = driver.table(tmp_path).splitlines()
    assert lines[0] == "### quality"
    assert lines[-1] == "| gqa-4x | 2 | 4.00 ± 0.00 | 6.250 ± 0.354 | - |"
