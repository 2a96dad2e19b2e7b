"""Effects of a run's flags: by machine, in samples, by starting checkpoint, with failures; console output."""

import dataclasses
import os
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest
import torch
from training_runs import ENVIRONMENT, ROOT, Forked, logged, pretrain

from megatron_dmc.config import DMCConfig
from megatron_dmc.errors import CheckpointError, UnsupportedConfig
from megatron_dmc.model.config import DMCTransformerConfig
from megatron_dmc.model.decisions import DecisionRecorder, GateKey
from megatron_dmc.training import accelerators, stages, step
from megatron_dmc.training.accelerators import Accelerators
from megatron_dmc.training.arguments import add_dmc_args
from megatron_dmc.training.loss import compression_loss
from megatron_dmc.training.step import CompressionLoss

RETROFIT = ("--dmc-stage", "retrofit", "--dmc-target-cr", "3")


def errors(run: subprocess.CompletedProcess) -> list[str]:
    """The one line of a refused run."""
    assert run.returncode == 2 and "Traceback" not in run.stderr, run.stderr[-3000:]
    return [line for line in run.stderr.splitlines() if "error: " in line]


# --- the machine -----------------------------------------------------------------------------------

NOTHING = Accelerators(
    gpu=True, transformer_engine=False, rope_fusion=False, gradient_fusion=False,
    softmax_fusion=False, cpu_kernels=False,
)  # fmt: skip
TE_ALONE = dataclasses.replace(NOTHING, transformer_engine=True, rope_fusion=True)
TE_AND_APEX = dataclasses.replace(TE_ALONE, gradient_fusion=True, softmax_fusion=True)


