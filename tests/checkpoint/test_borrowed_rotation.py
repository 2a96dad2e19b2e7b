"""Rotation of the last RoPE pair: the same model, with the least in the channel that DMC borrows."""

import numpy as np
import pytest
import torch
from family_cases import CASES, save, tokens

from megatron_dmc.checkpoint.borrowed_rotation import (
    least_angles,
    pair_moments,
    pair_rows,
    rotate_borrowed_pair,
)
from megatron_dmc.checkpoint.convert import open_checkpoint
from megatron_dmc.checkpoint.load import build_model, full_forward, load_model, read_weights
from megatron_dmc.checkpoint.weights import StateSource, megatron_shapes, read_tensor
from megatron_dmc.cli import main as cli
from megatron_dmc.errors import DMCError, UnsupportedConfig
from megatron_dmc.ops import gates
from megatron_dmc.quality.likelihood import read_tokens

TEXT = tokens().flatten().repeat(4)


def in_float64(case, tmp_path):
    save(CASES[case], tmp_path / "hf")
    description, source, _ = open_checkpoint(tmp_path / "hf")
    description.dtype = torch.float64
    state = {
        n: read_tensor(source, n, s, torch.float64) for n, s in megatron_shapes(description).items()
    }
    for name, tensor in state.items():  # a direction that neither channel holds alone
        if name.endswith("linear_qkv.weight"):
            for rows in pair_rows(tensor, description):
                rows.mul_(0.2)
                rows.select(-2, 1).add_(rows.select(-2, 0) * 20)
    return description, StateSource(state)


def logits_of(description, source):
    model = build_model(description)
    state = model.state_dict()
    read_weights(source, {name: state[name] for name in megatron_shapes(description)})
    return full_forward(model, tokens())


@pytest.mark.parametrize("case", ["llama2", "qwen2"])
def test_same_logits_and_least_moments(case, tmp_path):
    description, source = in_float64(case, tmp_path)
    same, rotated = rotate_borrowed_pair(description, source, tokens=TEXT)
    assert same == description
    expected, found = logits_of(description, source), logits_of(description, rotated)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))

    def left(of):
        q, k = pair_moments(description, of, TEXT)
        return q[..., 1, 1] * k[..., 1, 1]

    before, after = left(source), left(rotated)
    assert (after <= before * (1 + 1e-9)).all() and after.sum() < 0.1 * before.sum()
    assert float(least_angles(*pair_moments(description, rotated, TEXT)).sin().abs().max()) < 0.02


def test_zero_out_costs_less(tmp_path):
    """Logits without the borrowed channel stay nearer to those with it."""
    description, source = in_float64("llama2", tmp_path)
    _, rotated = rotate_borrowed_pair(description, source, tokens=TEXT)
    whole, errors = logits_of(description, source), []
    for of in (source, rotated):
        state = {
            n: read_tensor(of, n, s, torch.float64) for n, s in megatron_shapes(description).items()
        }
        for name, tensor in state.items():
            if name.endswith("linear_qkv.weight"):
                for rows in pair_rows(tensor, description):
                    rows.select(-2, 1).zero_()
        errors.append(float((logits_of(description, StateSource(state)) - whole).norm()))
    assert errors[1] < 0.5 * errors[0]
    assert gates.BORROWED_CHANNEL == -1, "the pair's second channel"


def test_command(tmp_path):
    """From the shell: the converted model is the same up to rounding, and its flags are there."""
    save(CASES["llama2"], tmp_path / "hf")
    prefix = tmp_path / "data"
    write_dataset(prefix, TEXT.numpy())
    command = ["convert", "--to", "megatron", "--calibration-data", str(prefix), str(tmp_path / "hf"),
               str(tmp_path / "out")]  # fmt: skip
    assert cli.main(command) == 0
    before, after = load_model(tmp_path / "hf"), load_model(tmp_path / "out")
    torch.testing.assert_close(
        full_forward(after.model, tokens()), full_forward(before.model, tokens()), atol=1e-4, rtol=0
    )
    weight = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert not torch.equal(after.model.state_dict()[weight], before.model.state_dict()[weight])


def write_dataset(prefix, ids):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    builder.add_document(torch.from_numpy(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def test_refusals(tmp_path):
    save(CASES["qwen3"], tmp_path / "hf")
    description, source, _ = open_checkpoint(tmp_path / "hf")
    with pytest.raises(UnsupportedConfig, match="QK-norm"):
        rotate_borrowed_pair(description, source, tokens=TEXT)
    save(CASES["llama2"], tmp_path / "llama")
    description, source, _ = open_checkpoint(tmp_path / "llama")
    with pytest.raises(DMCError, match="1 tokens of calibration data"):
        rotate_borrowed_pair(description, source, tokens=TEXT[:1])
    with pytest.raises(DMCError, match="tokenise the text with this model's tokenizer"):
        rotate_borrowed_pair(description, source, tokens=TEXT + description.vocab_size)


def test_a_limit_reads_whole_documents_from_the_start(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "d.bin"), dtype=np.int32)
    for i in range(3):
        builder.add_document(torch.full((4,), i), [4])
    builder.finalize(str(tmp_path / "d.idx"))
    assert read_tokens(tmp_path / "d").tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert read_tokens(tmp_path / "d", limit=5).tolist() == [0] * 4 + [1] * 4
