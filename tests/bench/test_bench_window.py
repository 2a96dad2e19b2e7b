"""`bench window` and the kernel benchmarks without Megatron: what a bare machine runs, and what is left of a window
that fails, hangs or is cut off."""

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from megatron_dmc.bench import window
from megatron_dmc.bench.window_stages import Child

ROOT = Path(__file__).resolve().parents[2]
NOT_ON_A_BARE_MACHINE = (
    "megatron", "apex", "einops", "flash_attn", "flashinfer", "hypothesis", "matplotlib", "psutil",
    "rich", "sentencepiece", "tensorboard", "transformer_engine", "xdist",
)  # fmt: skip
ENGINE_STAGES = ("engine-checks", "throughput", "latency", "train-step", "profile")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The environment of a process in which these packages do not import."""
    folder = tmp_path_factory.mktemp("blocked")
    for name in NOT_ON_A_BARE_MACHINE:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(
            f"raise ModuleNotFoundError('blocked: {name}', name='{name}')\n"
        )
    return {
        **os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }  # fmt: skip


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    return [row for row in rows if row["outcome"] != "announced"]


def script(folder, *flags):
    return [sys.executable, "tools/gpu_window.py", "--cpu", "--output", str(folder), *flags]


def test_the_window_without_megatron(bare, tmp_path):
    result = subprocess.run(
        script(tmp_path, "--budget", "550"), cwd=ROOT, env=bare, capture_output=True, text=True,
        timeout=580,
    )  # fmt: skip
    assert result.returncode == 1, result.stderr  # the engine's stages count as failed
    document = json.loads(result.stdout.splitlines()[-1])
    rows = rows_of(tmp_path)
    log = (tmp_path / "log.txt").read_text()
    bad = [row for row in rows if row["outcome"] not in window.NEUTRAL]
    assert [row["stage"] for row in bad] == list(ENGINE_STAGES), (bad, log[-3000:])
    assert all(row["outcome"] == "skipped" for row in bad)
    assert all("megatron-core not importable" in row["reason"] for row in bad)
    assert document["failed"] == len(ENGINE_STAGES) == document["counts"]["skipped"]
    by_stage = {
        stage.name: [r for r in rows if r["stage"] == stage.name] for stage in window.STAGES
    }
    assert all(by_stage.values())
    for name in ("cuda-cases", "triton-cases"):
        assert len(by_stage[name]) >= 5 and {r["outcome"] for r in by_stage[name]} == {"ok"}
    ops = {(row.get("op"), row.get("variant")) for row in by_stage["decode-kernels"]}
    own = "cpu" if importlib.util.find_spec("megatron_dmc._cpu") else "torch"
    assert {("attention", own), ("append", own), ("attention", "torch SDPA")} <= ops
    assert {row["op"] for row in by_stage["prefill-kernels"]} == {"prefill", "prefill attention"}
    assert {row["op"] for row in by_stage["train-kernels"]} == {"merge", "attention"}
    # what only a GPU can show is neither right nor wrong here
    assert document["counts"]["cpu"] == 2 and document["gpu"] is None
    table = (tmp_path / "table.md").read_text()
    assert table.strip() in result.stdout
    assert "nothing here says anything about a GPU" in table
    assert "skipped: megatron-core not importable" in table


def test_a_window_cut_off_half_way_leaves_its_rows(bare, tmp_path):
    process = subprocess.Popen(
        script(tmp_path), cwd=ROOT, env=bare, stdout=subprocess.PIPE, text=True
    )
    began = time.monotonic()
    while not (tmp_path / "rows.jsonl").exists() or not any(
        row["stage"] == "cuda-cases" for row in rows_of(tmp_path)
    ):
        assert process.poll() is None and time.monotonic() - began < 200
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    document = json.loads(printed.splitlines()[-1])
    rows = rows_of(tmp_path)
    done = {row["case"]: row for row in rows if row["outcome"] == "ok"}
    assert {"machine", "copy", "matrix product"} <= done.keys()
    assert done["copy"]["per_second"] > 0
    stopped = [row for row in rows if "SIGTERM" in row.get("reason", "")]
    # the case that ran, those behind it, and a row for each stage that was not begun
    assert {row["stage"] for row in stopped} >= {stage.name for stage in window.STAGES[2:]}
    assert document["failed"] == len(stopped) and process.returncode == 1
    assert (tmp_path / "table.md").read_text().strip() in printed
    left = subprocess.run(
        ["pgrep", "-f", str(tmp_path / "rows.jsonl")], capture_output=True, text=True
    )
    assert left.stdout == ""


BEHAVIOUR = {
    "works": "row('a'); row('b')",
    "crashes": "announce('a', 'b', 'c'); row('a'); os.abort()",
    "hangs": "announce('a', 'b'); row('a'); time.sleep(60)",
    "garbage": "announce('a', 'b'); row('a'); print('{' * 9)\n"
    "open(path, 'ab').write(b'\\xff{\"stage\": \"gar')",
    "silent": "pass",
    "exits": "row('a'); sys.exit(3)",
    "last": "row('a')",
}
PREAMBLE = """
import os, sys, time
from pathlib import Path
from megatron_dmc.bench.window_stages import append_row
path, stage = Path(sys.argv[1]), sys.argv[2]
row = lambda case: append_row(path, stage, case, 'ok')
announce = lambda *cases: append_row(path, stage, 'cases', 'announced', cases=cases)
"""


def run_stages(monkeypatch, folder, behaviour, *, limit=5.0, budget=60.0):
    stages = tuple(window.Stage(name, name, limit, {"case": "case"}) for name in behaviour)
    monkeypatch.setattr(window, "STAGES", stages)
    monkeypatch.setattr(window, "LEAST", 1.0)
    monkeypatch.setattr(window, "RESERVE", 0.5)
    monkeypatch.setattr(window, "CPU_SLACK", 1.0)

    def command(self, stage, limit):
        code = PREAMBLE + behaviour[stage.name]
        return [sys.executable, "-c", code, str(self.folder / "rows.jsonl"), stage.name]

    monkeypatch.setattr(window.Window, "_command", command)
    return window.Window(folder, budget, True).run()


def test_a_stage_that_fails_takes_no_other_rows_along(monkeypatch, tmp_path, capsys):
    document = run_stages(monkeypatch, tmp_path, BEHAVIOUR)
    rows = window.read_rows(tmp_path / "rows.jsonl")
    found = {
        (row["stage"], row["case"]): (row["outcome"], row.get("reason", "")) for row in rows
        if row["outcome"] != "announced"
    }  # fmt: skip
    good = {key for key, (outcome, _) in found.items() if outcome == "ok"}
    assert good == {
        ("works", "a"), ("works", "b"), ("crashes", "a"), ("hangs", "a"), ("garbage", "a"),
        ("exits", "a"), ("last", "a"),
    }  # fmt: skip
    bad = {key: reason for key, (outcome, reason) in found.items() if outcome == "failed"}
    assert "status -6" in bad["crashes", "b"] and ("crashes", "c") in bad
    assert "killed after 5 s" in bad["hangs", "b"]
    assert "left it out" in bad["garbage", "b"]
    assert "wrote nothing" in bad["silent", "all cases"]
    assert "status 3" in bad["exits", "all cases"]
    assert len(bad) == 6 == document["failed"]
    assert "# The window on" in capsys.readouterr().out
    table = (tmp_path / "table.md").read_text()
    assert "- b: failed: killed after 5 s" in table and "## last" in table
    # the handlers are again those of before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.alone
def test_what_no_longer_fits_the_budget_is_a_row(monkeypatch, tmp_path):
    behaviour = {"first": "row('a')", "slow": "announce('a'); time.sleep(60)", "late": "row('a')"}
    began = time.monotonic()
    run_stages(monkeypatch, tmp_path, behaviour, limit=50, budget=4.0)
    assert time.monotonic() - began < 6
    outcome = {row["stage"]: row for row in rows_of(tmp_path)}
    assert outcome["first"]["outcome"] == "ok" and outcome["slow"]["outcome"] == "failed"
    assert outcome["late"]["reason"] == "out of budget" and outcome["late"]["outcome"] == "skipped"


def test_a_case_after_the_deadline_or_with_an_error_is_a_row(tmp_path):
    from megatron_dmc.bench.window_stages import Case

    def breaks():
        yield {"value": 1}
        raise RuntimeError("no\nkernel")

    path = tmp_path / "rows.jsonl"
    Child("x", path, time.monotonic() + 60, True).run([Case("a", breaks), Case("b", lambda: [{}])])
    Child("y", path, time.monotonic() - 1, True).run([Case("a", breaks)])
    rows = [(r["stage"], r["case"], r["outcome"], r.get("reason")) for r in rows_of(tmp_path)]
    assert rows == [
        ("x", "a", "ok", None), ("x", "a", "failed", "RuntimeError: no kernel"), ("x", "b", "ok", None),
        ("y", "a", "skipped", "out of budget"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("setup", "outcome", "reason"),
    [
        ("print('nvcc: no such option'); raise SystemExit(1)", "failed", "nvcc: no such option"),
        ("open('megatron_dmc/_C.x.so', 'w')", "ok", ""),
    ],
)
def test_the_build_of_the_extension_is_a_row(monkeypatch, tmp_path, setup, outcome, reason):
    (tmp_path / "megatron_dmc").mkdir()
    check = "import os; assert os.environ['TORCH_CUDA_ARCH_LIST'] == '9.0a'; "
    (tmp_path / "setup.py").write_text(check + setup)
    monkeypatch.setattr(window, "ROOT", tmp_path)
    run = window.Window(tmp_path, 60.0, False)
    run.add("ceilings", "extension", "absent", architecture="9.0a")
    run._begin_build()
    while run.build is not None:
        time.sleep(0.05)
        run._poll_build()
    row = rows_of(tmp_path)[-1]
    assert (row["case"], row["outcome"]) == ("build", outcome) and reason in row.get("reason", "")
    run.add("ceilings", "extension", "ok", architecture="9.0a")


def test_the_engine_stages(tmp_path, monkeypatch):
    """With Megatron: every case is correct."""
    from megatron_dmc.bench import window_engine

    monkeypatch.setattr(window_engine, "ceiling", lambda *args: 1e10)
    path = tmp_path / "rows.jsonl"
    for name in ENGINE_STAGES[1:]:
        child = Child(name, path, time.monotonic() + 300, True)
        getattr(window_engine, name.replace("-", "_"))(child)
    subprocess.run(  # its pytest is not at home in this one
        [sys.executable, "-m", "megatron_dmc.bench.window_stages", ENGINE_STAGES[0], "--rows", path,
         "--limit", "300", "--cpu"], check=True,
    )  # fmt: skip
    rows = rows_of(tmp_path)
    assert {row["outcome"] for row in rows} == {"ok"}, rows
    assert {row["stage"] for row in rows} == set(ENGINE_STAGES)
    plain, four, eight = [row for row in rows if row["stage"] == "throughput"]
    # one number of pages, no DMC at CR 1, and the batch grows with the CR
    assert plain["num_pages"] == four["num_pages"] == eight["num_pages"]
    assert plain["measured_cr"] == 1 and abs(four["measured_cr"] / 4 - 1) < 0.05
    assert plain["batch_size"] < four["batch_size"] < eight["batch_size"]
    assert four["ratio"] == four["tokens_per_second"] / plain["tokens_per_second"]
    dense, paged = [row for row in rows if row["case"].startswith("E7")]
    assert (dense["engine"], paged["engine"]) == ("dense", "paged")
    assert paged["ratio"] == dense["step_ms"] / paged["step_ms"] and dense["error"] < 1e-5
    assert {row.get("part") for row in rows if row["stage"] == "train-step"} == {"layer", "step"}


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2)])
def test_dense_attention_on_a_gpu(heads, kv_heads, monkeypatch):
    """Shapes and devices of the flash kernel's arguments, and that they address each row's heads."""
    from megatron_dmc.bench.baselines import DenseContext

    def context(device, dtype):
        return DenseContext(
            num_layers=2, num_kv_heads=kv_heads, head_dim=64, num_pages=64, page_size=16,
            max_num_seqs=3, max_model_len=40, dtype=dtype, device=device,
        )  # fmt: skip

    with FakeTensorMode():
        made = context("cuda", torch.bfloat16)
        rows = torch.tensor([2, -1, 0], device="cuda")
        made.set_decode(rows, torch.tensor([33, 0, 5], device="cuda"))
        q = torch.empty(3, heads, 64, dtype=torch.bfloat16, device="cuda")
        out = made.attend_to_rows(1, q, 0.1)
        assert out.shape == q.shape and out.device == q.device and out.dtype == q.dtype
    made = context("cpu", torch.float32)
    made.k_LPSD.copy_(torch.arange(made.k_LPSD.numel()).view_as(made.k_LPSD))
    made.set_decode(torch.tensor([2, -1, 0]), torch.tensor([33, 0, 5]))
    k, _ = made.flat_rows(1)
    starts, lengths = made._starts_X.tolist(), made._lengths_B.tolist()
    assert lengths == [34, 0, 6]
    for start, row, length in ((starts[0], 2, 34), (starts[2], 0, 6)):
        wanted = made.k_LPSD[1][made.table_RGM[row].long()].flatten(1, 2)[:, :length]
        assert torch.equal(k[start : start + length].transpose(0, 1), wanted)


def test_commands_without_megatron(bare):
    """Kernel benchmarks run, the cases are collected, and what runs the model says what is missing."""
    code = """
