"""Checkpoints: Hugging Face to Megatron and back, loading, the command line."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_models import in_float64
from llama_folder import VOCAB, edit_config, save_llama
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_dmc.checkpoint.convert import convert
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.hf_config import from_hf_folder
from megatron_dmc.checkpoint.hf_folder import write_folder
from megatron_dmc.checkpoint.load import full_forward, load_model, transformer_config
from megatron_dmc.checkpoint.megatron_args import (
    from_megatron_args,
    megatron_flags,
    to_megatron_args,
)
from megatron_dmc.checkpoint.tokenizer import check_vocab, find_tokenizer, load_tokenizer
from megatron_dmc.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_dmc.checkpoint.torch_dist_write import SynchronousSave
from megatron_dmc.checkpoint.weights import megatron_shapes
from megatron_dmc.cli import main as cli
from megatron_dmc.config import DMCConfig
from megatron_dmc.errors import CheckpointError

SENTENCES = [
    "the cache keeps one entry for every token",
    "a segment is a run of tokens merged into one entry",
    "pages are handed out and taken back",
    "importance weighs a token within its segment",
] * 20


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory) -> Path:
    import sentencepiece

    folder = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=40,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


@pytest.fixture
def llama(tmp_path) -> Path:
    save_llama(tmp_path / "llama")
    return tmp_path / "llama"


def tokens(batch: int = 2, length: int = 17) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCAB, (batch, length), generator=generator)


def assert_same_weights(a: Path, b: Path) -> None:
    tensors_a, tensors_b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert set(tensors_a) == set(tensors_b)
    for name, tensor in tensors_a.items():
        assert tensor.dtype == tensors_b[name].dtype, name
        assert torch.equal(tensor, tensors_b[name]), name


# Round trip and logits


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_logits_and_round_trip(tmp_path, groups, tied):
    reference = save_llama(tmp_path / "llama", groups=groups, tied=tied)
    convert("hf", "megatron", tmp_path / "llama", tmp_path / "megatron")
    with torch.no_grad():
        expected = reference(tokens()).logits
    for path in (tmp_path / "llama", tmp_path / "megatron"):
        loaded = load_model(path)
        logits = full_forward(loaded.model, tokens())
        assert logits.shape[-1] == loaded.description.padded_vocab_size == 256
        torch.testing.assert_close(logits[..., :VOCAB], expected, atol=1e-5, rtol=0)
        assert not logits[..., VOCAB:].any()

    convert("megatron", "hf", tmp_path / "megatron", tmp_path / "back")
    assert_same_weights(tmp_path / "llama", tmp_path / "back")
    before, after = (
        LlamaConfig.from_pretrained(tmp_path / name).to_dict() for name in ("llama", "back")
    )
    assert before == after
    with torch.no_grad():
        again = LlamaForCausalLM.from_pretrained(tmp_path / "back")(tokens()).logits
    assert torch.equal(again, expected)


def test_logits_in_float64(llama):
    reference = in_float64(LlamaForCausalLM.from_pretrained(llama)).eval()
    loaded = load_model(llama, dtype=torch.float64)
    with torch.no_grad():
        expected = reference(tokens()).logits
    logits = full_forward(loaded.model, tokens())
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits[..., :VOCAB], expected, atol=1e-10, rtol=0)


def test_bfloat16_keeps_its_bits_and_dtype_converts(tmp_path):
    save_llama(tmp_path / "llama", torch.bfloat16)
    convert("hf", "megatron", tmp_path / "llama", tmp_path / "megatron")
    stored = TorchDistCheckpoint(tmp_path / "megatron").stored
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    convert("megatron", "hf", tmp_path / "megatron", tmp_path / "back")
    assert_same_weights(tmp_path / "llama", tmp_path / "back")
    convert(None, "hf", tmp_path / "megatron", tmp_path / "wide", dtype=torch.float32)
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    assert {t.dtype for t in wide.values()} == {torch.float32}
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    loaded = load_model(tmp_path / "megatron", dtype=torch.float32)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(tmp_path / "back").model.parameters()} == {torch.bfloat16}


def test_sharded_folder(llama, tmp_path):
    description = from_hf_folder(llama)
    loaded = load_model(llama)
    (tmp_path / "sharded").mkdir()
    write_folder(tmp_path / "sharded", loaded.model.state_dict(), description, shard_bytes=100_000)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    convert("hf", "hf", tmp_path / "sharded", tmp_path / "one")
    assert_same_weights(llama, tmp_path / "one")
    shutil.move(next((tmp_path / "sharded").glob("*-00002-*")), tmp_path / "away")
    with pytest.raises(CheckpointError, match=r"model-00002-of-.*missing"):
        load_model(tmp_path / "sharded")


def test_dmc_settings_travel(llama, tmp_path):
    dmc = DMCConfig(stage="finetune", target_cr=3.0, merge_window=12)
    edit_config(llama, dmc=dmc.to_dict())
    convert("hf", "megatron", llama, tmp_path / "megatron")
    assert load_model(tmp_path / "megatron").description.dmc == dmc
    assert load_model(tmp_path / "megatron").model.config.dmc == dmc
    assert load_model(tmp_path / "megatron", dmc=None).description.dmc is None
    convert("megatron", "hf", tmp_path / "megatron", tmp_path / "back")
    assert from_hf_folder(tmp_path / "back").dmc == dmc


# Megatron's own code


def megatron_model(description: ModelDescription) -> GPTModel:
    config = transformer_config(description, dmc=None, dtype=torch.float32)
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=description.padded_vocab_size,
        max_sequence_length=description.max_position_embeddings,
        share_embeddings_and_output_weights=description.share_embeddings_and_output_weights,
        position_embedding_type="rope",
    )


def test_megatron_loads_what_convert_writes_and_back(llama, tmp_path):
    description = convert("hf", "megatron", llama, tmp_path / "megatron")
    expected = load_model(llama).model.state_dict()
    model = megatron_model(description)
    metadata = {"singleton_local_shards": False}
    state, left_out, not_stored = dist_checkpointing.load(
        {"model": model.sharded_state_dict(metadata=metadata)},
        str(tmp_path / "megatron" / "release"),
        strict="return_all",
    )
    assert not not_stored
    assert all("_extra_state" in key for key in left_out), "what Transformer Engine asks for"
    assert state["checkpoint_version"] == 3.0
    assert state["args"].no_save_optim
    model.load_state_dict(state["model"])
    for name in megatron_shapes(description):
        assert torch.equal(model.state_dict()[name], expected[name]), name

    folder = tmp_path / "trained" / "iter_0000007"
    folder.mkdir(parents=True)
    (tmp_path / "trained" / "latest_checkpointed_iteration.txt").write_text("7")
    args = to_megatron_args(description)
    args.vocab_size = None  # as a run with a tokenizer has it
    dist_checkpointing.save(
        {"model": model.sharded_state_dict(metadata=metadata), "args": args, "iteration": 7},
        str(folder),
        SynchronousSave(),
    )
    checkpoint = TorchDistCheckpoint(tmp_path / "trained")
    assert checkpoint.iteration == 7
    for path in (tmp_path / "trained", folder):
        loaded = load_model(path)
        assert loaded.description.vocab_size == 256, "no tokenizer: all rows"
        for name in megatron_shapes(description):
            assert torch.equal(loaded.model.state_dict()[name], expected[name]), name


PARALLEL_SAVE = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron_dmc.checkpoint.hf_config import from_hf_folder
from megatron_dmc.checkpoint.megatron_args import to_megatron_args
from megatron_dmc.checkpoint.torch_dist_write import SynchronousSave
from megatron_dmc.checkpoint.load import transformer_config

folder = Path(sys.argv[1])
dist.init_process_group("gloo")
d = from_hf_folder(folder / "llama")
metadata = {"singleton_local_shards": False}
for tp, pp in [(2, 1), (1, 2)]:
    parallel_state.initialize_model_parallel(tp, pp)
    config = transformer_config(d, dmc=None, dtype=torch.float32)
    config.tensor_model_parallel_size, config.pipeline_model_parallel_size = tp, pp
    config.pipeline_dtype = torch.float32
    model = GPTModel(config, get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=d.padded_vocab_size, max_sequence_length=64, position_embedding_type="rope",
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage())
    state = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata)},
        str(folder / "megatron" / "release"))
    model.load_state_dict(state["model"])
    dist_checkpointing.save({"model": model.sharded_state_dict(metadata=metadata),
        "args": to_megatron_args(d), "iteration": 1},
        str(folder / f"tp{tp}pp{pp}" / "iter_0000001"), SynchronousSave())
    parallel_state.destroy_model_parallel()
"""


