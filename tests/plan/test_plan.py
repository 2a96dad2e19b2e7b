"""`megatron-dmc plan`: exact parameter counts, activations against what autograd keeps, the command."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dmc.checkpoint.hf_config import to_hf_config
from megatron_dmc.checkpoint.megatron_args import megatron_flags
from megatron_dmc.cli.main import main as cli
from megatron_dmc.cli.plan import best_first, make_plans
from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.plan.assumptions import Assumptions
from megatron_dmc.plan.layout import Job, Layout, Rules, divisors, valid_layouts
from megatron_dmc.plan.memory import (
    cache_size,
    chunks_in_flight,
    dmc_attention_bytes,
    estimate_memory,
    layer_activations,
    stage_parameters,
)
from megatron_dmc.plan.model import PRESETS, find_model
from megatron_dmc.plan.timing import estimate_step, model_flops_per_token, retrofit_schedule

JOB = Job(gpus=64)
MODEL = find_model("llama2-70b")

# --- against Megatron -----------------------------------------------------------------------------

BUILT = [
    ("llama2-70b", Layout(8, 4, data_parallel_size=2, sequence_parallel=True)),
    ("llama2-70b", Layout(4, 8, data_parallel_size=2, micro_batch_size=2,
                          recompute_granularity="selective")),
    ("llama2-70b", Layout(2, 2, data_parallel_size=16, recompute_granularity="full")),
    ("llama2-7b", Layout(1, 1, data_parallel_size=64, use_distributed_optimizer=False)),
    ("qwen3-8b", Layout(2, 4, data_parallel_size=8)),
    ("tied", Layout(2, 2, data_parallel_size=16)),
    ("tied", Layout(2, 1, data_parallel_size=32)),
]  # fmt: skip


def model_named(name: str):
    if name == "tied":
        return replace(
            find_model("llama3-8b"), num_layers=4, share_embeddings_and_output_weights=True
        )
    return find_model(name)


@pytest.fixture(scope="module")
def measured():
    layouts = [
        {"world_size": 64, "flags": megatron_flags(model_named(name)) + layout.flags(JOB)}
        for name, layout in BUILT
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(root / "tests/support/plan_worker.py"), json.dumps(layouts)],
        env=dict(
            os.environ, PYTHONPATH=str(root), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="",
            TRITON_INTERPRET="1",
        ),
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.dist
def test_parameters_are_those_that_megatron_builds(measured):
    """Every pipeline stage, from the flags that the plan prints."""
    for (name, layout), built in zip(BUILT, measured["parameters"], strict=True):
        stages = range(layout.pipeline_model_parallel_size)
        counted = [stage_parameters(model_named(name), layout, s) for s in stages]
        assert counted == built, (name, layout)


@pytest.mark.dist
def test_attention_activations_are_what_autograd_keeps(measured):
    for row in measured["saved"]:
        dim, ranks = row["dim"], row["context_parallel"]
        recompute = row["recompute"] == "selective"
        counted = dmc_attention_bytes(
            row["heads"], row["groups"], dim, recompute=recompute, context_parallel=ranks,
            delayed=row["delay"] > 0,
        )  # fmt: skip
        if not recompute:
            # RoPE's tables, of 4 bytes, at a batch of 2: own queries, all keys, all raw keys
            tables = 1 + ranks * (2 if row["delay"] else 1)
            counted += tables * 4 * dim / 2
        # never less than what is kept, and not much more
        assert row["bytes"] <= counted * 1.001, row
        assert counted <= row["bytes"] * 1.02, row


# --- against published figures --------------------------------------------------------------------


def test_presets_have_the_published_sizes():
    published = {
        "llama2-7b": 6_738_415_616,
        "llama2-13b": 13_015_864_320,
        "llama2-70b": 68_976_648_192,
        "llama3-8b": 8_030_261_248,
        "llama3-70b": 70_553_706_496,
        "mistral-7b": 7_248_023_552,
        "qwen3-8b": 8_190_735_360,
        "qwen3-14b": 14_768_307_200,
    }
    assert {name: find_model(name).num_parameters for name in PRESETS} == published


def test_activations_follow_the_published_formula():
    """Korthikanti et al., table 2: 34 sbh / t with tensor and sequence parallelism, where attention
    keeps no scores; less two dropout masks (1 byte each), and plus the gate's two halves of SwiGLU
    and flash attention's log-sum-exp."""
    model = replace(
        find_model("llama2-7b"),
        hidden_size=4096, kv_channels=128, num_attention_heads=32, num_query_groups=32,
        ffn_hidden_size=16384,
    )  # fmt: skip
    job = Job(gpus=8)
    layout = Layout(8, sequence_parallel=True, micro_batch_size=2)
    sbh = job.seq_length * 2 * 4096
    gate = 2 * 4 * sbh / 8
    lse = 4 * 32 * job.seq_length * 2 / 8
    total = layer_activations(model, layout, job, dmc=False).total
    # the output of flash attention is the output projection's input and counts once, as there
    assert total == (34 - 2) * sbh / 8 + gate + lse


