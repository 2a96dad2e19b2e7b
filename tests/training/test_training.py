"""The stages through `pretrain()`: checkpoints, logs, wrong input, a user's own script."""

import json
from argparse import Namespace

import pytest
import torch
from training_runs import DIM, HEADS, KV_HEADS, LAYERS, ROOT, Forked, logged, pretrain, tensorboard

from megatron_dmc.config import DMCConfig
from megatron_dmc.errors import DMCError, UnsupportedConfig
from megatron_dmc.model.config import DMCTransformerConfig
from megatron_dmc.model.decisions import GateKey
from megatron_dmc.schedule import target_cr, target_merge_rate, zero_out_scale
from megatron_dmc.training.loss import compression_loss
from megatron_dmc.training.step import CompressionLoss

WANDB = '''
"""A stand-in for the part of W&B that Megatron calls; writes to the run's folder."""
import json, os
from types import SimpleNamespace
config = {}
run = SimpleNamespace(entity="e", project="p", log_artifact=lambda *a, **k: None)
def init(**kwargs):
    global folder
    folder = kwargs["dir"]
def log(values, step=None):
    with open(os.path.join(folder, "log"), "a") as out:
        print(json.dumps([step, values], default=float), file=out)
def Artifact(*args, **kwargs):
    return SimpleNamespace(add_reference=lambda *a, **k: None, add_file=lambda *a: None)
def finish():
    pass
'''