def test_saved_in_parallel_read_in_one_process(llama, tmp_path):
    convert("hf", "megatron", llama, tmp_path / "megatron")
    layouts = ["tp2pp1", "tp1pp2"]
    for layout in layouts:
        (tmp_path / layout / "iter_0000001").mkdir(parents=True)
        (tmp_path / layout / "latest_checkpointed_iteration.txt").write_text("1")
    script = tmp_path / "save.py"
    script.write_text(PARALLEL_SAVE)
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         script, tmp_path],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    for layout in layouts:
        convert(None, "hf", tmp_path / layout, tmp_path / f"{layout}-back")
        assert_same_weights(llama, tmp_path / f"{layout}-back")


@pytest.mark.parametrize("pair", [None, 3])
def test_megatron_flags_are_accepted_and_say_the_same(llama, pair):
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    from megatron_dmc.training.arguments import add_dmc_args

    description = replace(from_hf_folder(llama), borrowed_rope_pair=pair)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    args = add_dmc_args(add_megatron_arguments(parser)).parse_args(megatron_flags(description))
    again = from_megatron_args(args)
    assert replace(description, bos_token_id=None, eos_token_id=None) == again
    saved = to_megatron_args(description)
    assert from_megatron_args(saved) == description


# Tokenizers


def test_tokenizer_travels(llama, tmp_path, sentencepiece_model, caplog):
    shutil.copyfile(sentencepiece_model, llama / "tokenizer.model")
    convert("hf", "megatron", llama, tmp_path / "megatron")
    convert("megatron", "hf", tmp_path / "megatron", tmp_path / "back")
    for path in (llama, tmp_path / "megatron", tmp_path / "back"):
        tokenizer = load_model(path).tokenizer
        assert tokenizer is not None
        assert tokenizer.vocab_size == 40
        assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
        assert tokenizer.decode(tokenizer.encode(SENTENCES[0])) == SENTENCES[0]

    small = replace(from_hf_folder(llama), vocab_size=30)
    check_vocab(load_tokenizer(llama), small)
    assert "40 token ids, the model's vocabulary 30" in caplog.text


