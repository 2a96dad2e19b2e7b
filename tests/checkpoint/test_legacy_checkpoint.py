"""Megatron's `torch` format and the released DMC checkpoints, on files written here.

The released files were not available. They are known by the code that saves them
(NVIDIA/Megatron-LM, branch dmc: `get_checkpoint_name`, `generate_state_dict`, Transformer Engine's
layer spec, the flags of examples/dmc/train.sh), and `save` below does the same for a tiny model.
"""

import io
import random
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.enums import ModelType

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.checkpoint.convert import convert
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.hf_config import from_hf_folder
from megatron_dmc.checkpoint.load import LoadedModel, build_model, full_forward, load_model
from megatron_dmc.cli import main as cli
from megatron_dmc.config import DMCConfig
from megatron_dmc.errors import CheckpointError, UnsupportedConfig
from megatron_dmc.quality.likelihood import DecisionTrace, traced_forward

VOCAB, LAYERS, HEADS, DIM, HIDDEN, FFN = 256, 4, 4, 8, 32, 48
RELEASED = DMCConfig(stage="finetune", target_cr=8.0, alpha_offset=5.0, merge_window=12)


def by_hand(dmc: DMCConfig | None = RELEASED, *, groups: int = HEADS) -> LoadedModel:
    """A model whose weights are set here, with decisions on both sides of the offset."""
    description = ModelDescription(
        num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=HEADS,
        num_query_groups=groups, kv_channels=DIM, vocab_size=VOCAB, max_position_embeddings=128,
        dtype=torch.float32, dmc=dmc,
    )  # fmt: skip
    model = build_model(description, dmc=dmc)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(values * 0.3 + (1.0 if "norm" in name else 0.0))
        if "linear_qkv" in name:
            rows = parameter.data.view(groups, -1, DIM, HIDDEN)
            rows[:, -2, -1] *= 8  # the last channel of every key
    return LoadedModel(model, description, None)


def arguments(tp: int, pp: int, groups: int = HEADS, **more) -> Namespace:
    """The parsed flags that a checkpoint holds, as far as they say what the model is."""
    return Namespace(
        num_layers=LAYERS, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=HEADS,
        num_query_groups=groups, group_query_attention=True, kv_channels=DIM, seq_length=128,
        max_position_embeddings=128, position_embedding_type="rope", rotary_base=10000,
        rotary_percent=1.0, rotary_interleaved=False, use_rope_scaling=False,
        add_position_embedding=False, use_rotary_position_embeddings=True,
        rotary_seq_len_interpolation_factor=None, normalization="RMSNorm", norm_epsilon=1e-5,
        layernorm_epsilon=1e-5, swiglu=True, add_bias_linear=False, add_qkv_bias=False,
        qk_layernorm=False, untie_embeddings_and_output_weights=True, attention_dropout=0.0,
        hidden_dropout=0.0, init_method_std=0.02, padded_vocab_size=VOCAB, vocab_size=None,
        make_vocab_size_divisible_by=128, params_dtype=torch.float32, bf16=False, fp16=False,
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, num_experts=None,
        multi_latent_attention=False, window_size=None, transformer_impl="transformer_engine",
        model_type=ModelType.encoder_or_decoder, **more,
    )  # fmt: skip


RELEASED_FLAGS = {
    "dmc_init_val": 5, "dmc_window_size": 12, "dmc_temp": 0.1, "dmc_cr": 8.0, "dmc_finetune": True,
    "dmc_paged_cache_size": 40.0, "dmc_paged_block_size": 256, "dmc_is_stage_one": False,
}  # fmt: skip


def rank_slice(name: str, tensor: torch.Tensor, tp: int, rank: int) -> torch.Tensor:
    """A tensor's shard in Megatron's tensor-parallel layer `index`."""
    if "norm" in name:
        return tensor.clone()
    if "linear_proj" in name or "linear_fc2" in name:  # row parallel
        step = tensor.shape[1] // tp
        return tensor[:, rank * step : (rank + 1) * step].clone()
    if "linear_fc1" in name:
        step = FFN // tp
        a, b = rank * step, (rank + 1) * step
        return torch.cat([tensor[a:b], tensor[FFN + a : FFN + b]])
    step = tensor.shape[0] // tp
    return tensor[rank * step : (rank + 1) * step].clone()