import contextlib, io, json, os, sys, tempfile
from megatron_dmc.cli.main import main
def bench(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(["bench", *words])
    return status, out.getvalue(), err.getvalue()
status, out, err = bench("kernels", "--device", "cpu", "--dtype", "float32", "--lengths", "24", "--repeats",
                         "1", "--batches", "1", "--crs", "2", "--prompts", "24")
assert status == 0 and json.loads(out.splitlines()[-1])["rows"], err
for words in (["decode"], ["train-step"], ["throughput", "--model", "x"], ["latency", "--model", "x"]):
    status, out, err = bench(*words)
    assert status == 2 and "megatron-core does not import" in err, (words, err)
    assert f"bench {words[0]} runs the model" in err and "Traceback" not in err
with tempfile.TemporaryDirectory() as folder:
    status, out, err = bench("suite", "e7", "--cpu-smoke", "--output", folder)
    assert status == 1, err
    failures = json.loads(out.splitlines()[-1])["failures"]
    assert len(failures) == 2 and all("megatron-core does not import" in f for f in failures)
import pytest
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, "tests/support")
files = [f"tests/support/kernel_cases_{x}.py" for x in ("decode", "pages", "prefill", "merge", "near", "truncate")]
assert pytest.main(["--collect-only", "-q", "-q", "--noconftest", "-c", os.devnull, *files]) == 0
assert "megatron.core" not in sys.modules
print("all right")
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=bare,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.stdout.endswith("all right\n"), result.stdout[-2000:] + result.stderr[-3000:]