@pytest.mark.dist
def test_stages_follow_each_other(tmp_path):
    from megatron_dmc.checkpoint.load import load_model

    zero, retrofit = tmp_path / "zero-out", tmp_path / "retrofit"
    done = Forked("--dmc-stage", "zero-out", "--train-iters", "5", "--save", str(zero),
                  "--save-interval", "5", "--ckpt-format", "torch_dist").wait()  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(logged(done.stdout, "lm loss")) == 5
    state = load_model(zero).model.state_dict()
    for layer in range(LAYERS):
        weight = state[f"decoder.layers.{layer}.self_attention.linear_qkv.weight"]
        heads = weight.view(KV_HEADS, HEADS // KV_HEADS + 2, DIM, -1)
        assert (heads[:, :-1, -1] == 0).all(), "rows of the borrowed channels"
        assert (heads[:, :-1, :-1] != 0).any(-1).all() and (heads[:, -1] != 0).any(-1).all()

    results = {}
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(WANDB)
    wandb = ["--wandb-project", "p", "--wandb-exp-name", "n", "--wandb-save-dir",
             str(tmp_path / "wandb")]  # fmt: skip
    layouts = {"one": (1, wandb), "tp2": (2, ["--tensor-model-parallel-size", "2"]),
               "pp2": (2, ["--pipeline-model-parallel-size", "2"])}  # fmt: skip
    for name, (processes, more) in layouts.items():
        flags = [
            "--dmc-stage", "retrofit", "--dmc-target-cr", "3", "--dmc-ramp-steps", "2",
            "--train-iters", "4", "--pretrained-checkpoint", str(zero), "--load", str(retrofit / name),
            "--save", str(retrofit / name), "--save-interval", "4", "--ckpt-format", "torch_dist",
            "--tensorboard-dir", str(tmp_path / "tb" / name), "--log-throughput",
            "--log-timers-to-tensorboard", *more,
        ]  # fmt: skip
        if name == "one":
            run = pretrain(*flags, packages=str(tmp_path / "packages"))
        else:
            run = Forked(*flags, processes=processes).wait()
        assert run.returncode == 0, run.stderr[-3000:]
        results[name] = run.stdout
        assert "measured cr value" in run.stdout  # evaluation, with hard decisions
    for name in ("tp2", "pp2"):
        for key in ("lm loss", "compression loss", "measured cr"):
            ours, one = logged(results[name], key), logged(results["one"], key)
            assert ours == pytest.approx(one, rel=2e-4, abs=1e-5), (name, key)

    from megatron_dmc.quality.report.curves import read_tensorboard

    curves, _ = read_tensorboard(tmp_path / "tb" / "one", "retrofit")
    # Megatron's console averages the first two steps; its TensorBoard has each step's value
    assert [(p["step"], p["target_cr"]) for p in curves] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 3.0)]
    assert all(len(p["measured_cr_per_layer"]) == LAYERS for p in curves)
    # throughput and CR through Megatron's writers: TensorBoard and W&B
    entries = map(json.loads, (tmp_path / "wandb" / "log").read_text().splitlines())
    sent: dict[str, dict[int, float]] = {}
    for step, values in entries:
        for name, value in values.items():
            sent.setdefault(name, {})[step] = value
    layers = [f"measured cr/layer {i}" for i in range(LAYERS)]
    for folder in ("one", "pp2"):
        scalars = tensorboard(tmp_path / "tb" / folder)
        for name in (*layers, "measured cr", "target cr", "lm loss", "compression loss"):
            assert set(scalars[name]) == {1, 2, 3, 4}, name
        for name in (*layers, "measured cr"):
            assert all(1 <= cr <= 32 for cr in scalars[name].values()), name
        # 4 sequences of 32 tokens a step, never faster than Megatron's own time for a step
        speed, seconds = scalars["tokens per second per GPU"], scalars["iteration-time"]
        assert set(speed) == {2, 3, 4}
        processes = layouts[folder][0]
        assert all(0 < v < 10 * 4 * 32 / seconds[s] / processes for s, v in speed.items())
        assert set(speed) <= set(seconds) and set(speed) <= set(scalars["throughput"])  # TFLOP/s
        # a layer's CR is of all its heads; together they give the whole model's
        entries_of = [32 * 4 * KV_HEADS / scalars[name][3] for name in layers]
        whole = LAYERS * 32 * 4 * KV_HEADS / sum(entries_of)
        assert whole == pytest.approx(scalars["measured cr"][3], rel=1e-4)
        if folder == "one":
            for name in (*layers, "measured cr", "tokens per second per GPU", "throughput"):
                assert sent[name] == pytest.approx(scalars[name], rel=1e-5), name
    loaded = load_model(retrofit / "pp2")
    assert loaded.description.dmc.stage == "retrofit" and loaded.description.dmc.target_cr == 3.0


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--dmc-stage", "distill"], "invalid choice: 'distill'"),
        (["--dmc-stage", "retrofit", "--dmc-target-cr", "0.5"], "--dmc-target-cr=0.5"),
        (["--dmc-stage", "retrofit", "--attention-dropout", "0.1"], "attention dropout 0.1"),
        (["--load", "/no/such/checkpoint"], "/no/such/checkpoint: no checkpoint there"),
    ],
)
def test_wrong_flags_end_with_one_line(flags, message):
    done = Forked("--train-iters", "1", *flags).wait()
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1 and message in errors[0], done.stderr[-2000:]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "values,message",
    [
        ({"stage": "sleep"}, "'sleep' is not a stage"),
        ({"target_cr": 0.99}, "--dmc-target-cr=0.99"),
        ({"target_cr": float("nan")}, "--dmc-target-cr=nan"),
        ({"temperature": 0.0}, "--dmc-temperature=0.0"),
        ({"noise_scale": 1.5}, "--dmc-noise-scale=1.5"),
        ({"merge_window": -1}, "--dmc-merge-window=-1"),
        ({"zero_out_fraction": 1.5}, "--dmc-zero-out-fraction"),
        ({"cr_schedule": "step"}, "--dmc-cr-schedule=step: choose linear, cosine or constant"),
        ({"importance": "random"}, "--dmc-importance=random: choose learned or constant"),
        ({"hinge": "token"}, "--dmc-hinge=token: choose sequence, batch or none"),
        ({"policy": "evict", "pool_after_rope": True}, "--dmc-pool-after-rope.*nothing merges"),
        ({"policy": "evict", "merge_delay": 4}, "--dmc-merge-delay.*--dmc-eviction-delay"),
        ({"merge_delay": -1}, "--dmc-merge-delay=-1"),
        ({"policy": "evict", "importance": "constant"}, "--dmc-importance.*nothing merges"),
    ],
)
def test_config_names_flag_and_value(values, message):
    with pytest.raises(UnsupportedConfig, match=message):
        DMCConfig(**values)
    with pytest.raises(UnsupportedConfig, match="colour"):
        DMCConfig.from_dict({"colour": 1})