def save(loaded: LoadedModel, path: Path, args: Namespace, *, chunks: int = 1) -> Path:
    """A checkpoint as the branch saves it, at any tensor and (interleaved) pipeline layout."""
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    whole = {k: v for k, v in loaded.model.state_dict().items() if v is not None}
    per_chunk = LAYERS // (pp * chunks)
    for rank in range(tp):
        for stage in range(pp):
            models = []
            for chunk in range(chunks):
                first = (chunk * pp + stage) * per_chunk
                model: dict = {}
                if first == 0:
                    key = "embedding.word_embeddings.weight"
                    model[key] = rank_slice(key, whole[key], tp, rank)
                for i in range(per_chunk):
                    here, there = f"decoder.layers.{i}.", f"decoder.layers.{first + i}."
                    for name, te in [
                        ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
                        ("self_attention.linear_qkv.weight", None),
                        ("self_attention.linear_proj.weight", None),
                        ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
                        ("mlp.linear_fc1.weight", None),
                        ("mlp.linear_fc2.weight", None),
                    ]:
                        model[here + (te or name)] = rank_slice(name, whole[there + name], tp, rank)
                    for module in ("self_attention.linear_qkv", "mlp.linear_fc2"):
                        state = io.BytesIO()  # as Transformer Engine 1.x keeps its state
                        torch.save(None, state)
                        model[f"{here}{module}._extra_state"] = state
                    model[f"{here}mlp.linear_fc1._extra_state"] = None
                if first + per_chunk == LAYERS:
                    for key in ("decoder.final_layernorm.weight", "output_layer.weight"):
                        model[key] = rank_slice(key, whole[key], tp, rank)
                models.append(model)
            state_dict = {
                "args": args, "checkpoint_version": 3.0, "iteration": 500,
                "opt_param_scheduler": {"max_lr": 3e-5, "num_steps": 500},
                "rng_state": [{
                    "random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(),
                    "torch_rng_state": torch.get_rng_state(), "rng_tracker_states": {},
                }],
            }  # fmt: skip
            if chunks == 1:
                state_dict["model"] = models[0]
            else:
                state_dict |= {f"model{i}": model for i, model in enumerate(models)}
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
            folder = path / "iter_0000500" / name
            folder.mkdir(parents=True)
            torch.save(state_dict, folder / "model_optim_rng.pt")
    (path / "latest_checkpointed_iteration.txt").write_text("500")
    return path


def tokens(length: int = 60) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCAB, (2, length), generator=generator)


def decisions(loaded: LoadedModel) -> torch.Tensor:
    trace = DecisionTrace(loaded.model)
    traced_forward(loaded, tokens(), trace)
    return torch.stack(trace.is_merge_LTBG)


@pytest.mark.parametrize("tp", [1, 2])
def test_released_checkpoint(tp, tmp_path, capsys):
    expected = by_hand()
    path = save(expected, tmp_path / "released", arguments(tp, 1, **RELEASED_FLAGS))
    assert cli.main(["convert", "--from", "dmc-release", "--to", "megatron", str(path),
                     str(tmp_path / "m")]) == 0  # fmt: skip
    assert "DMC finetune at target CR 8" in capsys.readouterr().out
    merges = decisions(expected)
    assert 0.1 < merges.float().mean() < 0.9
    for place in (path, tmp_path / "m"):
        loaded = load_model(place)
        assert loaded.description.dmc == RELEASED
        assert torch.equal(full_forward(loaded.model, tokens()),
                           full_forward(expected.model, tokens()))  # fmt: skip
        assert torch.equal(decisions(loaded), merges)
    params = SamplingParams(temperature=0, max_tokens=8)
    prompts = [{"prompt_token_ids": tokens()[0, :30].tolist()}]
    outputs = [
        LLM(loaded, max_model_len=64, device="cpu").generate(prompts, params, use_tqdm=False)[0]
        for loaded in (load_model(tmp_path / "m"), expected)
    ]
    assert outputs[0].outputs[0].token_ids == outputs[1].outputs[0].token_ids
    assert outputs[0].cr == outputs[1].cr > 1


