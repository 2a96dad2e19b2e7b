"""The commands on what a short demo leaves behind: in processes of their own, as a user runs them, and
in this process where a new one would show nothing more."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_dmc.cli.main import main as cli

ROOT = Path(__file__).resolve().parents[2]
MODEL = next((ROOT / "examples" / "models").iterdir())


def dmc(*args: object) -> subprocess.CompletedProcess[str]:
    """`megatron-dmc args`."""
    return subprocess.run(
        [sys.executable, "-m", "megatron_dmc.cli.main", *map(str, args)],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
    )  # fmt: skip


def wait_for(path: Path, pattern: str, process: subprocess.Popen, seconds: float = 300) -> None:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if path.exists() and re.search(pattern, path.read_text(errors="replace")):
            return
        assert process.poll() is None, f"ended with {process.returncode} before {pattern!r}"
        time.sleep(0.1)
    raise TimeoutError(f"no {pattern!r} in {path} within {seconds} s")


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory) -> Path:
    """A short demo that was interrupted (Ctrl-C) during its second stage and started again."""
    output = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "examples/demo.py", "--short", "--output", str(output)]
    work = output / "short" / "run"
    with open(output / "first.log", "wb") as log:
        first = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True, env=os.environ
        )
        try:
            wait_for(work / "retrofit.log", r"iteration +5/", first)
        finally:
            os.killpg(first.pid, signal.SIGINT)
            first.wait(60)
    assert first.returncode != 0
    assert (work / "zero-out.done").exists() and not (work / "retrofit.done").exists()
    zero_out = (work / "zero-out.done").stat().st_mtime_ns
    second = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert second.returncode == 0, second.stderr[-3000:]
    assert (work / "zero-out.done").stat().st_mtime_ns == zero_out
    return output / "short"


def test_an_interrupted_demo_goes_on_where_it_stopped(demo_folder):
    log = (demo_folder / "run" / "retrofit.log").read_text()
    steps = [int(n) for n in re.findall(r"iteration +(\d+)/", log)]
    restart = max(i for i in range(1, len(steps)) if steps[i] <= steps[i - 1])
    assert 1 < steps[restart], "the second run started the stage anew"
    assert steps[restart:] == list(range(steps[restart], 9))
    report = json.loads((demo_folder / "report.json").read_text())
    wanted = [
        "base_perplexity",
        "dmc_perplexity",
        "target_cr",
        "measured_cr",
        "measured_cr_per_layer_head",
        "engine_vs_full_forward_max_abs_diff",
        "cache_bytes",
        "cache_bytes_uncompressed",
        "tokens_per_second",
        "seconds",
    ]
    assert all(report[name] is not None for name in wanted)
    assert report["engine_vs_full_forward_max_abs_diff"] < 1e-4
    assert (demo_folder / "report.html").stat().st_size > 10_000


def test_generate_streams_and_says_what_it_cost(demo_folder, monkeypatch, capsys):
    prompt = "import os\n\ndef main():\n"
    model = demo_folder / "run" / "finetune"
    result = dmc("generate", model, "--prompt", prompt, "--max-tokens", 12, "--ignore-eos")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(prompt) and len(result.stdout) > len(prompt) + 1
    assert re.search(r"12 generated in [\d.]+ s: [\d.]+ tokens/s", result.stderr)
    assert re.search(r"measured CR [\d.]+: cache [\d,]+ bytes, uncompressed [\d,]+", result.stderr)
    monkeypatch.setattr(sys, "stdin", io.StringIO(prompt))
    assert cli(["generate", str(model), "--max-tokens", "12", "--ignore-eos"]) == 0
    assert capsys.readouterr().out == result.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generate", MODEL, "--prompt", "x " * 4000], ["512", "prompt"]),
        (["generate", MODEL, "--prompt", "x", "--max-tokens", "0"], ["max_tokens", "0"]),
        (["generate", MODEL, "--prompt", "x", "--top-p", "7"], ["top_p", "7"]),
        (["generate", MODEL, "--prompt", "x", "--dtype", "int3"], ["int3"]),
        (["convert", "--to", "megatron", "no-such-folder", "out"], ["no-such-folder"]),
        (["report", "--base", MODEL, "--model", MODEL, "--data", "no-such-data"], ["no-such-data"]),
    ],
)
def test_bad_input_is_one_clear_line(args, words, capsys):
    assert cli(list(map(str, args))) == 2
    check_one_line(capsys.readouterr().err, words)


def test_nothing_else_is_printed_with_the_error():
    result = dmc("generate", "no-such-folder", "--prompt", "x")
    assert result.returncode == 2
    check_one_line(result.stderr, ["no-such-folder"])


def check_one_line(stderr: str, words: list[str]) -> None:
    lines = stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("megatron-dmc: error:"), stderr
    assert all(word in lines[0] for word in words)


def test_report_of_two_models(demo_folder, tmp_path):
    work = demo_folder / "run"
    result = dmc(
        "report", "--base", MODEL, "--model", work / "finetune",
        "--data", work / "data" / "heldout_text_document", "--output", tmp_path / "report",
        "--max-windows", 2, "--max-tokens", 4,
        "--stage", f"retrofit={work / 'retrofit' / 'tensorboard'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert re.search(r"CR [\d.]+ \(target 4\), perplexity [\d.]+ -> [\d.]+", result.stdout)
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [p["step"] for p in report["curves"]] == list(range(1, 9))


def test_report_refuses_a_model_that_was_never_retrofitted(demo_folder, tmp_path, capsys):
    data = demo_folder / "run" / "data" / "heldout_text_document"
    args = ["--base", MODEL, "--model", MODEL, "--data", data, "--output", tmp_path]
    assert cli(["report", *map(str, args)]) == 2
    assert "never retrofitted" in capsys.readouterr().err
