"""--dmc-teacher: the loss itself, and pretrain_dmc.py with a teacher. Its layouts: test_layouts.py."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core import parallel_state
from torch.distributed.checkpoint import FileSystemReader
from torch.nn.functional import kl_div, linear
from training_runs import MODEL, Forked, logged, tensorboard

from megatron_dmc.checkpoint.single_process import ensure_single_process
from megatron_dmc.training.loss import vocab_parallel_kl
from megatron_dmc.training.teacher import Teacher

T, B, H, V = 5, 2, 8, 37


def random(*shape, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shift", [0.0, 700.0])
def test_kl_is_torchs(shift):
    student, teacher, weight_TB = random(T, B, V), random(T, B, V, seed=1), random(T, B, seed=2)
    ours = (student + shift).requires_grad_()
    theirs = student.clone().requires_grad_()
    kl_TB = vocab_parallel_kl(ours, teacher - shift)
    expected_TB = kl_div(
        theirs.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    assert (kl_TB - expected_TB).abs().max() < 1e-11 and (kl_TB > 0.1).all()
    (kl_TB * weight_TB).sum().backward()
    (expected_TB * weight_TB).sum().backward()
    assert (ours.grad - theirs.grad).abs().max() < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_both_losses_of_a_model_and_the_gradient_of_one(dtype, weight):
    """With Megatron's cross entropy, which overwrites float32 logits."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    ensure_single_process()
    group = parallel_state.get_tensor_model_parallel_group()
    teacher_TBV = random(T, B, V, seed=1).to(dtype)

    class Fixed:
        pg_collection = SimpleNamespace(tp=group)

        def __call__(self, *args, output_processor):
            return teacher_TBV

    teacher = Teacher(Fixed(), weight)
    hidden, matrix = random(T, B, H, scale=1.0).to(dtype), random(V, H, scale=1.0, seed=3).to(dtype)
    labels = torch.arange(B * T).view(B, T) % V
    matrix.requires_grad_()

    losses = teacher.losses(labels, labels, None)(
        hidden_states=hidden, output_layer=lambda x, weight, **_: (linear(x, weight), None),
        output_weight=matrix, scale_logits=lambda x: x, runtime_gather_output=None, labels=labels,
        compute_language_model_loss=lambda labels, logits: vocab_parallel_cross_entropy(
            logits, labels.T.contiguous(), tp_group=group).T,
    )  # fmt: skip
    teacher.combine(losses[0].sum(), losses[1].sum()).backward()

    exact = matrix.detach().clone().requires_grad_()
    logits = linear(hidden, exact).double()
    lm = -logits.log_softmax(-1).transpose(0, 1).gather(-1, labels[..., None])[..., 0]
    kl = kl_div(
        logits.log_softmax(-1), teacher_TBV.double().log_softmax(-1), reduction="none",
        log_target=True,
    ).sum(-1).T  # fmt: skip
    (weight * kl + (1 - weight) * lm).sum().backward()
    assert losses.dtype == torch.float32 and losses.shape == (2, B, T)
    assert (losses[0] - lm).abs().max() < 1e-5 and (losses[1] - kl).abs().max() < 1e-5
    bound = 1e-5 if dtype == torch.float32 else 0.05
    assert (matrix.grad - exact.grad).abs().max() < bound * exact.grad.abs().max()


def make_base(folder: Path, **sizes) -> Path:
    """A checkpoint of a plain model with random weights, of `training_runs.MODEL`'s sizes."""
    from megatron_dmc.checkpoint.description import ModelDescription
    from megatron_dmc.checkpoint.torch_dist_write import write
    from megatron_dmc.checkpoint.weights import StateSource, megatron_shapes

    d = ModelDescription(**{
        "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 4,
        "num_query_groups": 2, "kv_channels": 16, "vocab_size": 127, "padded_vocab_size": 128,
        "max_position_embeddings": 32, **sizes,
    })  # fmt: skip
    state = {
        name: random(*shape, scale=0.3, seed=i).float()
        for i, (name, shape) in enumerate(megatron_shapes(d).items())
    }
    folder.mkdir()
    write(folder, StateSource(state), d)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("teacher") / "base")


