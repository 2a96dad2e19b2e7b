"""The command of examples/smollm2: its steps, and all of them at toy scale."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from text_models import byte_level_tokenizer, random_llama
from toy_texts import write_texts

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from smollm2.steps import Plan

SETTINGS = ROOT / "examples" / "smollm2" / "settings.toml"
SMALLER = {
    "[training]": {"seq_length": "64", "merge_delay": "4", "borrowed_lr_mult": "4.0"},
    "[data]": {"heldout_documents": "0.3", "validation_documents": "0.2"},
    "[measure]": {
        "window_length": "64", "windows": "2", "long_window_length": "96", "long_windows": "1",
        "eviction_windows": "2", "problems": "2", "answer_tokens": "8", "needle_lengths": "[120]",
        "needle_samples": "2", "chat_tokens": "4", "context_lengths": "[32, 64]", "speed_tokens": "4",
    },
    "[arms.control]": {"stages": "{ retrofit = 2 }"},
    "[arms.4x]": {"stages": "{ zero-out = 2, retrofit = 2 }"},
    "[arms.dms-4x]": {"stages": "{ zero-out = 2 }"},
}  # fmt: skip

# --- steps ----------------------------------------------------------------------------------------

WORKER = """
import json, sys, time
from pathlib import Path
sys.path.insert(0, {examples!r})
from smollm2.steps import Plan

folder, settings = Path({folder!r}), json.loads(Path({folder!r}, "settings.json").read_text())
plan = Plan(folder / "steps")

def work(name):
    began = time.time()
    time.sleep(settings.get("seconds", 0))
    if name == settings.get("fails"):
        sys.exit("no more paper")
    return [began, time.time(), *(plan.result(n)[-1] for n in plan.steps[name].needs), name]

def add(name, **options):
    plan.add(name, settings.get(name), lambda: work(name), **options)

add("first")
add("left", needs=("first",))
add("right", needs=("first",))
add("timed", needs=("first",), alone=True)
add("last", needs=("left", "right"))
if sys.argv[1:2] == ["--step"]:
    plan.do(sys.argv[2])
else:
    try:
        plan.run([sys.executable, __file__, "--step"], jobs=2)
    except ValueError as e:
        sys.exit(str(e))
    print(json.dumps({{name: plan.result(name) for name in plan.steps}}))
