"""`bench throughput|latency` with random weights and imposed decisions: what is asked for is what is measured."""

import argparse
import csv
import json

import pytest
import torch
from kernel_tools import compile_for, run_cases

from megatron_dmc.bench import model_under_test, offline
from megatron_dmc.bench.command import add_arguments
from megatron_dmc.bench.measure import Ceilings, ModelCost
from megatron_dmc.bench.offline import run_requests
from megatron_dmc.cli.main import main
from megatron_dmc.engine import imposed
from megatron_dmc.errors import DMCError, UnsupportedConfig

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 16, "vocab_size": 2048, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
    "torch_dtype": "float32",
}  # fmt: skip


@pytest.fixture
def shape(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return (
        "--model",
        str(path),
        "--load-format",
        "dummy",
        "--device",
        "cpu",
        "--num-pages",
        "1000",
    )


def bench(capsys, *arguments):
    assert main(["bench", *arguments]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def parsed(*flags):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["throughput", *flags])


def engine(shape, *flags):
    """The parsed flags' engine for their only point."""
    args = parsed(*shape, *flags)
    (point,) = offline._points(args)
    longest = point.input_len + point.output_len
    tested = model_under_test.ModelUnderTest.from_args(args, longest)
    return tested.engine(point, is_dense=args.dense_baseline)[0]


# --- imposed decisions ----------------------------------------------------------------------------


@pytest.mark.parametrize("cr", [1.0, 1.5, 4.0, 8.0, 30.0])
def test_rates_give_the_cr(cr):
    decisions = imposed.ImposedDecisions.of(imposed.spread_weights(8, 32), cr, num_tokens=500)
    entries = decisions.expected_entries(500)
    assert 500 * entries.numel() / entries.sum() == pytest.approx(cr, rel=1e-9)
    assert entries.min() >= 1 and entries.max() <= 500
    if cr >= 4:
        assert entries.std() > 0.4 * entries.mean()


def test_hashes_follow_the_rates_and_do_not_repeat():
    decisions = imposed.ImposedDecisions.of(imposed.spread_weights(3, 4), 4.0, num_tokens=10000)
    limit, salt = decisions.thresholds(torch.device("cpu"))
    positions = torch.arange(10000)
    drawn = imposed.hashes(positions, torch.zeros_like(positions), salt)
    assert drawn.min() >= 0 and drawn.max() < 2**32
    appended = (drawn < limit).double()
    torch.testing.assert_close(appended.mean(1), decisions.rate_LG, atol=0.025, rtol=0)
    # neighbours, heads and requests are unrelated
    other = (imposed.hashes(positions, torch.ones_like(positions), salt) < limit).double()
    series = [appended[0, :-1, 0], appended[0, 1:, 0], appended[0, :-1, 1], appended[1, :-1, 0],
              other[0, :-1, 0]]  # fmt: skip
    correlation = torch.corrcoef(torch.stack(series)) - torch.eye(len(series))
    assert correlation.abs().max() < 0.05


def test_profile(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"measured_cr_per_layer_head": [[2.0, 8.0], [4.0, 4.0]]}))
    weights = imposed.profile_weights(path, 4, 4)
    assert weights.shape == (4, 4)
    torch.testing.assert_close(weights[:2], weights[:1].expand(2, 4))
    torch.testing.assert_close(weights[2:], torch.full((2, 4), 0.25, dtype=torch.float64))
    assert weights[0].tolist() == sorted(weights[0].tolist())
    assert 0.125 < weights[0, 0] < weights[0, -1] < 0.5
    same = imposed.profile_weights(path, 2, 2)
    assert (1 / same).tolist() == [[2.0, 8.0], [4.0, 4.0]]
    for content in ("[]", '{"measured_cr_per_layer_head": [[0.5]]}', "{", '{"x": 1}'):
        path.write_text(content)
        with pytest.raises(DMCError, match="measured_cr_per_layer_head"):
            imposed.profile_weights(path, 2, 2)


def test_shared_decisions_are_shared():
    decisions = imposed.ImposedDecisions.of(
        imposed.spread_weights(2, 4), 3.0, num_tokens=100, shared=True
    )
    limit, salt = decisions.thresholds(torch.device("cpu"))
    drawn = imposed.hashes(torch.arange(100), torch.zeros(100, dtype=torch.int64), salt) < limit
    assert (drawn == drawn[..., :1]).all() and (drawn[0] != drawn[1]).any()