UNTIED = [*MODEL, "--untie-embeddings-and-output-weights"]


@pytest.mark.dist
def test_a_run_with_a_teacher(base, tmp_path):
    run = tmp_path / "run"
    flags = ["--dmc-stage", "retrofit", "--dmc-target-cr", "3", "--ckpt-format", "torch_dist",
             "--dmc-no-stage-check",
             "--pretrained-checkpoint", str(base), "--dmc-teacher", str(base), "--save", str(run),
             "--load", str(run), "--save-interval", "2", "--tensorboard-dir", str(tmp_path / "tb"),
             "--lr-decay-style", "constant", "--override-opt_param-scheduler"]  # fmt: skip
    for steps in ("2", "3"):
        done = Forked(
            *flags,
            "--train-iters",
            steps,
            "--dmc-teacher-cache",
            str(tmp_path / "states"),
            model=UNTIED,
        ).wait()
        assert done.returncode == 0, done.stderr[-3000:]
        evaluation = re.findall(
            r"lm loss value: (\S+) [\s\S]*?distillation loss value: (\S+)", done.stdout
        )
        assert len(evaluation) == 2 and all(float(v) > 0 for pair in evaluation for v in pair)
    assert len(logged(done.stdout, "distillation loss")) == 1, "goes on at step 3"
    assert len(list((tmp_path / "states").glob("*.safetensors"))) >= 3
    scalars = tensorboard(tmp_path / "tb")
    kl, lm = scalars["distillation loss"], scalars["lm loss"]
    assert set(kl) == set(lm) == {1, 2, 3} and "compression loss" in scalars
    # the data are random, and the teacher knows them no better than the student
    assert all(0 < kl[step] < 0.5 * lm[step] for step in kl)

    def tensors(folder: Path) -> dict[str, torch.Size]:
        stored = FileSystemReader(folder).read_metadata().state_dict_metadata
        return {
            name: entry.size
            for name, entry in stored.items()
            if hasattr(entry, "size") and not name.startswith(("optimizer", "rng"))
        }

    assert tensors(run / "iter_0000002") == tensors(base / "release")
    from megatron_dmc.checkpoint.load import load_model

    dmc = load_model(run).description.dmc
    assert dmc is not None and not any("teacher" in name for name in dmc.to_dict())


