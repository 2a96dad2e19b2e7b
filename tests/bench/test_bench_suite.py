"""`bench suite`: its experiments are commands, its tables say what they measured. The whole of it on tiny shapes:
`megatron-dmc bench suite --cpu-smoke --output FOLDER`."""

import argparse
import csv
import json

import pytest
import torch

from megatron_dmc.bench import suite
from megatron_dmc.bench.command import add_arguments
from megatron_dmc.bench.suite import EXPERIMENTS
from megatron_dmc.cli.main import main
from megatron_dmc.plan.model import find_model

EXPERIMENT = {experiment.name: experiment for experiment in EXPERIMENTS}


def test_an_experiment_end_to_end(capsys, tmp_path):
    assert main(["bench", "suite", "e7", "--cpu-smoke", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert result["failures"] == [] and list(result["tables"]) == ["e7"]
    e7 = result["tables"]["e7"]
    assert [(r["engine"], r["batch_size"]) for r in e7] == [
        (engine, batch) for engine in ("megatron-dmc", "megatron-dmc, dense") for batch in (1, 8)
    ]
    for paged, dense in zip(e7[:2], e7[2:], strict=True):
        ratio = paged["decode_tokens_per_second"] / dense["decode_tokens_per_second"]
        assert paged["speedup"] == pytest.approx(ratio) and paged["must_reach"] == 0.95
        assert "speedup" not in dense
    text = (tmp_path / "results.md").read_text()
    assert "`megatron-dmc bench latency --model" in text and "tiny shapes" in text
    with (tmp_path / "e7.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    assert json.loads((tmp_path / "suite.json").read_text()) == result
    assert (tmp_path / "e7-2" / "latency.json").exists()


def test_a_command_that_fails_is_a_line(capsys, tmp_path, monkeypatch):
    real = suite._run_command

    def out_of_memory(words):
        if words[words.index("--simulate-cr") + 1] == "4":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")
        return real(words)

    monkeypatch.setattr(suite, "_run_command", out_of_memory)
    assert main(["bench", "suite", "e5", "--cpu-smoke", "--output", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert "OutOfMemoryError: CUDA out of memory. Tried" in (tmp_path / "results.md").read_text()
    assert len(json.loads(captured.out.splitlines()[-1])["failures"]) == 1
    assert "failed: throughput" in captured.err


def test_ratios():
    e1, e3 = EXPERIMENT["e1"], EXPERIMENT["e3"]

    def row(cr, batch, tokens, command=1):
        return {
            "engine": "megatron-dmc", "command": command, "cr": cr, "batch_size": batch,
            "input_len": 8, "output_len": 8, "decode_tokens_per_second": tokens,
        }  # fmt: skip

    rows = [row(1.0, 4, 10.0), row(4.0, 16, 37.0), row(4.0, 9, 99.0, command=2)]
    suite.compare(e1, rows)
    assert rows[1]["speedup"] == 3.7 and rows[1]["must_reach"] == 3.7
    assert "speedup" not in rows[0] and "speedup" not in rows[2]
    rows = [row(1.0, 1, 10.0), row(1.0, 4, 30.0), row(4.0, 1, 11.0), row(4.0, 4, 60.0)]
    suite.compare(e3, rows)
    assert [r.get("speedup") for r in rows] == [None, None, 1.1, 2.0]
    rows = [row(1.0, 4, 12.0), {**row(1.0, 4, 10.0), "engine": "transformers"}]
    suite.compare(EXPERIMENT["e2"], rows)
    assert rows[0]["speedup"] == 1.2 and rows[0]["must_reach"] == 1 and "speedup" not in rows[1]


def test_every_command_parses_and_names_a_known_model(tmp_path):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    full = argparse.Namespace(cpu_smoke=False, model=None)
    models = set()
    for experiment in EXPERIMENTS:
        for command in experiment.commands:
            words = suite.command_line(command, full, tmp_path)
            args = parser.parse_args(words)
            assert args.output == str(tmp_path)
            if words[0] != "kernels":
                model = find_model(args.model)
                models.add(model.name)
                longest = max(args.input_len) + max(args.output_len)
                assert longest <= model.max_position_embeddings
    assert models == {"llama2-7b", "llama2-13b", "llama2-70b", "qwen3-8b"}


def test_mistakes(capsys, tmp_path):
    assert main(["bench", "suite", "e99", "--cpu-smoke", "--output", str(tmp_path)]) == 2
    assert "e99: no such experiment; use kernels, e1" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["bench", "suite", "e1", "--output", str(tmp_path)]) == 2
        assert "--cpu-smoke" in capsys.readouterr().err
