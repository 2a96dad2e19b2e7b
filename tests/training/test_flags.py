"""Flags of Megatron: every one is on the list, what it lists as refused is, and what works has an effect."""

import functools
import importlib.metadata
import json
import re
from argparse import Namespace

import pytest
import torch
from megatron.core.transformer.identity_op import IdentityOp
from training_runs import MODEL, ROOT, Forked, logged

from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.training import flags, plain, step

STATUS = {"tested", "megatron", "same", "off", "refused"}
OF_KITCHEN = "kitchen"  # flags that are there only where NVIDIA's Kitchen is installed
DMC = ("--dmc-stage", "finetune")


@functools.cache
def run(*given: str, model: tuple[str, ...] = tuple(MODEL)) -> tuple[tuple[float, ...], str]:
    """Losses of three steps, and the output."""
    done = Forked("--train-iters", "3", *given, model=list(model)).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    return tuple(logged(done.stdout, "lm loss")), done.stdout


def refusal(*given: str) -> str:
    """The one line with which a run ends before it starts."""
    done = Forked("--train-iters", "3", *given).wait()
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode == 2 and len(errors) == 1, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return errors[0]


def test_every_flag_is_on_the_list():
    """Fails when a new version of Megatron brings a flag, or drops one."""
    listed = [flag for group in flags.flag_table() for flag in group.flags]
    assert len(listed) == len(set(listed)), "a flag is listed twice"
    assert {group.status for group in flags.flag_table()} == STATUS
    assert all(g.why for g in flags.flag_table() if g.status in ("same", "off", "refused"))
    parser = {a.option_strings[0]: a for a in flags.flag_parser()._actions if a.dest != "help"}
    names = {flag for flag in listed if "=" not in flag}
    unlisted = {flag for flag in set(parser) - names if not flag.startswith(flags.OWN)}
    assert sorted(unlisted) == [], "say in flags.toml what they do"
    assert [f for f in sorted(names - set(parser)) if OF_KITCHEN not in f] == [], "gone"
    for flag in set(listed) - names:
        name, value = flag.split("=")
        assert value in map(str, parser[name].choices), flag


def test_flags_listed_as_tested_are():
    here = {path: path.read_text() for path in (ROOT / "tests").rglob("*.py")}
    here |= {path: path.read_text() for path in (ROOT / "tests").rglob("*.sh")}
    here[ROOT / "examples/demo.py"] = (
        ROOT / "examples/demo.py"
    ).read_text()  # run by test_commands
    here[ROOT / "tests/training/test_flags.py"] = here[ROOT / "tests/training/test_flags.py"].split(
        "\nLLAMA3_8B ="
    )[0]
    text = "\n".join(here.values())
    tested = [f for g in flags.flag_table() if g.status == "tested" for f in g.flags]
    assert [flag for flag in tested if not re.search(rf"(?<![-\w]){flag}(?![-\w])", text)] == []


def test_the_list_is_of_the_installed_megatron():
    version = importlib.metadata.version("megatron-core")
    assert f"Megatron-LM {version} " in flags.TABLE.read_text()


def value_for(action) -> list[str]:
    """A value of a flag that is not its default."""
    if action.nargs == 0 or isinstance(action.default, bool):
        return []
    if action.choices:
        return [next(str(c) for c in action.choices if c != action.default)]
    count = action.nargs if isinstance(action.nargs, int) else 1
    for value in ("7", "[1,0]", "7,7", "attn"):
        if action.type is None or not _fails(action.type, value):
            return [value] * count
    raise AssertionError(action)


def _fails(convert, value: str) -> bool:
    try:
        convert(value)
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError):
        return True
    return False