def test_tokenizer_found_through_saved_arguments(llama, tmp_path, sentencepiece_model):
    description = convert("hf", "megatron", llama, tmp_path / "megatron")
    args = to_megatron_args(description)
    assert from_megatron_args(args).vocab_size == VOCAB
    args.vocab_size = None
    assert from_megatron_args(args, vocab_size=40).vocab_size == 40
    assert find_tokenizer(tmp_path / "megatron", args) is None
    args.tokenizer_model = str(sentencepiece_model)
    assert find_tokenizer(tmp_path / "megatron", args) == sentencepiece_model


def test_transformers_tokenizer(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, "the": 2, "cache": 3, "<unk>": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("the cache") == [2, 3]
    assert loaded.decode([0, 2, 3, 1]) == "the cache"
    assert (loaded.bos_id, loaded.eos_id, loaded.vocab_size) == (0, 1, 5)


def test_tokenizer_missing_or_damaged(tmp_path):
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"no model at all")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: not a sentencepiece model"):
        load_tokenizer(tmp_path)


# Command line


def test_cli_converts(llama, tmp_path, capsys):
    assert cli.main(["convert", "--to", "megatron", str(llama), str(tmp_path / "m")]) == 0
    assert "2 layers of 96" in capsys.readouterr().out
    assert cli.main(["convert", "--to", "hf", str(tmp_path / "m"), str(tmp_path / "back"),
                     "--dtype", "bfloat16"]) == 0  # fmt: skip
    with safe_open(tmp_path / "back" / "model.safetensors", "pt") as f:
        assert f.get_tensor("model.norm.weight").dtype == torch.bfloat16


def test_cli_error_is_one_line(tmp_path):
    command = [sys.executable, "-m", "megatron_dmc.cli.main", "convert", "--to", "hf"]
    run = subprocess.run(
        [*command, str(tmp_path / "nowhere"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    lines = [line for line in run.stderr.splitlines() if line.startswith("megatron-dmc:")]
    assert lines == [f"megatron-dmc: error: {tmp_path / 'nowhere'}: no such checkpoint folder"]
    assert "Traceback" not in run.stderr


def test_cli_help_is_quick():
    code = "import sys; from megatron_dmc.cli.main import build_parser as build; build(); "
    code += "print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