def test_states_that_are_stored_stand_for_the_forward(tmp_path):
    """By tokens, positions, documents, and the teacher; damaged files are made again."""
    from megatron_dmc.model.decisions import GateKey
    from megatron_dmc.training.teacher_states import HiddenStates

    ensure_single_process()
    group = parallel_state.get_tensor_model_parallel_group()
    matrix, forwards = random(V, H), []

    class Counting:
        pg_collection = SimpleNamespace(tp=group)
        share_embeddings_and_output_weights = True

        def shared_embedding_or_output_weight(self):
            return matrix

        def output_layer(self, hidden_states, weight, runtime_gather_output):
            return linear(hidden_states, weight), None

        def _scale_logits(self, logits):
            return 2 * logits

        def __call__(self, tokens, *args, output_processor):
            forwards.append(tokens)
            return output_processor(
                hidden_states=random(T, B, H, seed=int(tokens.sum())), output_layer=self.output_layer,
                output_weight=matrix, scale_logits=self._scale_logits, runtime_gather_output=None,
            )  # fmt: skip

    def logits(tokens, positions, starts=None, *, checkpoint="base", dtype=torch.float64):
        (tmp_path / checkpoint).mkdir(exist_ok=True)
        states = HiddenStates(tmp_path / "states", tmp_path / checkpoint, dtype)
        mask = GateKey(1, len(forwards), 0, 0).to_tensor(starts)
        return Teacher(Counting(), states=states)._logits(tokens, positions, mask)

    ids = torch.arange(B * T).view(B, T)
    first = logits(ids, ids)
    assert torch.equal(logits(ids, ids), first) and len(forwards) == 1
    (file,) = (tmp_path / "states").iterdir()
    others = [
        dict(tokens=ids.flip(0), positions=ids), dict(tokens=ids, positions=ids + 1),
        dict(tokens=ids, positions=ids, starts=[[0], [0, 3]]),
        dict(tokens=ids, positions=ids, checkpoint="other"),
        dict(tokens=ids, positions=ids, dtype=torch.bfloat16),
    ]  # fmt: skip
    for seen, other in enumerate(others, start=1):
        logits(**other)
        assert len(forwards) == seen + 1, other
    file.write_bytes(file.read_bytes()[:50])
    assert torch.equal(logits(ids, ids), first) and len(forwards) == 7
    assert torch.equal(logits(ids, ids), first) and len(forwards) == 7


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--dmc-teacher-cache", "states"], "--dmc-teacher-cache states: give --dmc-teacher too"),
        (["--dmc-teacher", "BASE", "--dmc-teacher-cache", "/dev/null/states"],
         "--dmc-teacher-cache /dev/null/states: Not a directory"),
        (["--dmc-teacher", "/no/such/base"], "--dmc-teacher /no/such/base: no checkpoint there"),
        (["--dmc-teacher", "BASE", "--pipeline-model-parallel-size", "2"],
         "--dmc-teacher with --pipeline-model-parallel-size 2"),
        (["--dmc-teacher", "BASE", "--dmc-teacher-weight", "1.5"], "--dmc-teacher-weight=1.5"),
    ],
)  # fmt: skip
def test_wrong_flags_are_refused_at_once(base, flags, message):
    from argparse import ArgumentParser

    from megatron_dmc.errors import DMCError
    from megatron_dmc.training.arguments import add_dmc_args, check_teacher

    parser = ArgumentParser()
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    args = add_dmc_args(parser).parse_args([str(base) if f == "BASE" else f for f in flags])
    with pytest.raises(DMCError, match=re.escape(message)):
        check_teacher(args)


@pytest.mark.parametrize(
    "change,message",
    [
        ("vocabulary", "vocab_size is 100, and this run's 127"),
        ("layers", "num_layers is 1, and this run's 2"),
        ("dmc", "--dmc-stage finetune; a teacher is a plain model"),
        ("truncated", "truncated"),
        ("metadata", "damaged"),
        ("no tracker", "cannot be read"),
    ],
)
def test_a_checkpoint_that_is_no_teacher_is_named(base, tmp_path, change, message):
    """Errors of `load_teacher` before it builds anything; the run's own arguments describe a valid teacher."""
    from megatron_dmc.config import DMCConfig
    from megatron_dmc.errors import CheckpointError
    from megatron_dmc.model.config import DMCTransformerConfig
    from megatron_dmc.training.teacher import load_teacher

    ensure_single_process()
    args = read_args(base)
    args.dmc_teacher, args.dmc_teacher_weight = str(tmp_path / "teacher"), 1.0
    folder = tmp_path / "teacher"
    sizes = {
        "vocabulary": {"vocab_size": 100},
        "layers": {"num_layers": 1},
        "dmc": {"dmc": DMCConfig(stage="finetune")},
    }
    if change in sizes:
        make_base(folder, **sizes[change])
    else:
        shutil.copytree(base, folder)
        part = max((folder / "release").glob("*.distcp"), key=lambda f: f.stat().st_size)
        if change == "truncated":
            part.write_bytes(part.read_bytes()[:1000])
        elif change == "metadata":
            (folder / "release" / ".metadata").write_bytes(b"no pickle")
        else:
            (folder / "latest_checkpointed_iteration.txt").unlink()
    config = DMCTransformerConfig(num_layers=2, hidden_size=32, num_attention_heads=4)
    with pytest.raises(CheckpointError, match=re.escape(message)) as raised:
        load_teacher(args, config)
    assert str(folder) in str(raised.value)


def read_args(folder: Path):
    from megatron_dmc.checkpoint.torch_dist import iteration_folder, read_common

    return read_common(iteration_folder(folder))["args"]