def stand_in(monkeypatch, there: Accelerators) -> None:
    """Megatron's own marks of what could be imported, and a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there.gpu)
    monkeypatch.setattr(accelerators.transformer_engine, "HAVE_TE", there.transformer_engine)
    fused = (lambda *a, **k: None) if there.rope_fusion else None
    monkeypatch.setattr(accelerators.rope_utils, "fused_apply_rotary_pos_emb", fused)
    monkeypatch.setattr(accelerators.layers, "_grad_accum_fusion_available", there.gradient_fusion)
    found = "spec" if there.softmax_fusion else None
    monkeypatch.setattr(accelerators, "find_spec", lambda name: found)
    absence = "" if there.cpu_kernels else "not built"
    monkeypatch.setattr(accelerators.cpu, "absence", lambda: absence)


@pytest.mark.parametrize(
    "there,off",
    [
        (NOTHING, {"apply_rope_fusion", "gradient_accumulation_fusion", "masked_softmax_fusion"}),
        (TE_ALONE, {"gradient_accumulation_fusion", "masked_softmax_fusion"}),
        (TE_AND_APEX, set()),
    ],
)
def test_defaults_follow_what_can_be_imported(monkeypatch, there, off):
    from megatron.training.arguments import add_megatron_arguments

    stand_in(monkeypatch, there)
    assert Accelerators.found() == there
    parser = add_dmc_args(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))
    args = parser.parse_args([])
    fusions = {"apply_rope_fusion", "gradient_accumulation_fusion", "masked_softmax_fusion",
               "bias_swiglu_fusion", "bias_dropout_fusion"}  # fmt: skip
    assert {name for name in fusions if not getattr(args, name)} == off
    assert args.transformer_impl == ("transformer_engine" if there.transformer_engine else "local")
    assert args.distributed_backend == "nccl" and not args.use_cpu_initialization
    said = there.describe()
    assert ("for want of" in said) == bool(off) and "\n" not in said
    accelerators.check(args)


@pytest.mark.parametrize("cpu_kernels", [False, True])
def test_swiglu_is_fused_on_a_cpu_with_kernels(monkeypatch, cpu_kernels):
    there = dataclasses.replace(NOTHING, gpu=False, cpu_kernels=cpu_kernels)
    stand_in(monkeypatch, there)
    assert Accelerators.found() == there
    assert there.defaults().get("bias_swiglu_fusion", True) == cpu_kernels
    assert not there.defaults()["bias_gelu_fusion"]
    assert ("SwiGLU" in there.describe()) == cpu_kernels


def test_what_is_not_installed_is_refused_by_name(monkeypatch):
    given = {name: None for name in accelerators.NEED_TRANSFORMER_ENGINE}
    stand_in(monkeypatch, NOTHING)
    for flag, value in {"transformer_impl": "transformer_engine", "fp8": "hybrid",
                        "moe_permute_fusion": True, "tp_comm_overlap": True}.items():  # fmt: skip
        args = Namespace(**{"transformer_impl": "local"} | given | {flag: value})
        with pytest.raises(UnsupportedConfig, match="needs Transformer Engine.*leave"):
            accelerators.check(args)
        stand_in(monkeypatch, TE_ALONE)
        accelerators.check(args)
        stand_in(monkeypatch, NOTHING)
    assert "needs a GPU" in errors(
        Forked("--train-iters", "1", "--transformer-impl", "transformer_engine").wait()
    )[0]  # fmt: skip


@pytest.mark.dist
def test_a_bare_gpu_machine_trains(tmp_path):
    """With the defaults of a GPU without Transformer Engine and Apex; only the backend and the
    initialisation are named, since the CPU stands in for the GPU."""
    program = tmp_path / "gpu.py"
    program.write_text(
        "from megatron_dmc.training import accelerators, run\n"
        f"found = accelerators.{NOTHING}\n"
        "accelerators.Accelerators.found = classmethod(lambda cls: found)\n"
        "run.main()\n"
    )
    done = pretrain(
        *RETROFIT, "--train-iters", "2", "--distributed-backend", "gloo",
        "--use-cpu-initialization", program=[str(program)],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the local layers, for want of Transformer Engine" in done.stdout
    assert len(logged(done.stdout, "lm loss")) == 2


# --- what cannot be combined -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "values,stage,message",
    [
        ({"fp8_param": True, "fp8": "hybrid"}, "zero-out", "fp8-param-gather"),
        ({"cuda_graph_impl": "local"}, "retrofit", "same noise"),
        ({"cuda_graph_impl": "transformer_engine"}, "zero-out", "cuda_graph_impl=transformer"),
        ({"overlap_moe_expert_parallel_comm": True}, "retrofit", "overlap-moe"),
        ({"qk_clip": True}, "retrofit", "qk-clip"),
        ({"offload_modules": ["core_attn"]}, "finetune", "offload-modules core_attn"),
    ],
)
def test_what_would_be_wrong_silently_is_refused(values, stage, message):
    config = DMCTransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, attention_dropout=0.0,
        dmc=DMCConfig(stage=stage),
    )  # fmt: skip
    for name, value in values.items():
        setattr(config, name, value)
    with pytest.raises(UnsupportedConfig, match=message):
        config.validate_dmc()


@pytest.mark.parametrize(
    "flags,message",
    [
        ([*RETROFIT, "--train-iters", "1", "--mtp-num-layers", "1"], "multi-token prediction"),
        (["--train-iters", "1", "--enable-cuda-graph"], "--enable-cuda-graph"),
        ([], "give --train-iters or --train-samples"),
        (["--train-iters", "1", "--seq-length", "64"], "max_position_embeddings (32)"),
        (["--train-iters", "1", "--save", "x", "--save-interval", "0"], "args.save_interval > 0"),
    ],
)
def test_a_sentence_instead_of_a_traceback(flags, message):
    assert message in errors(Forked(*flags).wait())[0]


def test_a_checkpoints_tokenizer_is_found_from_anywhere(tmp_path, monkeypatch, caplog):
    from megatron_dmc.checkpoint.tokenizer import find_tokenizer
    from megatron_dmc.training.arguments import resolve_paths

    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "tokenizer.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    args = Namespace(tokenizer_model="words")
    resolve_paths(args)
    named, gone = Namespace(tokenizer_model="org/name"), Namespace(tokenizer_model="words")
    resolve_paths(named)  # a name on the hub stays one
    assert named.tokenizer_model == "org/name"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert find_tokenizer(tmp_path / "checkpoint", args) == tmp_path / "words"
    assert find_tokenizer(tmp_path / "checkpoint", gone) is None
    assert "trained with is not at words" in caplog.text


# --- samples ---------------------------------------------------------------------------------------


@pytest.mark.dist
def test_the_ramp_follows_samples_and_resumes(tmp_path):
    """`--train-samples`: as many steps by iterations are the same run; with a batch that grows, the target
    is linear in samples; a stop half-way changes nothing."""
    by_steps = Forked(*RETROFIT, "--train-iters", "6").wait()
    by_samples = Forked(*RETROFIT, "--train-samples", "24").wait()
    assert by_steps.returncode == by_samples.returncode == 0, by_samples.stderr[-3000:]
    for name in ("target cr", "lm loss", "measured cr"):
        assert logged(by_steps.stdout, name) == logged(by_samples.stdout, name)
    ramp = [*RETROFIT, "--train-samples", "32", "--rampup-batch-size", "2", "2", "8",
            "--ckpt-format", "torch_dist", "--save-interval", "3"]  # fmt: skip
    whole = Forked(*ramp, "--save", str(tmp_path / "whole")).wait()
    assert whole.returncode == 0, whole.stderr[-3000:]
    batches = logged(whole.stdout, "global batch size")
    assert batches == [2.0] * 4 + [4.0] * 6
    before = [sum(batches[:i]) for i in range(len(batches))]
    expected = [1 + 2 * done / 32 for done in before]
    # the console averages the first two steps of a process
    assert logged(whole.stdout, "target cr")[2:] == pytest.approx(expected[2:], rel=1e-5)
    part = tmp_path / "part"
    for more in (["--exit-interval", "6"], []):
        again = Forked(*ramp, "--load", str(part), "--save", str(part), *more).wait()
        assert again.returncode == 0, again.stderr[-3000:]
    for name in ("target cr", "lm loss", "measured cr"):
        assert logged(again.stdout, name)[2:] == logged(whole.stdout, name)[8:]


def test_zero_out_fades_by_samples():
    loss = CompressionLoss(DMCConfig(stage="zero-out"), DecisionRecorder(1))
    args = Namespace(train_samples=100, consumed_train_samples=40, train_iters=7)
    assert loss.progress(args, 3) == (40, 100)
    args.train_samples = None
    assert loss.progress(args, 3) == (3, 7)
    given = CompressionLoss(DMCConfig(stage="retrofit", ramp_steps=5), DecisionRecorder(1))
    args.train_samples = 100
    assert given.progress(args, 3) == (3, 5)
    constant = CompressionLoss(DMCConfig(stage="finetune"), DecisionRecorder(1))
    assert constant.target_cr(GateKey(0, 3, 0, 0, 0, *constant.progress(args, 3))) == 4.0


# --- which checkpoint ------------------------------------------------------------------------------


def saved_by(**values) -> dict:
    args = {"dmc_stage": "off", "train_iters": 10, "train_samples": None, "dmc_target_cr": 4.0,
            "iteration": 10, "kv_channels": 16} | values  # fmt: skip
    return {"iteration": args.pop("iteration"), "args": Namespace(**args)}


@pytest.mark.parametrize(
    "flag,stage,saved,message",
    [
        ("--load", "retrofit", {"dmc_stage": "zero-out"}, "--load.*count.*--pretrained-checkpoint"),
        ("--load", "retrofit", {"dmc_stage": "retrofit"}, None),
        ("--load", "retrofit", {"dmc_stage": "retrofit", "train_iters": 40}, "target CR was 1.75"),
        ("--load", "zero-out", {"dmc_stage": "zero-out", "train_iters": 40}, "borrowed channels"),
        ("start", "retrofit", {}, "is a plain model; --dmc-stage retrofit starts from"),
        ("start", "retrofit", {"dmc_stage": "zero-out"}, None),
        ("start", "retrofit", {"dmc_stage": "zero-out", "iteration": 4}, "not finished.*50%"),
        ("start", "finetune", {"dmc_stage": "zero-out"}, "is of --dmc-stage zero-out"),
        ("start", "finetune", {"dmc_stage": "retrofit"}, None),
        ("start", "finetune", {"dmc_stage": "retrofit", "iteration": 5}, "target CR of 2.5"),
        ("start", "finetune", {"dmc_stage": "retrofit", "dmc_target_cr": 2.0}, "target CR of 2"),
        ("start", "finetune", {"dmc_stage": "retrofit", "dmc_alpha_offset": 1.0}, "alpha-offset 1"),
        ("start", "zero-out", {"dmc_stage": "finetune"}, "is of --dmc-stage finetune"),
        ("start", "off", {"dmc_stage": "retrofit"}, "is of --dmc-stage retrofit"),
        ("start", "off", {"dmc_borrowed_rope_pair": 2}, "rope-pair 2, and here it is None"),
        ("start", "off", {"dmc_borrowed_rope_pair": 7}, None),  # the last of 8
    ],
)
def test_a_stage_starts_from_the_one_before(tmp_path, monkeypatch, flag, stage, saved, message):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    monkeypatch.setattr(stages, "iteration_folder", Path)
    monkeypatch.setattr(stages, "read_common", lambda folder: saved_by(**saved))
    args = Namespace(
        dmc_stage_check=True, ckpt_format="torch_dist", finetune=False, ckpt_step=None,
        load=str(tmp_path) if flag == "--load" else None, pretrained_checkpoint=str(tmp_path),
        dmc_stage=stage, train_iters=10, train_samples=None, dmc_target_cr=4.0,
        dmc_borrowed_rope_pair=None, kv_channels=16,
    )  # fmt: skip
    if message is None:
        stages.check_stage(args)
    else:
        with pytest.raises(CheckpointError, match=message):
            stages.check_stage(args)
        args.dmc_stage_check = False
        stages.check_stage(args)


@pytest.mark.dist
def test_a_retrofit_does_not_go_on_from_a_zero_out(tmp_path):
    folder = str(tmp_path)
    flags = [
        "--load",
        folder,
        "--save",
        folder,
        "--save-interval",
        "2",
        "--ckpt-format",
        "torch_dist",
    ]
    done = Forked("--dmc-stage", "zero-out", "--train-iters", "2", *flags).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    refused = Forked(*RETROFIT, "--train-iters", "4", *flags).wait()
    assert "iteration 2 is of --dmc-stage zero-out" in errors(refused)[0]


# --- faults, weights -------------------------------------------------------------------------------


@pytest.mark.dist
def test_a_repeated_step_draws_the_same_noise():
    """Megatron runs every step twice and compares the losses of its microbatches, hinge included."""
    run = Forked(*RETROFIT, "--train-iters", "3", "--rerun-mode", "report_stats").wait()
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(logged(run.stdout, "lm loss")) == 3
    assert "samples, all identical" in run.stdout and "rel. variability" not in run.stdout


def test_keys_of_a_repeated_step(monkeypatch):
    monkeypatch.setattr(step, "get_num_microbatches", lambda: 2)
    monkeypatch.setattr(step.mpu, "get_data_parallel_world_size", lambda: 1)
    monkeypatch.setattr(step.mpu, "get_data_parallel_rank", lambda: 0)
    loss = CompressionLoss(DMCConfig(stage="finetune"), DecisionRecorder(1))
    args = Namespace(curr_iteration=7, seed=1, micro_batch_size=3, eval_micro_batch_size=5)
    once, again = ([loss._next_key(args, 0, training=True) for _ in range(2)] for _ in range(2))
    assert once == again and once[0] != once[1] and once[1].first_sample == 3
    evaluated = [loss._next_key(args, 0, training=False) for _ in range(4)]
    assert len(set(evaluated)) == 4 and not set(evaluated) & set(once)
    assert evaluated[1].first_sample == 5


@pytest.mark.dist
def test_nan_without_save_is_a_sentence():
    run = Forked(
        *RETROFIT, "--train-iters", "3", "--error-injection-rate", "1",
        "--error-injection-type", "persistent_error",
    ).wait()  # fmt: skip
    assert "rejected by Megatron's fault detection" in errors(run)[0]


def of_microbatches(masks_BT: torch.Tensor, rates_B: torch.Tensor, size: int, *, per_token: bool):
    """The compression loss of a step, as Megatron's schedule divides and adds it."""
    config = Namespace(calculate_per_token_loss=per_token, context_parallel_size=1)
    total, tokens = 0.0, 0.0
    pieces = list(zip(rates_B.split(size), masks_BT.split(size), strict=True))
    for rate_B, mask_BT in pieces:
        n = mask_BT.sum()
        weight_B = CompressionLoss._weights(rate_B, n, mask_BT.view(-1), config)
        hinge = compression_loss(rate_B, target_cr=4.0, weight_B=weight_B)
        if per_token:
            total, tokens = total + hinge * weight_B.sum(), tokens + n
        else:
            n = n.clamp_min(1)
            total += hinge * n / n / len(pieces)
    return float(total / tokens) if per_token else float(total)


