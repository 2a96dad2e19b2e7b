"""The benchmarks on tiny shapes: they check themselves, and their last line is JSON."""

import json

import pytest
import torch

from megatron_dmc.bench import decode_kernels, libraries, measure, train_kernels
from megatron_dmc.cli.main import main
from megatron_dmc.errors import DMCError
from megatron_dmc.ops import cpu, reference
from megatron_dmc.ops.testing import decode_case, yardstick

SHAPE = decode_kernels.Shape(2, 2.0, 2, True, 32, 4, 64)


def run(capsys, *arguments):
    assert main(["bench", *arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_train_kernels(capsys, tmp_path):
    result = run(
        capsys, "train-kernels", "--device", "cpu", "--dtype", "float32", "--lengths", "20",
        "--repeats", "1", "--output", str(tmp_path),
    )  # fmt: skip
    assert result["benchmark"] == "train-kernels" and "say nothing about a GPU" in result["note"]
    merge = [r for r in result["rows"] if r["op"] == "merge"]
    backends = ("torch",) if cpu.absence() else ("cpu", "torch")
    assert {(r["variant"], r["merge_window"]) for r in merge} == {
        *((name, window) for name in backends for window in (0, 12)), ("unrolled", 12),
    }  # fmt: skip
    for row in merge:
        assert row["median_ms"] > 0 and row["fraction_of_copy"] > 0 and len(row["errors"]) == 6
    attention = {r["variant"]: r for r in result["rows"] if r["op"] == "attention"}
    assert attention["FlexAttention"]["skipped"] == "needs a GPU"
    assert attention["DMC"]["kernel"] == "cpu" and attention["DMC"]["errors"]
    names = {"train-kernels.json", "train-kernels.svg", "train-kernels.png"}
    assert {p.name for p in tmp_path.iterdir()} == names


def test_train_step(capsys):
    result = run(
        capsys, "train-step", "--device", "cpu", "--dtype", "float32", "--lengths", "16",
        "--repeats", "1", "--layers", "1",
    )  # fmt: skip
    rows = {(r["part"], r["dmc"]): r for r in result["rows"]}
    assert set(rows) == {("layer", False), ("layer", True), ("step", False), ("step", True)}
    assert rows["step", True]["time_over_plain"] > 0
    losses = rows["step", True]["losses_where_nothing_merges"]
    assert losses["with DMC"] == pytest.approx(losses["without DMC"], rel=1e-5)


def test_kernels(capsys, tmp_path):
    result = run(
        capsys, "kernels", "--device", "cpu", "--dtype", "bfloat16", "--lengths", "40",
        "--repeats", "1", "--batches", "3", "--crs", "4", "--prompts", "40", "--output",
        str(tmp_path),
    )  # fmt: skip
    assert "say nothing about a GPU" in result["note"]
    prefill = {(r["op"], r["group"], r["cr"]): r for r in result["rows"] if "prefill" in r["op"]}
    assert set(prefill) == {
        (op, group, cr)
        for op in ("prefill", "prefill attention") for group in (1, 4) for cr in (None, 4.0)
    }  # fmt: skip
    for row in prefill.values():
        assert row["time_over_plain"] > 0 and set(row["errors"]) == {"out", "entries", "segments"}
    dense = prefill["prefill attention", 1, None]
    # 4 heads of 64 channels: two products, each with 1 + 2 + ... + 40 keys
    assert dense["operations"] == 4 * 64 * 4 * 40 * 41 // 2
    assert prefill["prefill attention", 1, 4.0]["operations"] < 0.5 * dense["operations"]
    assert dense["time_over_flash"] > 0
    name = "torch" if cpu.absence() else "cpu"
    ours = [r for r in result["rows"] if r["variant"] == name and "prefill" not in r["op"]]
    rows = {(r["op"], r["group"], r["skewed"]): r for r in ours}
    assert len(rows) == len(ours) == 8
    for row in rows.values():
        assert row["median_ms"] > 0 and row["fraction_of_copy"] > 0
        assert set(row["errors"]) == {
            "attention", "append, q", "append, entries", "append, segments",
        }  # fmt: skip
    # 3 requests x 4 heads x 10 entries, their keys and values, queries and outputs; 64 channels
    assert rows["attention", 1, False]["bytes_needed"] == 2 * (120 + 12) * 64 * 2
    assert rows["append", 4, True]["time_over_attention"] > 0
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".svg", ".png"}
    # the libraries: what runs here computed the same, the rest says why not
    for group, skewed in ((1, False), (4, True)):
        by_variant = {
            r["variant"]: r for r in result["rows"]
            if (r["op"], r["group"], r.get("skewed")) == ("attention", group, skewed)
        }  # fmt: skip
        sdpa = by_variant["torch SDPA"]
        assert sdpa["median_ms"] > 0 and sdpa["errors"]["attention"] < 0.02
        assert sdpa["bytes_needed"] == by_variant[name]["bytes_needed"]
        assert by_variant["torch varlen"]["skipped"] == "needs a GPU"
        assert set(by_variant) == {name, *(library.name for library in libraries.LIBRARIES)}
        assert by_variant["FlashInfer"]["skipped"] in ("not installed", "needs a GPU")


def test_a_library_that_is_wrong_or_breaks_is_a_row():
    def wrong(q, cache):
        return lambda: torch.zeros_like(q)

    def breaks(q, cache):
        raise RuntimeError("no kernel\nfor this")

    settings = measure.Settings(torch.device("cpu"), torch.float32, (32,), 1, None)
    rows = measure.rows_of(
        decode_kernels.cases(
            settings, [SHAPE], 1.0, [],
            others=[libraries.Library("wrong", wrong), libraries.Library("broken", breaks)],
        )
    )  # fmt: skip
    assert [r["skipped"].split(":")[1].strip() for r in rows] == ["DMCError", "RuntimeError"]
    assert "out is wrong" in rows[0]["skipped"] and rows[1]["skipped"].endswith("no kernel")


def test_8_bit_pages(capsys):
    result = run(
        capsys, "kernels", "--device", "cpu", "--lengths", "40", "--repeats", "1", "--batches", "3",
        "--crs", "4", "--kv-cache-dtype", "fp8",
    )  # fmt: skip
    rows = {(r["op"], r["group"], r["skewed"]): r for r in result["rows"]}
    # a key or value is 64 bytes and a scale
    assert rows["attention", 1, False]["bytes_needed"] == 2 * (120 * 68 + 12 * 64 * 2)
    assert rows["append", 1, False]["bytes_needed"] == 12 * (4 * 64 * 2 + 2 * 68 + 2 * 129 * 4)
    result = run(
        capsys, "decode", "--device", "cpu", "--dtype", "float32", "--lengths", "100", "--repeats", "1",
        "--layers", "1", "--batch", "1", "--crs", "1", "--kv-cache-dtype", "int8",
    )  # fmt: skip
    assert result["rows"][0]["live_bytes"] == pytest.approx(104 * 4 * 2 * (128 + 4), rel=0.02)


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    cache = decode_case.random_cache(
        SHAPE.lengths(), dim=64, page_size=16, room=1, num_free=4,
        dtype=torch.float32, device="cpu",
    )  # fmt: skip
    qkv = decode_case.random_heads(2, [4, 2, 2], 64, dtype=torch.float32, device="cpu", seed=1)
    decode_kernels.check("torch", *qkv, cache)
    right = decode_kernels.decode.paged_decode_attention
    monkeypatch.setattr(
        decode_kernels.decode, "paged_decode_attention",
        lambda *args, **options: right(*args, **{**options, "softmax_scale": 0.1}),
    )  # fmt: skip
    with pytest.raises(DMCError, match="out is wrong"):
        decode_kernels.check("torch", *qkv, cache)


def test_skewed_heads_nearly_keep_the_total():
    equal, skewed = (
        decode_kernels.Shape(16, 4.0, 1, skewed, 4096, 32, 128).lengths().double()
        for skewed in (False, True)
    )
    assert skewed.mean().item() == pytest.approx(equal.mean().item(), rel=0.05)
    assert skewed.std() > 0.4 * skewed.mean() and equal.std() == 0


def test_the_alternatives_compute_the_same():
    settings = measure.Settings(torch.device("cpu"), torch.float64, (17,), 1, None)
    shape = (17, 2, 3, 8)
    k, v = train_kernels.random_tensors(settings, shape, shape)
    alpha, log_keep, omega = (x.double() for x in train_kernels.random_gates(settings, shape[:3]))
    ours = train_kernels.unrolled_merge(k, v, alpha, omega, merge_window=4)
    theirs = reference.merge(k, v, alpha, omega, merge_window=4)
    torch.testing.assert_close(tuple(ours), theirs, rtol=1e-5, atol=1e-5)
    (q,) = train_kernels.random_tensors(settings, (17, 2, 6, 8))
    torch.testing.assert_close(
        train_kernels.dense_bias_attention(q, k, v, log_keep),
        reference.training_attention(q, k, v, log_keep),
    )


def test_a_wrong_result_is_not_timed():
    exact = torch.randn(50, dtype=torch.float64)
    with pytest.raises(DMCError, match="grad k is wrong"):
        yardstick.errors_within_twice_the_yardstick(
            ["grad k"], [exact.float() * 1.1], [exact], [exact.float()]
        )


def test_absent_device_is_one_line(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", "train-kernels", "--device", "cuda"]) == 2
    assert "there is no CUDA device" in capsys.readouterr().err


def test_decode(capsys):
    result = run(
        capsys, "decode", "--device", "cpu", "--dtype", "float32", "--lengths", "200", "--repeats", "2",
        "--layers", "1", "--batch", "2", "--crs", "4",
    )  # fmt: skip
    plain, dense = result["rows"]
    assert (plain["cr"], dense["cr"]) == (1, 4) and plain["speedup"] == 1
    assert dense["measured_cr"] == pytest.approx(4, rel=0.02)
    assert plain["live_bytes"] == pytest.approx(4 * dense["live_bytes"], rel=0.02)
    assert dense["tokens_per_second"] > 0 and dense["error"] < 1e-5
    assert dense["fragmentation"] > plain["fragmentation"] > 1