@pytest.mark.parametrize(
    "values,message",
    [
        ({"kv_channels": 15}, "head dim 15 is odd"),
        ({"multi_latent_attention": True}, "multi-latent"),
        ({"softmax_type": "learnable"}, "softmax_type='learnable'"),
        ({"apply_query_key_layer_scaling": True}, "apply-query-key-layer-scaling"),
        ({"attention_output_gate": True}, "gated attention output"),
        ({"mtp_num_layers": 1}, "multi-token prediction"),
        ({"experimental_attention_variant": "gated_delta_net", "linear_attention_freq": 2},
         "experimental_attention_variant=gated_delta_net"),
        ({"window_size": (128, 0)}, "sliding-window"),
        ({"attention_dropout": 0.1}, "dropout"),
        ({"rotary_interleaved": True}, "rotary-interleaved"),
        ({"tensor_model_parallel_size": 4}, "2 KV heads"),
    ],
)  # fmt: skip
def test_what_cannot_be_combined_is_refused(values, message):
    common = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2,
              "attention_dropout": 0.0, "dmc": DMCConfig(stage="retrofit")}  # fmt: skip
    DMCTransformerConfig(**common)
    with pytest.raises(UnsupportedConfig, match=message):
        DMCTransformerConfig(**common | values)
    if "tensor_model_parallel_size" not in values:  # Megatron has its own word on that
        DMCTransformerConfig(**common | values | {"dmc": DMCConfig()})


def test_layer_specs_that_dmc_cannot_serve_are_refused():
    import copy

    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.attention import CrossAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.spec_utils import ModuleSpec

    from megatron_dmc.model.attention import DMCSelfAttention
    from megatron_dmc.model.specs import with_dmc_attention

    spec = get_gpt_layer_local_spec()
    assert with_dmc_attention(spec).submodules.self_attention.module is DMCSelfAttention
    with pytest.raises(UnsupportedConfig, match="MLASelfAttention"):
        with_dmc_attention(get_gpt_layer_local_spec(multi_latent_attention=True))
    decoder = copy.copy(spec)
    decoder.submodules = copy.copy(spec.submodules)
    decoder.submodules.cross_attention = ModuleSpec(module=CrossAttention)
    with pytest.raises(UnsupportedConfig, match="cross attention"):
        with_dmc_attention(decoder)
    assert spec.submodules.self_attention.module is not DMCSelfAttention  # left as it was
    attention = with_dmc_attention(spec).submodules.self_attention
    config = DMCTransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=2,
                                  attention_dropout=0.0, dmc=DMCConfig(stage="retrofit"))  # fmt: skip
    with pytest.raises(UnsupportedConfig, match="causal"):  # an encoder's
        DMCSelfAttention(config, attention.submodules, 1, AttnMaskType.padding)


def test_schedule():
    assert [target_cr(s, ramp_steps=4, target=3.0) for s in range(6)] == [1, 1.5, 2, 2.5, 3, 3]
    assert target_cr(0, ramp_steps=0, target=4.0) == 4.0
    cosine = [target_cr(s, ramp_steps=4, target=3.0, schedule="cosine") for s in range(6)]
    half = 0.5**0.5
    assert cosine == pytest.approx([1, 2 - half, 2, 2 + half, 3, 3])
    constant = [target_cr(s, ramp_steps=4, target=3.0, schedule="constant") for s in range(3)]
    assert constant == [3, 3, 3]
    step = CompressionLoss(DMCConfig(target_cr=3.0, ramp_steps=4, cr_schedule="cosine"), None)
    assert step.target_cr(GateKey(0, 1, 0, 0, 0, *step.progress(Namespace(), 1))) == cosine[1]