def test_the_hinges_weight_does_not_depend_on_accumulation():
    """docs/method.md, section 4: sequences of 1, 4, 0 and 3 counted tokens, two of them beyond the target."""
    masks_BT = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 1, 1]]).float()
    rates_B = torch.tensor([0.25, 0.5, 0.0, 1.0])
    short = [0.5, 0.25, 0.75, 0.0]
    for size in (1, 2, 4):
        assert of_microbatches(masks_BT, rates_B, size, per_token=True) == pytest.approx(
            (1 * short[0] + 4 * short[1]) / 8
        )
        assert of_microbatches(masks_BT, rates_B, size, per_token=False) == pytest.approx(
            sum(short) / 4
        )


# --- what is printed -------------------------------------------------------------------------------


@pytest.mark.dist
def test_output_of_a_run(tmp_path):
    """Twenty iterations: no exponential of a ratio, no list of 800 arguments, no foreign warning first;
    without `--eval-interval` and CUDA_DEVICE_MAX_CONNECTIONS."""
    from training_runs import MODEL

    model = [*MODEL]
    at = model.index("--eval-interval")
    del model[at : at + 2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1",
               "pretrain_dmc.py", *model, *RETROFIT, "--train-iters", "20"]  # fmt: skip
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    del environment["CUDA_DEVICE_MAX_CONNECTIONS"]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = run.stdout.splitlines()
    assert len(lines) < 250 and len(logged(run.stdout, "lm loss")) == 20
    assert "lm loss PPL" in run.stdout and "measured cr value" in run.stdout
    assert "cr PPL" not in run.stdout and "compression loss PPL" not in run.stdout
    warned = [line for line in run.stderr.splitlines() if "Warning" in line]
    assert not [w for w in warned if "Transformer Engine" in w or "Apex" in w], warned
    assert "\n  dmc_target_cr " in run.stdout and "\n  adam_eps " not in run.stdout


def test_importing_is_quiet():
    script = "import megatron_dmc; from megatron_dmc import LLM"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert run.returncode == 0 and run.stderr == run.stdout == "", run.stderr[-2000:]


def test_an_llm_script_says_nothing_of_megatron():
    script = (
        "from megatron_dmc import LLM, SamplingParams\n"
        "llm = LLM('examples/models/stdlib-llama-3m', num_pages=256)\n"
        "import warnings, logging\n"
        "print(len(llm.generate(['x'], SamplingParams(max_tokens=1), use_tqdm=False)))\n"
        "print(logging.getLogger('torch.utils.cpp_extension').level)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert run.returncode == 0 and run.stdout == "1\n0\n", run.stderr[-2000:]
    assert "Warning" not in run.stderr and "DEPRECATED" not in run.stderr, run.stderr