@pytest.mark.parametrize("stage", ["off", "finetune"])
def test_every_refused_flag_is_refused(stage):
    """Each by itself, with a value that is not its default; what the other stage refuses passes."""
    parser = flags.flag_parser()
    actions = {a.option_strings[0]: a for a in parser._actions}
    checked = 0
    for group in flags.flag_table():
        refuses = group.status == "refused" or (group.status == "off" and stage != "off")
        if group.status not in ("refused", "off"):
            continue
        for flag in group.flags:
            name, _, value = flag.partition("=")
            given = [name, value] if value else [name, *value_for(actions[name])]
            if parser.parse_args(given) == parser.parse_args([]):
                given = [actions[name].option_strings[-1]]  # --no-...
            if refuses:
                with pytest.raises(UnsupportedConfig) as error:
                    flags.check_listed(["--dmc-stage", stage, *given])
                assert group.why in str(error.value)
                named = str(error.value).split()[0].rstrip(":")
                assert actions[named].dest == actions[name].dest
            else:
                flags.check_listed(["--dmc-stage", stage, *given])
            checked += 1
    assert checked > 300


def test_a_flag_that_is_not_listed_is_refused(monkeypatch):
    monkeypatch.setattr(flags, "flag_table", tuple)
    with pytest.raises(
        UnsupportedConfig, match=r"--micro-batch-size 3: .*flags.toml does not list"
    ):
        flags.check_listed(["--micro-batch-size", "3"])
    flags.check_listed(["--lr-warmup-init", "0.0"])  # its default


def test_checkpoint_arguments_are_looked_at():
    """`--use-checkpoint-args` brings flags that the command line does not have."""
    args = flags.flag_parser().parse_args(["--use-checkpoint-args", *DMC])
    flags.check_combinations(args)
    args.spec = ["some.module", "spec"]
    with pytest.raises(UnsupportedConfig, match=r"^--spec .*not with --dmc-stage finetune"):
        flags.check_combinations(args)


@pytest.mark.parametrize(
    "given,message",
    [
        (["--inprocess-restart"], "--inprocess-restart: it restarts the training function"),
        (["--logits-load-dir", "logits"], "--logits-load-dir logits: .*use --dmc-teacher"),
        (["--log-straggler"], "--log-straggler: it times kernels with CUDA events"),
        (["--multiple-validation-sets"], "work in Megatron 0.19.2 only together"),
        (["--full-validation"], "work in Megatron 0.19.2 only together"),
        (["--dataloader-inter-document-masking"], "only from Transformer Engine"),
        ([*DMC, "--spec", "module", "spec"], "not with --dmc-stage finetune"),
        ([*DMC, "--no-rope-freq", "2"], "--no-rope-freq .*the engine rotates"),
        ([*DMC, "--position-embedding-type", "yarn", "--mscale", "2"], "not with --dmc-stage"),
        ([*DMC, "--window-size", "8,0"], r"--window-size \(8, 0\): not with --dmc-stage finetune"),
        ([*DMC, "--softmax-type", "learnable"], "--softmax-type learnable: not with"),
        # not named by the reports
        (["--batch-size", "2"], "--batch-size 2: removed from Megatron; use --micro-batch-size"),
        (["--qk-l2-norm"], "Megatron's builder leaves the norm out"),
        ([*DMC, "--cuda-graph-impl", "local"], "--cuda-graph-impl local: not with"),
    ],
)
def test_named_flags_are_refused(given, message):
    assert re.search(message, refusal(*given))


@pytest.mark.parametrize(
    "given",
    [
        ["--window-size", "4,0"],
        ["--softmax-type", "off-by-one"],
        ["--attention-dropout", "0.5"],
        ["--no-rope-freq", "2"],
        ["--reset-attention-mask"],
        ["--mtp-num-layers", "1"],
        ["--spec", "test_flags", "spec_without_norm"],
    ],
    ids=lambda given: given[0],
)
def test_flags_of_attention_have_an_effect_without_dmc(given):
    """They are Megatron's there, and so are model and step."""
    assert run(*given)[0] != run()[0]


def spec_without_norm(model, vp_stage=None):
    """A layer spec for `--spec` with other layers than the default ones."""
    spec = plain.default_layer_spec(model, vp_stage)
    spec.submodules.input_layernorm = IdentityOp
    return spec