def test_flops_per_token_are_six_times_the_weights_and_causal_attention():
    """Hoffmann et al. and others: 6 per weight that multiplies, plus 6 L T h for causal attention."""
    model = find_model("llama2-7b")
    norms = (2 * model.num_layers + 1) * model.hidden_size
    embedding = model.vocab_size * model.hidden_size
    products = 6 * (model.num_parameters - norms - embedding)
    attention = 6 * model.num_layers * 4096 * model.hidden_size
    assert model_flops_per_token(model, 4096) == products + attention


def test_schedule():
    schedule = retrofit_schedule(JOB, 4.0)
    assert (schedule.zero_out_steps, schedule.retrofit_steps, schedule.finetune_steps) == (
        250, 9000, 2000,
    )  # fmt: skip
    assert schedule.tokens == 11250 * 1024 * 4096
    half = retrofit_schedule(replace(JOB, global_batch_size=512), 4.0)
    assert half.steps == 2 * schedule.steps and half.tokens == schedule.tokens


# --- properties -----------------------------------------------------------------------------------

models = st.sampled_from(["llama2-7b", "llama2-70b", "llama3-8b", "qwen3-8b"]).map(find_model)
powers = st.sampled_from([1, 2, 4])


@st.composite
def layouts(draw):
    """Layouts without data parallelism's share filled in; every size divides every model."""
    tp = draw(powers)
    return Layout(
        tp, draw(powers), data_parallel_size=draw(powers), micro_batch_size=draw(powers),
        sequence_parallel=tp > 1 and draw(st.booleans()),
        recompute_granularity=draw(st.sampled_from(["none", "selective", "full"])),
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(models, layouts(), st.booleans())
def test_more_parallelism_never_needs_more(model, layout, dmc):
    def memory(changed):
        return estimate_memory(model, changed, JOB, dmc=dmc)

    def parameters(changed):
        stages = range(changed.pipeline_model_parallel_size)
        return [stage_parameters(model, changed, s) for s in stages]

    here = memory(layout)
    tensor = replace(layout, tensor_model_parallel_size=2 * layout.tensor_model_parallel_size)
    assert all(a < b for a, b in zip(parameters(tensor), parameters(layout), strict=True))
    assert memory(tensor).total < here.total
    pipeline = replace(layout, pipeline_model_parallel_size=2 * layout.pipeline_model_parallel_size)
    assert max(parameters(pipeline)) < max(parameters(layout))
    data = memory(replace(layout, data_parallel_size=2 * layout.data_parallel_size))
    assert data.optimizer < here.optimizer and data.weights == here.weights
    assert data.activations == here.activations
    whole = memory(replace(layout, use_distributed_optimizer=False))
    assert whole.total >= here.total
    micro = memory(replace(layout, micro_batch_size=2 * layout.micro_batch_size))
    assert micro.total > here.total


@settings(max_examples=60, deadline=None)
@given(models, layouts())
def test_recompute_trades_memory_for_time(model, layout):
    none, selective, full = (
        replace(layout, recompute_granularity=g) for g in ("none", "selective", "full")
    )
    kept = [estimate_memory(model, x, JOB).total for x in (full, selective, none)]
    assert kept == sorted(kept)
    seconds = [estimate_step(model, x, JOB, Assumptions()).total for x in (none, selective, full)]
    assert seconds == sorted(seconds)
    assert estimate_memory(model, none, JOB, dmc=False).total < estimate_memory(
        model, none, JOB
    ).total  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(models, layouts(), st.integers(2, 8))
def test_better_machines_are_never_slower(model, layout, factor):
    a = Assumptions()
    here = estimate_step(model, layout, JOB, a).total
    for name in ("peak_tflops", "intra_node_bandwidth", "inter_node_bandwidth"):
        faster = replace(a, **{name: factor * getattr(a, name)})
        assert estimate_step(model, layout, JOB, faster).total <= here
    assert estimate_step(model, layout, JOB, a, dmc=False).total < here


def test_stages_hold_all_parameters():
    for pp in (1, 2, 4, 8):
        layout = Layout(8, pp)
        total = 8 * sum(stage_parameters(MODEL, layout, s) for s in range(pp))
        norms = 7 * (2 * MODEL.num_layers + 1) * MODEL.hidden_size  # on every rank
        assert total - norms == MODEL.num_parameters


def test_bubble_and_microbatches_in_flight():
    job = Job(gpus=8, global_batch_size=16)
    plain = Layout(1, 4, data_parallel_size=2)
    assert [chunks_in_flight(plain, job, s) for s in range(4)] == [4, 3, 2, 1]
    interleaved = replace(plain, num_virtual_stages_per_pipeline_rank=2)
    assert [chunks_in_flight(interleaved, job, s) for s in range(4)] == [11, 9, 7, 5]
    assert chunks_in_flight(replace(plain, data_parallel_size=8), job, 0) == 2
    for layout, chunks in ((plain, 1), (interleaved, 2)):
        time = estimate_step(MODEL, layout, job, Assumptions())
        work = time.compute + time.tensor_parallel + time.pipeline_transfers
        assert time.bubble == pytest.approx(work * 3 / (8 * chunks))


# --- which layouts can run ------------------------------------------------------------------------


def test_layouts_keep_the_rules():
    found = list(valid_layouts(MODEL, JOB))
    assert len(found) == len(set(found)) > 50
    for layout in found:
        tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
        assert layout.model_parallel_size * layout.data_parallel_size == 64
        assert tp <= 8 and MODEL.num_query_groups % tp == 0 and MODEL.num_layers % pp == 0
        assert layout.num_microbatches(JOB) * layout.micro_batch_size * (
            layout.data_parallel_size
        ) == 1024  # fmt: skip
        assert layout.sequence_parallel == (tp > 1)


def test_what_dmc_refuses_is_not_offered(monkeypatch):
    """The rule is DMC's own validation; where it takes more, so does the plan."""
    layout = Layout(8, 4, 1, 2, 1)
    assert Rules(MODEL, JOB).refusal(layout) is None

    def refuse(self):
        raise UnsupportedConfig("not today")

    monkeypatch.setattr("megatron_dmc.model.config.DMCTransformerConfig.validate_dmc", refuse)
    assert "not today" in Rules(MODEL, JOB).refusal(layout)


def test_context_parallel_merges_the_whole_sequence_on_every_rank():
    """Ranks share the MLP's activations; each merges every token, so DMC's shrink by less."""
    job = Job(gpus=64, seq_length=4096)
    one, two, four = (
        layer_activations(MODEL, Layout(8, context_parallel_size=cp), job) for cp in (1, 2, 4)
    )
    assert (two.mlp, four.mlp) == (one.mlp / 2, one.mlp / 4)
    # of a token, one KV head: before, merged, gates, the running sums, the keys' RoPE table
    merged = (4 * 2 + 3 / 2) * MODEL.kv_channels + 24 + 4 * (2 * MODEL.kv_channels + 1) / 32
    saved = [x.attention + x.dmc for x in (one, two, four)]
    assert saved[0] > saved[1] > saved[2] > merged * job.seq_length


def test_context_parallel_is_asked_for():
    offered = {x.context_parallel_size for x in valid_layouts(MODEL, JOB)}
    asked = {
        x.context_parallel_size for x in valid_layouts(MODEL, JOB, {"context_parallel_size": 4})
    }
    assert (offered, asked) == ({1}, {4})


def test_ranking():
    plans = best_first(make_plans(MODEL, JOB, Assumptions()), 80e9)
    assert plans
    assert [p.time.total for p in plans] == sorted(p.time.total for p in plans)
    assert max(p.memory.total for p in plans) <= 80e9


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


# --- the command ----------------------------------------------------------------------------------

PLAN = ["plan", "--model", "llama2-70b", "--gpus", "64", "--gpu-memory", "80GB"]


def test_table(capsys):
    assert cli([*PLAN, "--top", "3"]) == 0
    out = capsys.readouterr().out
    assert "68.98 billion parameters" in out and "layouts fit" in out
    table = out.split("TFLOP/s")[1].split("weights: with gradients")[0]
    rows = [line for line in table.splitlines() if line.strip()[:1].isdigit()]
    assert len(rows) == 3
    for text in ("--tensor-model-parallel-size", "--use-distributed-optimizer", "--num-layers 80",
                 "This is an estimate", "50% of it", "GB/s between nodes", "GPU-hours",
                 "47.2 billion tokens"):  # fmt: skip
        assert text in out, text
    assert max(len(line) for line in out.splitlines()) <= 115


def test_cache_of_a_sequence_counts_the_raw_tokens(capsys):
    """Slot by slot; without a delay the two CRs are one."""
    assert cli([*PLAN, "--dmc-merge-delay", "16", "--top", "1"]) == 0
    out = capsys.readouterr().out
    assert (
        "newest 16 tokens raw" in out and "Decided CR 4; cache CR, over the sequence, 3.91" in out
    )
    job, entry = Job(64, seq_length=100, merge_delay=16), 4 * 128 * 8 * 80
    slots = [min(t, 16) + max(t - 16, 0) / 4 for t in range(1, 101)]
    size = cache_size(MODEL, job, 4.0)
    assert size.cache_cr == pytest.approx(sum(range(1, 101)) / sum(slots))
    assert (size.plain_bytes, size.end_bytes) == (100 * entry, slots[-1] * entry)
    plain = cache_size(MODEL, Job(64), 4.0)
    assert plain.cache_cr == plain.decided_cr == plain.plain_bytes / plain.end_bytes == 4


def test_json(capsys):
    assert cli([*PLAN, "--json", "--top", "4"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["layouts"]) == 4
    best = document["best"]
    assert best["memory_bytes"]["total"] <= 80e9 == document["gpu_memory_bytes"]
    assert best["flags"][best["flags"].index("--tensor-model-parallel-size") + 1] == str(
        best["tensor_model_parallel_size"]
    )
    assert document["assumptions"]["efficiency"] == 0.5
    assert best["gpu_hours"] == pytest.approx(
        document["schedule"]["steps"] * best["step_seconds"]["total"] * 64 / 3600
    )


def test_flags_fix_the_layout(capsys):
    flags = ["--tensor-model-parallel-size", "8", "--pipeline-model-parallel-size", "4",
             "--micro-batch-size", "1", "--recompute-granularity", "full", "--json"]  # fmt: skip
    assert cli([*PLAN, *flags]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["num_fitting"] == 6  # virtual stages of 1, 2, 4, 5, 10 or 20 layers
    assert document["best"]["memory_bytes"]["parameters"] == 2172190720
    assert document["best"]["recompute_granularity"] == "full"


def test_hugging_face_folder(tmp_path, capsys):
    config = to_hf_config(find_model("llama3-8b"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "config.json"):
        assert cli(["plan", "--model", str(path), "--gpus", "8", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["model"]["parameters"] == 8_030_261_248


SBATCH = {"llama2-7b": 2, "llama2-13b": 4, "llama2-70b": 8}


@pytest.mark.parametrize("name", SBATCH)
def test_sbatch_files_hold_what_the_plan_says(name):
    """Model and layout of examples/slurm are the best of the plan that their comment names."""
    text = (Path(__file__).parents[2] / "examples/slurm" / f"{name}.sbatch").read_text()
    nodes = SBATCH[name]
    assert f"--nodes={nodes}\n" in text
    assert f"plan --model {name} --gpus {8 * nodes} --gpu-memory 64GB" in text
    job, model = Job(8 * nodes), find_model(name)
    assumptions = Assumptions()  # of h100
    best = best_first(make_plans(model, job, assumptions), 64e9)[0]
    for array, flags in (("MODEL", megatron_flags(model)), ("LAYOUT", best.layout.flags(job))):
        assert text.split(f"\n{array}=(")[1].split("\n)")[0].split() == flags


def test_shell_files_parse():
    root = Path(__file__).parents[2]
    for folder in ("examples", "examples/slurm", "tests/support", "tests/slurm"):
        files = list((root / folder).glob("*.s[hb]*"))
        assert files, folder
        for file in files:
            done = subprocess.run(["bash", "-n", str(file)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


ERRORS = {
    "unknown model": (["--model", "llama9"], ["llama9", "llama2-7b"]),
    "too small a GPU": (["--gpu-memory", "10GB"], ["--gpu-memory 10GB", "smallest needs", "more"]),
    "too few GPUs": (["--gpus", "2"], ["--gpus 2", "smallest needs"]),
    "no GPUs": (["--gpus", "0"], ["--gpus 0", "at least 1"]),
    "tensor parallel 3": (["--tensor-model-parallel-size", "3"],
                          ["num_attention_heads=64", "--tensor-model-parallel-size 3"]),
    "tensor parallel over nodes": (["--tensor-model-parallel-size", "16"], ["--gpus-per-node 8"]),
    "pipeline 3": (["--pipeline-model-parallel-size", "3"], ["num_layers=80"]),
    "micro-batch 0": (["--micro-batch-size", "0"], ["--micro-batch-size 0", "at least 1"]),
    "batch": (["--global-batch-size", "1021", "--pipeline-model-parallel-size", "2"], ["--global-batch-size 1021", "not a multiple"]),
    "memory in words": (["--gpu-memory", "lots"], ["--gpu-memory 'lots'", "80GB"]),
    "long sequence": (["--seq-length", "8192"], ["--seq-length 8192", "4096"]),
    "target CR": (["--dmc-target-cr", "0.5"], ["--dmc-target-cr 0.5", "at least 1"]),
    "efficiency": (["--efficiency", "50"], ["--efficiency 50", "at most 1"]),
    "bandwidth": (["--inter-node-bandwidth", "0"], ["--inter-node-bandwidth 0", "positive"]),
    "top": (["--top", "0"], ["--top 0"]),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_thing(case, capsys):
    flags, texts = ERRORS[case]
    assert cli([*PLAN, *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("megatron-dmc: error: ") and err.count("\n") == 1
    for text in texts:
        assert text in err, err


def test_errors_are_value_errors():
    with pytest.raises(UnsupportedConfig):
        list(valid_layouts(MODEL, JOB, {"tensor_model_parallel_size": 3}))
