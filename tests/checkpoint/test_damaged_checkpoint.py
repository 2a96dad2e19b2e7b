"""Checkpoints that are damaged, unsupported, or have nowhere to go: one clear error, and nothing is lost."""

import os
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from llama_folder import edit_config, save_llama
from safetensors.torch import load_file, save_file

from megatron_dmc.checkpoint.convert import convert
from megatron_dmc.checkpoint.hf_config import from_hf_folder
from megatron_dmc.checkpoint.integrity import (
    MANIFEST,
    forget_checksums,
    verify_checksums,
    write_checksums,
)
from megatron_dmc.checkpoint.load import load_model
from megatron_dmc.checkpoint.megatron_args import from_megatron_args, to_megatron_args
from megatron_dmc.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_dmc.errors import CheckpointError, UnsupportedConfig


@pytest.fixture
def llama(tmp_path) -> Path:
    save_llama(tmp_path / "llama")
    return tmp_path / "llama"


def truncate(file: Path, keep: float) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.99])
def test_truncated_safetensors(llama, tmp_path, keep):
    truncate(llama / "model.safetensors", keep)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated"):
        convert("hf", "megatron", llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_truncated_or_missing_torch_dist_files(llama, tmp_path):
    convert("hf", "megatron", llama, tmp_path / "good")
    # the checksums are for training to read (tests/training/test_resume.py)
    names = [f.name for f in (tmp_path / "good" / "release").iterdir() if f.name != MANIFEST]
    assert any(name.endswith(".distcp") for name in names)
    for i, name in enumerate(names):
        for how in ("truncate", "remove"):
            bad = tmp_path / f"bad-{i}-{how}"
            shutil.copytree(tmp_path / "good", bad)
            file = bad / "release" / name
            if how == "truncate":
                truncate(file, 0.5)
            else:
                file.unlink()
            with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
                load_model(bad)
    (tmp_path / "good" / "latest_checkpointed_iteration.txt").write_text("12")
    with pytest.raises(CheckpointError, match="iter_0000012.*missing"):
        load_model(tmp_path / "good")
    (tmp_path / "good" / "latest_checkpointed_iteration.txt").write_text("nonsense")
    with pytest.raises(CheckpointError, match="nonsense"):
        load_model(tmp_path / "good")


def test_torch_dist_of_other_sizes(llama, tmp_path):
    description = convert("hf", "megatron", llama, tmp_path / "megatron")
    checkpoint = TorchDistCheckpoint(tmp_path / "megatron")
    for change, complaint in [
        (
            {"ffn_hidden_size": 40},
            r"mlp\.linear_fc1\.weight has shape \[2, 160, 96\].*\[2, 80, 96\]",
        ),
        ({"num_layers": 1}, r"has shape \[2, .*say \[1, "),
        ({"share_embeddings_and_output_weights": True}, r"output_layer\.weight is no part"),
    ]:
        other = replace(description, **change)
        with pytest.raises(CheckpointError, match=complaint):
            checkpoint.weights(other)


def test_missing_and_unknown_tensors(llama, tmp_path):
    file = llama / "model.safetensors"
    tensors = load_file(file)
    gone = tensors.pop("model.layers.1.mlp.up_proj.weight")
    tensors["model.layers.1.mlp.up_proj.bias"] = gone[:, 0].clone()
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        load_model(llama)
    assert "missing tensors: model.layers.1.mlp.up_proj.weight" in str(caught.value)
    assert "unknown tensors: model.layers.1.mlp.up_proj.bias" in str(caught.value)


def test_wrong_shape(llama):
    edit_config(llama, intermediate_size=40)
    with pytest.raises(CheckpointError, match=r"gate_proj.weight has shape \[80, 96\].*\[40, 96\]"):
        load_model(llama)


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="neither a Hugging Face folder"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not valid JSON"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"architectures": ["GemmaForCausalLM"]}, "architectures=GemmaForCausalLM.*GeGLU"),
        ({"architectures": ["DeepseekV3ForCausalLM"]}, "latent.*convert a model of one of Llama"),
        ({"architectures": None, "model_type": "falcon"}, "model_type=falcon"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling=.*yarn.*remove"),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, "'linear' with a whole factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "llama3"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_key_value_heads": 3}, "num_query_groups=3"),
        ({"dmc": {"stage": "finetune", "target_cr": 0.5}}, "target-cr"),
        ({"dmc": {"colour": 1}}, "colour"),
        ({"borrowed_rope_pair": 16}, "borrowed_rope_pair=16: .*pairs 0 to 15"),
        ({"borrowed_rope_pair": True}, "borrowed_rope_pair=True must be a whole number"),
        ({"torch_dtype": "float8", "dtype": "float8"}, "float8"),
    ],
)
def test_unsupported_configurations(llama, values, named):
    edit_config(llama, **values)
    with pytest.raises(UnsupportedConfig, match=named):
        load_model(llama)