@pytest.mark.parametrize(
    "given,values",
    [
        (["--position-embedding-type", "yarn", "--rotary-scaling-factor", "4", "--mscale"], "12"),
        (["--use-rope-scaling", "--rope-scaling-factor"], ["2", "16"]),
    ],
    ids=["mscale", "rope-scaling-factor"],
)
def test_values_of_rope_have_an_effect_without_dmc(given, values):
    one, other = (run(*given, value)[0] for value in values)
    assert one != other


@pytest.mark.dist
@pytest.mark.parametrize(
    "given,layout",
    [
        (["--check-for-spiky-loss"], ["--tensor-model-parallel-size", "2", "--sequence-parallel"]),
        (DMC, ["--context-parallel-size", "2"]),
        (DMC, ["--tensor-model-parallel-size", "2", "--eval-micro-batch-size", "1"]),
    ],
    ids=["plain-tp2-sp", "dmc-cp2", "dmc-tp2-eval"],
)
def test_two_ranks_have_the_losses_of_one(given, layout):
    done = Forked("--train-iters", "3", *given, *layout, processes=2).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    assert logged(done.stdout, "lm loss") == pytest.approx(run(*given)[0], rel=1e-5)
    assert validation(done.stdout) == pytest.approx(validation(run(*given)[1]), rel=1e-5)


def validation(out: str) -> float:
    return float(re.findall(r"on validation set \| lm loss value: (\S+)", out)[0])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Random documents of 3 to 19 tokens, and made-up conversations."""
    import numpy
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    folder = tmp_path_factory.mktemp("corpus")
    generator = torch.Generator().manual_seed(0)
    for name, documents in (("train", 200), ("one", 20), ("two", 30)):
        builder = IndexedDatasetBuilder(f"{folder}/{name}.bin", dtype=numpy.uint16)
        for _ in range(documents):
            length = int(torch.randint(3, 20, (1,), generator=generator))
            builder.add_document(torch.randint(0, 126, (length,), generator=generator), [length])
        builder.finalize(f"{folder}/{name}.idx")
    turns = [("system", "s "), ("user", "hi "), ("assistant", "def f(x): return 1\n")]
    talk = [{"role": role, "content": text} for _ in range(3) for role, text in turns]
    (folder / "talk.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 40)
    return folder


def of_files(*tokenizer: str) -> tuple[str, ...]:
    """`MODEL` without mock data and, if another is given, without its tokenizer."""
    left = list(MODEL)
    left.remove("--mock-data")
    for flag in ("--split", *(("--tokenizer-type", "--vocab-size") if tokenizer else ())):
        del left[left.index(flag) : left.index(flag) + 2]
    return (*left, *tokenizer)


def paths(corpus, train="train", *valid: str) -> list[str]:
    named = [str(corpus / name) for name in valid or ("one",)]
    return ["--train-data-path", str(corpus / train), "--valid-data-path", *named]


@pytest.mark.parametrize("stage", ["finetune", "zero-out"])
def test_documents_are_kept_apart(corpus, stage):
    """--dataloader-inter-document-masking: at every document's end, with or without an end token."""
    given = ["--dmc-stage", stage, *paths(corpus)]
    together = run(*given, model=of_files())[0]
    apart = run(*given, "--dataloader-inter-document-masking", model=of_files())[0]
    assert abs(apart[0] - together[0]) > 1e-4


def test_every_validation_set_is_evaluated(corpus):
    given = paths(corpus, "train", "one", "two")
    _, out = run(
        *given, *DMC, "--full-validation", "--multiple-validation-sets", model=of_files()
    )  # fmt: skip
    assert "validation-0 loss at iteration 3" in out and "validation-1 loss at iteration 3" in out