# --- what is compared, and how many pages ---------------------------------------------------------


def test_checks_widen_only_what_they_compare(monkeypatch):
    """A cache whose pool is a hundred times what its requests hold."""
    from megatron_dmc.bench import decode_kernels
    from megatron_dmc.ops.testing import decode_case

    lengths = torch.full((9, 2), 40)
    cache = decode_case.random_cache(
        lengths, dim=16, page_size=8, room=1, num_free=9000, dtype=torch.float32, device="cpu"
    )
    most = 0

    def watch(self, *args, original, **kwargs):
        nonlocal most
        result = original(self, *args, **kwargs)
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            most = max(most, result.numel())
        return result

    for name in ("to", "double"):
        method = functools.partialmethod(watch, original=getattr(torch.Tensor, name))
        monkeypatch.setattr(torch.Tensor, name, method)
    qkv = decode_case.random_heads(9, [4, 2, 2], 16, dtype=torch.float32, device="cpu", seed=1)
    errors = decode_kernels.check("torch", *qkv, cache)
    # keys and values of four requests, in their pages and the free ones that append may take
    assert 0 < most <= 4 * 2 * (5 + 1) * 8 * 2 * 16 and errors["attention"] < 1e-5
    assert decode_case.entries_of(cache, torch.float32).dtype == torch.float32
    # a free page is still free, and those taken are the heads' own
    assert int(cache.free_pages.state[0]) == int((cache.block_table_RGM >= 0).sum()) - 90