def test_both_spellings_of_rope(llama):
    edit_config(llama, rope_parameters=None, rope_theta=123456.0)
    assert from_hf_folder(llama).rotary_base == 123456
    edit_config(llama, rope_parameters={"rope_theta": 500000.0, "rope_type": "default"})
    assert from_hf_folder(llama).rotary_base == 500000


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("moe_shared_expert_intermediate_size", 8, "--moe-shared-expert-intermediate-size"),
        ("swiglu", False, "--swiglu"),
        ("add_bias_linear", True, "--disable-bias-linear"),
        ("position_embedding_type", "learned_absolute", "--position-embedding-type"),
        ("qk_l2_norm", True, "--qk-l2-norm"),
        ("rotary_percent", 0.5, "--rotary-percent"),
    ],
)
def test_unsupported_megatron_models(llama, name, value, flag):
    args = Namespace(**vars(to_megatron_args(from_hf_folder(llama))))
    setattr(args, name, value)
    with pytest.raises(UnsupportedConfig, match=flag):
        from_megatron_args(args)


def test_output_is_not_overwritten(llama, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        convert("hf", "megatron", llama, out)
    assert (out / "precious").read_text() == "mine"
    convert("hf", "megatron", llama, out, force=True)
    assert not (out / "precious").exists()
    for inside in (llama, llama / "in", tmp_path):
        with pytest.raises(CheckpointError, match="lies in the source"):
            convert("hf", "megatron", llama, inside, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama", "out"]


def test_disk_full(llama, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    for target in ("write_folder", "torch_dist_write.write"):
        monkeypatch.setattr(f"megatron_dmc.checkpoint.convert.{target}", fail)
    for to_format in ("hf", "megatron"):
        with pytest.raises(CheckpointError, match="disk full"):
            convert("hf", to_format, llama, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["llama"]


def test_checksums_notice_what_changed(tmp_path):
    from megatron.core.dist_checkpointing.validation import verify_integrity_manifest

    for name in ("__0_0.distcp", "__3_1.distcp", "metadata.json"):
        (tmp_path / name).write_bytes(os.urandom(1000))
    verify_checksums(tmp_path)  # none there
    write_checksums(tmp_path)
    verify_checksums(tmp_path)
    verify_integrity_manifest(str(tmp_path))  # Megatron's own check accepts them
    part = tmp_path / "__3_1.distcp"
    data = bytearray(part.read_bytes())
    data[500] ^= 1
    part.write_bytes(data)
    with pytest.raises(CheckpointError, match="__3_1.distcp: its bytes are not those"):
        verify_checksums(tmp_path)
    part.unlink()
    with pytest.raises(CheckpointError, match="__3_1.distcp"):
        verify_checksums(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match=f"{MANIFEST}: damaged"):
        verify_checksums(tmp_path)
    forget_checksums(tmp_path)
    verify_checksums(tmp_path)