@pytest.mark.parametrize(("flags", "expected"), [
    ({"dmc_cr": 4.0}, {"target_cr": 4.0}),
    ({"dmc_init_val": 3, "dmc_window_size": 7}, {"alpha_offset": 3.0, "merge_window": 7}),
    ({"dmc_finetune": False}, {"stage": "retrofit"}),
    ({"dmc_is_stage_one": True}, {"stage": "zero-out"}),
])  # fmt: skip
def test_released_settings_come_from_the_arguments(flags, expected, tmp_path):
    path = save(by_hand(), tmp_path / "released", arguments(1, 1, **RELEASED_FLAGS | flags))
    dmc = convert("dmc-release", "hf", path, tmp_path / "hf").dmc
    assert dmc is not None
    assert dmc == DMCConfig(**RELEASED.to_dict() | expected)
    assert from_hf_folder(tmp_path / "hf").dmc == dmc


def test_released_checkpoint_that_does_not_say_its_target(tmp_path):
    path = save(by_hand(), tmp_path / "released", arguments(1, 1))
    with pytest.raises(CheckpointError, match="no dmc_cr; pass --dmc-target-cr"):
        convert("dmc-release", "megatron", path, tmp_path / "m")
    assert convert("dmc-release", "megatron", path, tmp_path / "m", target_cr=8).dmc == RELEASED
    # without the word it is a plain model
    assert convert("megatron", "hf", path, tmp_path / "plain").dmc is None
    with pytest.raises(CheckpointError, match="not in the format of the released"):
        convert("dmc-release", "hf", tmp_path / "m", tmp_path / "out")


@pytest.mark.parametrize(
    ("tp", "pp", "chunks", "groups"), [(1, 2, 1, 4), (2, 2, 1, 2), (4, 1, 1, 4), (2, 2, 2, 2)]
)
def test_any_layout(tp, pp, chunks, groups, tmp_path):
    expected = by_hand(None, groups=groups)
    path = save(expected, tmp_path / "torch", arguments(tp, pp, groups), chunks=chunks)
    for place in (path, path / "iter_0000500"):
        state = load_model(place).model.state_dict()
        for name, tensor in expected.model.state_dict().items():
            assert tensor is None or torch.equal(state[name], tensor), name


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_no_code_of_a_file_runs_without_the_flag(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = save(by_hand(None), tmp_path / "torch", arguments(1, 1, payload=Payload()))
    command = ["convert", "--to", "hf", str(path), str(tmp_path / "hf")]
    assert cli.main(command) == 2
    assert "--allow-pickle" in capsys.readouterr().err
    assert not Path("ran").exists()
    assert not (tmp_path / "hf").exists()
    assert cli.main([*command, "--allow-pickle"]) == 0
    assert Path("ran").exists()


def test_what_can_be_wrong(tmp_path):
    expected = by_hand(None)
    path = save(expected, tmp_path / "torch", arguments(2, 2))
    file = path / "iter_0000500" / "mp_rank_01_001" / "model_optim_rng.pt"
    state = torch.load(file, weights_only=False)

    def refused(match: str, error=CheckpointError) -> None:
        for to_format in ("hf", "megatron"):
            with pytest.raises(error, match=match):
                convert("megatron", to_format, path, tmp_path / "out")
            assert not (tmp_path / "out").exists()

    norm = state["model"].pop("decoder.final_layernorm.weight")
    torch.save(state, file)
    out = convert("megatron", "hf", path, tmp_path / "fine")  # rank 0 has it
    assert out.num_layers == LAYERS
    state["model"]["decoder.final_layernorm.weight"] = norm + 1
    torch.save(state, file)
    refused("final_layernorm.weight: the tensor-parallel ranks' copies differ")
    state["model"]["decoder.final_layernorm.weight"] = norm
    state["model"]["decoder.layers.0.mlp.linear_fc1.bias"] = norm
    torch.save(state, file)
    refused(r"decoder\.layers\.2\.mlp\.linear_fc1\.bias is no part of this model")
    torch.save({"model": {}}, file.parent.parent / "mp_rank_00_000" / "model_optim_rng.pt")
    refused("no saved arguments")
    file.write_bytes(file.read_bytes()[:2000])
    refused("mp_rank_01_001/model_optim_rng.pt: damaged")
    file.unlink()
    refused("no saved arguments|ranks")
    path = save(expected, tmp_path / "other", arguments(1, 1, squared_relu=True, mtp_num_layers=1))
    refused("--mtp-num-layers", UnsupportedConfig)
    path = save(expected, tmp_path / "half", arguments(2, 1))
    (path / "iter_0000500" / "mp_rank_01" / "model_optim_rng.pt").unlink()
    refused("tensor_model_parallel_size=2, but there are 1 ranks")