"""


class Example:
    """Five steps in a script."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.script = folder / "worker.py"
        self.script.write_text(WORKER.format(examples=str(ROOT / "examples"), folder=str(folder)))

    def start(self, **settings: object) -> subprocess.Popen[str]:
        (self.folder / "settings.json").write_text(json.dumps(settings))
        return subprocess.Popen([sys.executable, self.script], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def run(self, **settings: object) -> tuple[int, str, str]:
        """Exit code, output, errors."""
        process = self.start(**settings)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def times(self) -> dict[str, int]:
        return {f.stem: f.stat().st_mtime_ns for f in (self.folder / "steps").glob("[a-z]*.json")
                if f.stem != "runs"}  # fmt: skip


@pytest.fixture
def example(tmp_path):
    return Example(tmp_path)


def test_steps_run_together_unless_timed(example):
    code, out, err = example.run(seconds=0.6)
    assert code == 0, err
    found = json.loads(out)
    spans = {name: result[:2] for name, result in found.items()}
    assert found["last"][2:] == ["left", "right", "last"]

    def overlap(a: str, b: str) -> bool:
        return spans[a][0] < spans[b][1] and spans[b][0] < spans[a][1]

    assert overlap("left", "right")
    assert not any(overlap("timed", other) for other in spans if other != "timed")
    assert "left: done in" in err


def test_a_step_is_done_once_and_again_with_what_it_needs(example):
    assert example.run()[0] == 0
    first = example.times()
    assert set(first) == {"first", "left", "right", "timed", "last"}
    code, _, err = example.run()
    assert code == 0 and example.times() == first and "done" not in err
    assert example.run(right={"a": 2})[0] == 0
    later = example.times()
    assert {name for name in first if later[name] != first[name]} == {"right", "last"}
    runs = json.loads((example.folder / "steps" / "runs.json").read_text())
    assert [(run["steps"], run["jobs"]) for run in runs] == [(5, 2), (2, 2)]


def test_a_failed_step_stops_the_run_with_its_output(example):
    code, _, err = example.run(fails="right")
    assert code == 1 and "no more paper" in err and "the step `right` ended with 1" in err
    assert "last" not in example.times()
    assert example.run()[0] == 0, "the same command resumes"


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_no_step_behind(example, sign):
    process = example.start(seconds=30)
    first = example.folder / "steps" / "first.log"
    deadline = time.monotonic() + 60
    while not first.is_file() and time.monotonic() < deadline:
        time.sleep(0.1)
    second = example.run()
    assert second[0] == 1 and "another run" in second[2], "the folder is one run's"
    # a process that a background shell started ignores SIGINT
    process.send_signal(
        sign if signal.getsignal(signal.SIGINT) != signal.SIG_IGN else signal.SIGTERM
    )
    process.communicate(timeout=20)
    assert process.returncode != 0
    assert example.run()[0] == 0, "no step holds the lock"


def test_a_step_needs_an_earlier_one(tmp_path):
    plan = Plan(tmp_path)
    with pytest.raises(KeyError, match="none"):
        plan.add("one", None, os.getpid, needs=("none",))
    plan.add("one", None, os.getpid)
    with pytest.raises(ValueError, match="`one` has not been done"):
        plan.result("one")


# --- the whole command ----------------------------------------------------------------------------


def toy_settings() -> str:
    """settings.toml with small amounts, few stages, and without the 8x arm, which is as the 4x arm."""
    lines, table = [], ""
    for line in SETTINGS.read_text().splitlines():
        table = line if line.startswith("[") else table
        name = line.partition(" =")[0]
        smaller = SMALLER.get(table, {})
        if table != "[arms.8x]":
            lines.append(f"{name} = {smaller[name]}" if name in smaller else line)
    for table, values in SMALLER.items():
        assert table in lines and {f"{name} = {value}" for name, value in values.items()} <= set(
            lines
        )
    return "\n".join(lines)


def test_the_whole_command_at_toy_scale(tmp_path):
    """Every step with a random model of two layers, then again: nothing is done twice."""
    model = tmp_path / "random"
    byte_level_tokenizer(model, adds_bos=False)
    random_llama(model, 300).float().save_pretrained(model)
    english, code = write_texts(tmp_path)
    problem = {
        "task_id": "toy/0", "entry_point": "double", "prompt": "def double(x):\n",
        "canonical_solution": "    return 2 * x\n",
        "test": "def check(candidate):\n    assert candidate(3) == 6\n",
    }  # fmt: skip
    (tmp_path / "problems.jsonl").write_text("\n".join(2 * [json.dumps(problem)]))
    (tmp_path / "settings.toml").write_text(toy_settings())
    out = tmp_path / "out"
    command = [
        sys.executable, str(ROOT / "examples" / "smollm2" / "run.py"), "--output", str(out),
        "--settings", str(tmp_path / "settings.toml"), "--model", str(model), "--english", str(english),
        "--code", str(code), "--problems", str(tmp_path / "problems.jsonl"), "--jobs", "0",
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=1500)
    found = json.loads((out / "report" / "smollm2.json").read_text())
    assert set(found["targets"]) == {"4"} and found["control_perplexity"] > 1
    assert found["dms"]["4"]["perplexity"] > 1
    assert set(found["eviction"]["policies"]["h2o"][0]) == {"budget", "cache_cr", "perplexity"}

    def records() -> dict[str, int]:
        return {f.name: f.stat().st_mtime_ns for f in (out / "steps").glob("*.json")}

    before = records()
    again = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    assert records() == before and "train" not in again.stderr and "measure" not in again.stderr
