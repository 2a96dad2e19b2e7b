"""Every model family, tiny and random, made on the spot by transformers: bits, logits, tokens."""

import json
import os
import stat
from dataclasses import replace

import pytest
import torch
from family_cases import CASES, VOCAB, save, tokens, weights
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.checkpoint.convert import convert
from megatron_dmc.checkpoint.families import FAMILIES
from megatron_dmc.checkpoint.hf_config import from_hf_config
from megatron_dmc.checkpoint.load import full_forward, load_model, rotary_embedding
from megatron_dmc.checkpoint.megatron_args import (
    from_megatron_args,
    megatron_flags,
    to_megatron_args,
)
from megatron_dmc.checkpoint.torch_dist import TorchDistCheckpoint
from megatron_dmc.checkpoint.weights import join, megatron_shapes, shard
from megatron_dmc.errors import UnsupportedConfig


def test_every_family_has_a_case():
    tested = {config.model_type for config in CASES.values()}
    assert tested == {family.model_type for family in FAMILIES}


@pytest.mark.parametrize("case", CASES)
def test_bits_logits_and_tokens(case, tmp_path):
    reference = save(CASES[case], tmp_path / "hf")
    description = convert(None, "megatron", tmp_path / "hf", tmp_path / "megatron")
    assert description.model_type == CASES[case].model_type
    with torch.no_grad():
        expected = reference(tokens()).logits
    loaded = load_model(tmp_path / "megatron")
    logits = full_forward(loaded.model, tokens())[..., :VOCAB]
    assert expected.std() > 0.2, "a case with flat logits shows nothing"
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=0)

    convert(None, "hf", tmp_path / "megatron", tmp_path / "back")
    before, after = weights(tmp_path / "hf"), weights(tmp_path / "back")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    configs = [AutoConfig.from_pretrained(tmp_path / p).to_dict() for p in ("hf", "back")]
    for config in configs:
        del config["_name_or_path"]
    assert configs[0] == configs[1]

    prompts = [tokens()[0, :n].tolist() for n in (1, 9, 40)]
    outputs = LLM(loaded, max_model_len=64, max_num_batched_tokens=16, device="cpu").generate(
        [{"prompt_token_ids": p} for p in prompts],
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        use_tqdm=False,
    )
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    for prompt, output in zip(prompts, outputs, strict=True):
        ids = torch.tensor([prompt])
        theirs = back.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12,
            min_new_tokens=12, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        assert output.outputs[0].token_ids == theirs[0, len(prompt) :].tolist()


def test_scaled_rope_is_not_plain_rope(tmp_path):
    """RoPE scaling matters in the case of Llama 3: without it the logits differ."""
    reference = save(CASES["llama3"], tmp_path / "hf")
    loaded = load_model(tmp_path / "hf")
    plain = replace(loaded.description, rope_scaling_factor=None)
    loaded.model.rotary_pos_emb = rotary_embedding(plain, "cpu")
    with torch.no_grad():
        expected = reference(tokens()).logits
    assert (full_forward(loaded.model, tokens())[..., :VOCAB] - expected).abs().max() > 0.01


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [2, 4])
def test_shards_join(case, size):
    """Tensor-parallel shards of every tensor, put together, are the tensor."""
    d = from_hf_config(CASES[case].to_dict() | {"architectures": None})
    for name, shape in megatron_shapes(d).items():
        whole = torch.arange(torch.Size(shape).numel()).float().view(shape)
        out = torch.empty_like(whole)
        join(name, [shard(name, whole, size, rank) for rank in range(size)], out)
        assert torch.equal(out, whole), name