def test_the_engines_check_widens_four_requests_pages(monkeypatch):
    from megatron_dmc.bench import decode_step, measure, model_under_test
    from megatron_dmc.ops.paged import kv_pages

    settings = measure.Settings(torch.device("cpu"), torch.float32, (), 1, None)
    loaded = decode_step.random_llama(settings, 1, 80)
    tested = model_under_test.ModelUnderTest(loaded, {"num_pages": 500})
    engine, _ = decode_step.filled_engine(tested, model_under_test.Point(1.0, 6, 64, 4))
    loaded_pages, load = [], kv_pages.load
    monkeypatch.setattr(
        kv_pages, "load", lambda x, ids, dtype: loaded_pages.append(len(ids)) or load(x, ids, dtype)
    )
    assert decode_step.check(engine) < 1e-5
    assert loaded_pages and max(loaded_pages) == 4 * 4 * 4  # requests, heads, pages of 63 tokens


def test_all_cases_get_the_same_number_of_pages(monkeypatch, tmp_path, capsys):
    """However much memory is free when an engine is made; the ceilings' is given back first."""
    from test_bench_engine import CONFIG

    from megatron_dmc.bench import measure, model_under_test
    from megatron_dmc.cli.main import main
    from megatron_dmc.engine import sizes

    happened = []
    pages = iter((900, 800, 700, 600))

    def pages_in_memory(*args, **kwargs):
        happened.append("size")
        return next(pages)

    for module in (model_under_test, sizes):
        monkeypatch.setattr(module, "pages_in_memory", pages_in_memory)
    release, product = measure.release_memory, measure.matrix_product_rate
    monkeypatch.setattr(measure, "release_memory", lambda: (happened.append("release"), release()))
    monkeypatch.setattr(
        measure, "matrix_product_rate", lambda s: (happened.append("measure"), product(s))[1]
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    assert main([
        "bench", "throughput", "--model", str(path), "--load-format", "dummy", "--device", "cpu",
        "--simulate-cr", "1,4", "--max-num-seqs", "auto", "--input-len", "20", "--output-len", "4",
    ]) == 0  # fmt: skip
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["num_pages"] for row in rows] == [900, 900]
    assert happened == ["measure", "release", "size"]