def test_pairs_that_do_not_work_are_refused():
    """Read from parsed flags; Megatron fills in the size of evaluation's microbatches."""

    def check(*given):
        args = flags.flag_parser().parse_args(list(given))
        args.eval_micro_batch_size = 2
        flags.check_combinations(args)

    sets = ["--full-validation", "--multiple-validation-sets", "--train-data-path", "t"]
    check(*sets, "--valid-data-path", "v")
    for given, message in [
        ([*sets, "--valid-data-path", "v", "--test-data-path", "t"], "no test set"),
        ([*sets, "--valid-data-path", "v", "--tensor-model-parallel-size", "2"],
         "--eval-micro-batch-size 2: .*give --eval-micro-batch-size 1"),
        (["--reset-attention-mask", "--transformer-impl", "transformer_engine"],
         "--dataloader-inter-document-masking"),
        (["--reset-attention-mask", "--transformer-impl", "local", "--window-size", "4,0"],
         "takes the window for the whole mask"),
        (["--sft", "--reset-position-ids", "--transformer-impl", "transformer_engine"],
         "kept apart already"),
        (["--fim-data", "--mock-data"], "mock data has no text"),
    ]:  # fmt: skip
        with pytest.raises(UnsupportedConfig, match=message):
            check(*given)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> tuple[str, ...]:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    words = AutoTokenizer.from_pretrained(ROOT / "examples/models/stdlib-llama-3m")
    names = [f"<fim_{name}>" for name in ("prefix", "middle", "suffix", "pad")]
    words.add_special_tokens({"additional_special_tokens": names})
    words.save_pretrained(folder)
    return "--tokenizer-model", str(folder)


@pytest.mark.parametrize("stage", ["finetune", "off"])
def test_filling_in_the_middle(corpus, tokenizer, stage):
    model = of_files("--tokenizer-type", "HuggingFaceTokenizer", *tokenizer)
    given = ["--dmc-stage", stage, *paths(corpus), "--data-cache-path", str(corpus / "cache")]
    middle = ["--fim-data", "--fim-rate", "1", "--fim-eod-token", "</s>"]
    assert run(*given, *middle, model=model)[0] != run(*given, model=model)[0]


def test_conversations(corpus, tokenizer):
    pytest.importorskip("datasets")
    model = of_files("--tokenizer-type", "SFTTokenizer", *tokenizer)
    given = [*DMC, *paths(corpus, "talk.jsonl", "talk.jsonl")]
    losses, _ = run(*given, "--sft", "--sft-tokenizer-prompt-format", "identity", model=model)
    assert losses[2] < losses[0] - 0.3, "the same conversation again and again is learned"


def test_a_spike_of_the_loss_is_reported(monkeypatch, caplog):
    """With Megatron's own state machine: it takes the largest of 100 losses for normal."""
    from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine

    machine = RerunStateMachine(mode=RerunMode.DISABLED)
    args = Namespace(check_for_nan_in_loss_and_grad=True, check_for_spiky_loss=True)
    monkeypatch.setattr(step, "get_rerun_state_machine", lambda: machine)
    monkeypatch.setattr(step, "get_args", lambda: args)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for _ in range(100):
        step.check_loss(torch.tensor(4.0))
    step.check_loss(torch.tensor(39.0))
    assert "spiky loss" not in caplog.text
    step.check_loss(torch.tensor(41.0))
    assert "spiky loss" in caplog.text
    with pytest.raises(RuntimeError, match="found NaN in the loss"):
        step.check_loss(torch.tensor(float("nan")))