@pytest.mark.parametrize("case", ["qwen3", "mixtral"])
def test_megatron_loads_what_was_written(case, tmp_path):
    """Megatron's own loading finds every tensor under the names that its model asks for."""
    from megatron.core import dist_checkpointing

    save(CASES[case], tmp_path / "hf")
    convert(None, "megatron", tmp_path / "hf", tmp_path / "megatron")
    model = load_model(tmp_path / "hf").model
    expected = {k: v.clone() for k, v in model.state_dict().items() if v is not None}
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    state, left_out, not_stored = dist_checkpointing.load(
        {"model": model.sharded_state_dict(metadata={"singleton_local_shards": False})},
        str(tmp_path / "megatron" / "release"),
        strict="return_all",
    )
    assert not not_stored
    # what Transformer Engine's modules ask for
    assert all(
        "_extra_state" in k or k == "decoder.layers.pre_mlp_layernorm.weight" for k in left_out
    )
    model.load_state_dict(state["model"])
    for name, tensor in expected.items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_experts_that_are_stored_one_by_one(tmp_path):
    """Layers and experts that Megatron did not stack are found too."""
    from megatron.core import dist_checkpointing

    from megatron_dmc.checkpoint.torch_dist_write import SynchronousSave

    save(CASES["mixtral"], tmp_path / "hf")
    loaded = load_model(tmp_path / "hf")
    folder = tmp_path / "saved" / "iter_0000003"
    folder.mkdir(parents=True)
    sharded = loaded.model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    dist_checkpointing.save(
        {"model": sharded, "args": to_megatron_args(loaded.description), "iteration": 3},
        str(folder), SynchronousSave(),
    )  # fmt: skip
    assert any(
        k.startswith("decoder.layers.1.mlp.experts") for k in TorchDistCheckpoint(folder).stored
    )
    convert("megatron", "hf", folder, tmp_path / "back")
    before, after = weights(tmp_path / "hf"), weights(tmp_path / "back")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_megatron_flags_say_the_same(tmp_path):
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    for config in CASES.values():
        d = from_hf_config(config.to_dict() | {"architectures": None})
        parser = argparse.ArgumentParser(allow_abbrev=False)
        add_megatron_arguments(parser)
        again = from_megatron_args(parser.parse_args(megatron_flags(d)))
        # Megatron has no flag for a family that computes as another does, nor for special tokens
        same = {"model_type", "bos_token_id", "eos_token_id", "pad_token_id"}
        assert replace(again, **{n: getattr(d, n) for n in same}) == d
        assert from_megatron_args(to_megatron_args(d)) == d


@pytest.mark.parametrize(
    ("case", "values", "named"),
    [
        ("mistral", {"sliding_window": 128}, "sliding_window=128 .*max_position_embeddings=512"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
         "sliding_window=64"),
        ("qwen3-moe", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]"),
        ("qwen3-moe", {"num_experts_per_tok": 9}, "moe_router_topk=9.*num_experts=4"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True"),
        ("qwen2", {"quantization_config": {"bits": 4}}, "dequantize"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_written(case, values, named, tmp_path):
    save(CASES[case], tmp_path / "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(UnsupportedConfig, match=named):
        convert(None, "megatron", tmp_path / "hf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("case", "values"),
    [
        ("mistral", {"sliding_window": 512}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 64}),
    ],
)
def test_a_window_without_effect_is_no_window(case, values):
    config = CASES[case].to_dict() | {"architectures": None, "layer_types": None} | values
    assert from_hf_config(config).model_type == CASES[case].model_type


def test_absent_keys_mean_what_transformers_takes():
    """A config.json of a few keys is read as transformers reads it."""
    for config in CASES.values():
        kept = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "head_dim",
                "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
                "num_local_experts", "num_experts", "num_experts_per_tok",
                "moe_intermediate_size")  # fmt: skip
        short = {k: v for k, v in config.to_dict().items() if k in kept}
        short["sliding_window"] = None
        full = type(config)(**{k: v for k, v in short.items() if k != "model_type"}).to_dict()
        if config.model_type in ("mistral", "mixtral", "qwen3_moe", "qwen2", "qwen3"):
            short["num_key_value_heads"] = full["num_key_value_heads"] = 2
        full["architectures"] = None
        assert from_hf_config(short) == from_hf_config(full)


def test_tensors_are_read_in_blocks(tmp_path, monkeypatch):
    """A block of a few rows, of one row, and of less than one give what a whole tensor gives."""
    save(CASES["mixtral"], tmp_path / "hf")
    for size in (1, 200, 3000):
        monkeypatch.setattr("megatron_dmc.checkpoint.hf_tensors.BLOCK_BYTES", size)
        convert(None, "hf", tmp_path / "hf", tmp_path / f"out{size}")
        before, after = weights(tmp_path / "hf"), weights(tmp_path / f"out{size}")
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_files_have_the_mode_that_the_umask_gives(tmp_path):
    save(CASES["qwen2"], tmp_path / "hf")
    before = os.umask(0o027)
    try:
        convert(None, "hf", tmp_path / "hf", tmp_path / "out")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "out").iterdir()}
    assert modes == {0o640}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