def test_kernel_decides_the_same():
    """In Triton's interpreter, and on a GPU where one is."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run_cases(
        "kernel_cases_imposed.py", TRITON_INTERPRET=str(int(device == "cpu")), DMC_DEVICE=device
    )


def test_kernel_compiles_without_a_gpu():
    pytest.importorskip("triton")
    from megatron_dmc.engine import imposed_kernel

    types = {
        **dict.fromkeys(("p_positions", "p_rows", "p_seeds", "p_limit", "p_salt"), "*i64"),
        "p_is_merge": "*u8", "p_omega": "*fp32", "eps": "fp32",
    }  # fmt: skip
    for capability in (80, 90):
        compile_for(
            imposed_kernel.decide_kernel, capability, "bf16", 4, types=types,
            BLOCK=imposed_kernel.BLOCK,
        )  # fmt: skip


def test_decisions_depend_on_neither_batch_nor_chunks_nor_preemption(shape):
    """Nor does the cache: entries of every head of every request are the same."""
    asked = [([5 + i] * 40, 60) for i in range(4)]

    def entries(*flags):
        llm = engine(shape, "--simulate-cr", "4", "--input-len", "40", "--output-len", "60", *flags)
        run = run_requests(llm, asked, name="a", batch=4)
        llm.engine.check_integrity()
        return llm.stats(), run

    alone, run = entries("--max-num-seqs", "1")
    chunked, _ = entries("--max-num-seqs", "4", "--max-num-batched-tokens", "7")
    tight, _ = entries("--max-num-seqs", "4", "--num-pages", "60")
    assert alone.entries_LG == chunked.entries_LG == tight.entries_LG
    assert alone.num_preemptions == 0 < tight.num_preemptions
    assert run.measured_cr == pytest.approx(alone.measured_cr)
    assert len({n for row in alone.entries_LG for n in row}) > 4  # heads differ


def test_an_engine_that_does_not_obey_is_found_out(shape, capsys, monkeypatch):
    monkeypatch.setattr(imposed.ImposingContext, "_impose", lambda *_: None)
    flags = ("--simulate-cr", "4", "--input-len", "40", "--output-len", "20", "--max-num-seqs", "2")
    assert main(["bench", "throughput", *shape, *flags]) == 2
    assert "was measured where 4 was imposed" in capsys.readouterr().err


# --- the commands ---------------------------------------------------------------------------------


def test_sweep(shape, capsys, tmp_path):
    result = bench(
        capsys, "throughput", *shape, "--simulate-cr", "1,4", "--max-num-seqs", "2,auto",
        "--input-len", "60", "--output-len", "16", "--num-iters", "2", "--num-pages", "200",
        "--output", str(tmp_path / "out"),
    )  # fmt: skip
    rows = {(r["batch_size"] > 2, r["cr"]): r for r in result["rows"]}
    assert len(rows) == len(result["rows"]) == 4
    for (is_auto, cr), row in rows.items():
        assert row["measured_cr"] == pytest.approx(cr, rel=0.2) and row["num_preemptions"] == 0
        assert row["total_output_tokens"] == 16 * row["batch_size"] == 16 * row["num_requests"]
        assert row["tokens_per_second"] == pytest.approx(76 / 16 * row["output_tokens_per_second"])
        assert 0 < row["fraction_of_roofline"] < 1.2 and row["repeats"] == 2 and row["spread"] >= 0
        assert row["mean_context"] == pytest.approx(68, abs=6)
        if is_auto:  # neither too many nor far too few
            assert 0.7 < row["peak_pages"] / row["num_pages"] <= 1
    assert rows[True, 4.0]["batch_size"] > 1.8 * rows[True, 1.0]["batch_size"]
    # live entries are a quarter, weights are not
    many, few = rows[False, 1.0], rows[False, 4.0]
    live = [r["step_bytes"] - r["weight_bytes"] for r in (few, many)]
    assert live[0] * few["measured_cr"] == pytest.approx(live[1], rel=0.01)
    with (tmp_path / "out" / "throughput.csv").open() as file:
        assert [float(r["elapsed_time"]) for r in csv.DictReader(file)] == [
            r["elapsed_time"] for r in result["rows"]
        ]
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert written >= {"throughput.json", "throughput.csv", "throughput-cr.png"}


def test_lists_are_a_sweep():
    args = parsed("--simulate-cr", "1,2.5", "--input-len", "8,90", "--output-len", "4,7",
                  "--max-num-seqs", "3,auto", "--model", "x")  # fmt: skip
    cases = offline._points(args)
    assert len(set(cases)) == len(cases) == 8
    assert {(c.input_len, c.output_len) for c in cases} == {(8, 4), (90, 7)}
    assert {c.max_num_seqs for c in cases} == {3, None} and {c.cr for c in cases} == {1, 2.5}
    assert [c.cr for c in offline._points(parsed("--model", "x"))] == [None]


def test_latency_of_a_slice_with_a_profile(shape, capsys, tmp_path):
    profile = tmp_path / "report.json"
    profile.write_text(json.dumps({"measured_cr_per_layer_head": [[1.0, 9.0]]}))
    result = bench(
        capsys, "latency", *shape, "--simulate-cr", "3", "--batch-size", "3", "--num-iters", "2",
        "--input-len", "50", "--output-len", "30", "--tensor-parallel-slice", "2",
        "--simulate-cr-profile", str(profile),
    )  # fmt: skip
    assert result["tensor_parallel_slice"] == 2 and len(result["latencies"]) == 2
    assert result["measured_cr"] == pytest.approx(3, rel=0.15)
    assert result["decode_step_ms"] > 0 and result["median_decode_step_ms"] > 0
    h = CONFIG["hidden_size"]
    matrices = h * (4 + 2 * 2) * 16 + 4 * 16 * h + 3 * h * 64  # half of heads and MLP
    parameters = (
        2 * (matrices + 2 * h) + h + 1024 * h
    )  # two layers, final norm, half the vocabulary
    assert result["weight_bytes"] == 4 * parameters


def test_dense_attention_gives_the_same_tokens(shape):
    lengths = (
        "--simulate-cr",
        "1",
        "--input-len",
        "40",
        "--output-len",
        "12",
        "--dtype",
        "float64",
    )
    asked = [([7 + i] * (20 + 9 * i), 12) for i in range(3)]
    tokens = []
    for flags in ((), ("--dense-baseline", "--max-num-batched-tokens", "16")):
        llm = engine(shape, *lengths, *flags)
        run = run_requests(llm, asked, name="a", batch=3)
        llm.engine.check_integrity()
        tokens.append({o.request_id: o.outputs[0].token_ids for o in run.outputs})
    assert tokens[0] == tokens[1]
    assert len({t for ids in tokens[0].values() for t in ids}) > 3


def test_transformers_beside_ours(shape, capsys):
    result = bench(
        capsys, "throughput", *shape, "--simulate-cr", "1", "--max-num-seqs", "2", "--input-len",
        "20", "--output-len", "8", "--compare", "transformers",
    )  # fmt: skip
    ours, theirs = result["rows"]
    assert (ours["engine"], theirs["engine"]) == ("megatron-dmc", "transformers")
    assert theirs["total_output_tokens"] == ours["total_output_tokens"] == 16
    assert theirs["output_tokens_per_second"] > 0 and theirs["decode_tokens_per_second"] > 0


def test_a_batch_beside_another_engine(shape, capsys, monkeypatch):
    given = []

    def row(description, asked, settings, **options):
        given.append(asked)
        return {"skipped": "not here"}

    monkeypatch.setattr(offline, "transformers_row", row)
    result = bench(
        capsys, "latency", *shape, "--simulate-cr", "1", "--batch-size", "2", "--num-iters", "1",
        "--num-iters-warmup", "0", "--input-len", "9", "--output-len", "3", "--compare", "transformers",
    )  # fmt: skip
    ours, theirs = result["rows"]
    assert (ours["engine"], theirs["engine"]) == ("megatron-dmc", "transformers")
    assert ours["batch_size"] == theirs["batch_size"] == len(given[0]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--simulate-cr", "4", "--dense-baseline"), "--dense-baseline is for CR 1"),
        (("--simulate-cr", "500"), "--simulate-cr 500"),
        (("--input-len", "8,9", "--output-len", "1,2,3"), "one for each"),
        (("--tensor-parallel-slice", "3"), "does not divide"),
        (("--max-num-seqs", "auto", "--num-pages", "9"), "holds no request"),
        (("--model", "llama9"), "llama2-7b"),
        (("--simulate-cr-profile", "nowhere", "--simulate-cr", "2"), "nowhere"),
        (("--load-format", "auto", "--tensor-parallel-slice", "2"), "--load-format dummy"),
    ],
)  # fmt: skip
def test_mistakes(shape, capsys, flags, message):
    assert main(["bench", "throughput", *shape, *flags]) == 2
    assert message in capsys.readouterr().err


def test_presets_are_models_that_can_be_built():
    """QK-norm and grouped heads included; the slice of 70B has one KV head."""
    for name in ("llama2-7b", "llama2-13b", "llama2-70b", "llama3-8b", "qwen3-8b"):
        found = model_under_test.find_model(name)
        found.num_layers, found.dtype = 1, torch.bfloat16
        part = model_under_test.slice_of(found, 8)
        part.hidden_size, part.vocab_size, part.padded_vocab_size = 64, 512, 512
        model = model_under_test.random_model(part, torch.device("cpu")).model
        cost = ModelCost.of(model, part, 512)
        assert cost.num_heads == found.num_query_groups // 8
        assert cost.flops_per_entry == 4 * 128 * found.num_attention_heads // found.num_query_groups
        has_norm = any("q_layernorm" in n for n, _ in model.named_parameters())
        assert has_norm == found.qk_layernorm
        floor = Ceilings(1e12, 1e15).floor(cost, 4, 1e6)
        assert floor["memory"] == pytest.approx((cost.weight_bytes + 512e6) / 1e12)
        assert floor["roofline"] == max(floor["memory"], floor["arithmetic"])
    with pytest.raises(UnsupportedConfig):
        model_under_test.slice_of(model_under_test.find_model("llama3-8b"), 16)