def test_hinge_forms():
    """Half of the sequences have too few merges, half too many; the target rate is 0.75."""
    rates = torch.tensor([0.25, 1.0], dtype=torch.float64, requires_grad=True)

    def of(hinge, rate_B=rates):
        loss = compression_loss(rate_B, target_cr=4.0, hinge=hinge)
        return loss.item(), torch.autograd.grad(loss, rate_B)[0].tolist()

    assert of("sequence") == (0.25, [-0.5, 0.0])
    assert of("batch") == (0.125, [-0.5, -0.5])
    assert of("none") == (0.125, [-0.5, -0.5])
    beyond = torch.tensor([0.5, 1.25], dtype=torch.float64, requires_grad=True)
    assert of("sequence", beyond) == (0.125, [-0.5, 0.0])
    assert of("batch", beyond) == (0.0, [0.0, 0.0])
    assert of("none", beyond) == (-0.125, [-0.5, -0.5])
    assert compression_loss(rates, target_cr=4.0) == 0.25
    assert target_merge_rate(4.0) == 0.75
    assert [zero_out_scale(s, steps=10, fraction=0.8) for s in (0, 4, 8, 9)] == [1, 0.5, 0, 0]


def test_missing_data_is_named():
    from megatron_dmc.training.arguments import check_paths

    args = Namespace(load=None, save=None, pretrained_checkpoint=None, data_path=["0.3", "nowhere"], sft=False,
                     train_data_path=None, valid_data_path=None, test_data_path=None)  # fmt: skip
    with pytest.raises(DMCError, match="nowhere.idx does not exist"):
        check_paths(args)


def test_counts_cross_the_pipeline_exactly():
    """Values and gradients of the counts survive bfloat16 hidden states bit by bit."""
    from megatron_dmc.model.decisions import append_counts, carry_rows, split_counts

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        hidden = torch.randn(5, 3, 8).to(dtype).requires_grad_()
        counts = torch.tensor([[12345.0, 1.0, 7.0]] * 6).requires_grad_()
        wire = append_counts(hidden, counts)
        assert wire.shape[0] == 5 + carry_rows(6, 8, dtype) and wire.dtype == dtype
        back, again = split_counts(wire, 6)
        assert torch.equal(back, hidden) and torch.equal(again, counts)
        weight = torch.randn(6, 3) / 3
        (again * weight).sum().backward()
        assert counts.grad is not None
        exact = dtype != torch.float16  # its smallest numbers end at 6e-8
        assert (counts.grad - weight).abs().max() <= (1e-9 if exact else 6e-8)


@pytest.mark.dist
def test_a_users_own_script(tmp_path):
    """examples/pretrain_gpt.py, exactly, gives pretrain_dmc.py's losses; on a CPU through a launcher
    that stands in for the CUDA device and does nothing else."""
    script = ROOT / "examples" / "pretrain_gpt.py"
    added = [line for line in script.read_text().splitlines() if "# DMC" in line]
    assert len(added) <= 14, "about ten lines"
    launcher = tmp_path / "launch.py"
    launcher.write_text(
        "import runpy, sys\n"
        "from megatron_dmc.training import cpu_adapter\n"
        "cpu_adapter.install()\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    flags = ["--dmc-stage", "retrofit", "--dmc-target-cr", "3", "--dmc-ramp-steps", "2",
             "--train-iters", "3", "--pipeline-model-parallel-size", "2"]  # fmt: skip
    runs = [
        Forked(*flags, processes=2).wait(),
        pretrain(*flags, processes=2, program=[str(launcher), str(script)]),
    ]
    for run in runs:
        assert run.returncode == 0, run.stderr[-3000:]
    for name in ("lm loss", "compression loss", "measured cr"):
        finished, own = (logged(run.stdout, name) for run in runs)
        assert own == finished and len(own) >= 2