LLAMA3_8B = """
--use-mcore-models --num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32
--group-query-attention --num-query-groups 8 --kv-channels 128 --seq-length 8192
--max-position-embeddings 8192 --position-embedding-type rope --rotary-base 1000000 --rotary-percent 1.0
--attention-dropout 0.0 --hidden-dropout 0.0 --swiglu --init-method-std 0.0134 --attention-backend fused
--apply-layernorm-1p --untie-embeddings-and-output-weights --disable-bias-linear --normalization RMSNorm
--micro-batch-size 1 --global-batch-size 128 --train-samples 1953125000 --lr-decay-samples 1949218748
--lr-warmup-samples 3906252 --lr 0.00015 --min-lr 0.00001 --decoupled-lr 5.0e-4 --decoupled-min-lr 4.5e-5
--lr-decay-style cosine --clip-grad 1.0 --weight-decay 0.1 --adam-beta1 0.9 --adam-beta2 0.95 --bf16
--grad-reduce-in-bf16 --cross-entropy-loss-fusion --calculate-per-token-loss --manual-gc
--empty-unused-memory-level 1 --exit-duration-in-mins 235 --tensor-model-parallel-size 1
--context-parallel-size 1 --sequence-parallel --use-distributed-optimizer --overlap-grad-reduce
--overlap-param-gather --fp8-format hybrid --fp8-amax-history-len 1024 --fp8-amax-compute-algo max
--fp8-param-gather --mock-data --tokenizer-type NullTokenizer --vocab-size 128256
--data-cache-path cache --tiktoken-pattern v2 --no-create-attention-mask-in-dataloader
--no-mmap-bin-files --num-workers 1 --log-interval 1 --eval-iters 32 --eval-interval 100
--save-interval 1000 --log-throughput --profile --profile-step-start 4 --profile-step-end 6
--ckpt-format torch_dist --distributed-timeout-minutes 60 --save save --load load --tensorboard-dir tb
"""
"""Of NVIDIA's examples/llama (8B, FP8)."""

MIXTRAL = """
--use-mcore-models --disable-bias-linear --seq-length 4096 --max-position-embeddings 32768 --num-layers 32
--hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --init-method-std 0.01
--attention-dropout 0.0 --hidden-dropout 0.0 --normalization RMSNorm --position-embedding-type rope --swiglu
--untie-embeddings-and-output-weights --group-query-attention --num-query-groups 8
--no-masked-softmax-fusion --no-position-embedding --rotary-base 1000000 --num-experts 8
--moe-router-topk 2 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
--moe-grouped-gemm --moe-token-dispatcher-type alltoall --overlap-param-gather --overlap-grad-reduce
--tokenizer-type Llama2Tokenizer --split 99990,8,2 --micro-batch-size 1 --global-batch-size 256 --lr 1e-4
--train-iters 500000 --lr-decay-iters 320000 --lr-decay-style cosine --min-lr 1.0e-5 --weight-decay 0.1
--lr-warmup-iters 500 --clip-grad 1.0 --bf16 --tensor-model-parallel-size 1
--pipeline-model-parallel-size 4 --expert-model-parallel-size 8 --use-distributed-optimizer
--sequence-parallel --log-interval 1 --save-interval 10000 --eval-interval 1000 --eval-iters 10
--no-load-optim --no-load-rng --data-path data --wandb-project Mixtral --wandb-exp-name name
"""
"""Of NVIDIA's examples/mixtral."""

LARGER = """
--tensor-model-parallel-size 8 --pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 5
--tp-comm-overlap --overlap-p2p-communication-warmup-flush --microbatch-group-size-per-virtual-pipeline-stage 4
--recompute-activations --recompute-granularity selective --recompute-modules core_attn
--distributed-timeout-minutes 60 --num-dataset-builder-threads 4 --dist-ckpt-strictness log_all
--ckpt-fully-parallel-load --async-save --use-rope-scaling --rerun-mode disabled --check-for-spiky-loss
--log-params-norm --log-num-zeros-in-grad --log-timers-to-tensorboard --log-validation-ppl-to-tensorboard
--use-precision-aware-optimizer --timing-log-option minmax --exit-signal-handler --no-check-for-nan-in-loss-and-grad
"""
"""Additional checks of larger layouts."""


@pytest.mark.parametrize("stage", ["off", "retrofit"])
@pytest.mark.parametrize("script", [LLAMA3_8B, MIXTRAL, LARGER], ids=["8b", "moe", "larger"])
def test_flags_of_real_scripts_pass(script, stage):
    flags.check_listed([*script.split(), "--dmc-stage", stage])
