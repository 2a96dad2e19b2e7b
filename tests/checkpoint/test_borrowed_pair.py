"""Choice and rotation of the borrowed RoPE pair: the same model, with the least in the channel that DMC borrows."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from family_cases import CASES, save, tokens, weights

from megatron_dmc.checkpoint.borrowed_pair import Sample, least_scores, rotate_borrowed_pair
from megatron_dmc.checkpoint.convert import FLAGS_FILE, convert, open_checkpoint
from megatron_dmc.checkpoint.load import (
    build_model,
    full_forward,
    load_model,
    read_weights,
    rotary_embedding,
)
from megatron_dmc.checkpoint.rope_pairs import ExchangedPair, in_usual_order, pair_rows
from megatron_dmc.checkpoint.weights import StateSource, megatron_shapes, read_tensor
from megatron_dmc.cli import main as cli
from megatron_dmc.errors import DMCError, UnsupportedConfig
from megatron_dmc.ops import gates
from megatron_dmc.quality.likelihood import read_tokens

TEXT = tokens().flatten().repeat(4)


def in_float64(case, tmp_path, *, empty=None):
    """A random model whose last pair holds much along a direction of neither channel; or in which a pair is empty."""
    save(CASES[case], tmp_path / "hf")
    description, source, _ = open_checkpoint(tmp_path / "hf")
    description.dtype = torch.float64
    state = state_of(description, source)
    for name, tensor in state.items():
        if name.endswith("linear_qkv.weight"):
            rows = pair_rows(tensor, description, -1)
            if empty is None:
                rows.mul_(0.2)
                rows.select(2, 1).add_(rows.select(2, 0) * 20)
            else:
                rows.mul_(2)
                pair_rows(tensor, description, empty).zero_()
    return description, StateSource(state)


def state_of(description, source):
    return {
        n: read_tensor(source, n, s, torch.float64) for n, s in megatron_shapes(description).items()
    }


def model_of(description, source):
    model = build_model(description)
    state = model.state_dict()
    read_weights(source, {name: state[name] for name in megatron_shapes(description)})
    return model


def logits_of(description, source):
    return full_forward(model_of(description, source), tokens())


def written_by(description, source, length=160):
    """Text of the model's own distribution, which every change of the model fits worse."""
    model, generator = model_of(description, source), torch.Generator().manual_seed(0)
    text = torch.tensor([1])
    for _ in range(length):
        logits = full_forward(model, text[None])[0, -1, : description.vocab_size]
        text = torch.cat([text, torch.multinomial(logits.softmax(-1), 1, generator=generator)])
    return text


def scores_of(description, source):
    theta_P = rotary_embedding(description, "cpu").inv_freq
    return least_scores(Sample(description, source, TEXT).moments()[0], theta_P)


@pytest.mark.parametrize("case", ["llama2", "llama3", "qwen2"])
def test_the_same_model_with_less_in_the_channel(case, tmp_path):
    description, source = in_float64(case, tmp_path)
    ordered, rotated = rotate_borrowed_pair(description, source, tokens=TEXT)
    expected = logits_of(description, source)
    bound = 1e-12 * float(expected.abs().max())
    torch.testing.assert_close(logits_of(ordered, rotated), expected, rtol=0, atol=bound)
    again = rotate_borrowed_pair(ordered, rotated, tokens=TEXT)  # a model that has an order already
    torch.testing.assert_close(logits_of(*again), expected, rtol=0, atol=bound)
    usual, weights = in_usual_order(ordered, rotated)
    assert usual == description
    torch.testing.assert_close(logits_of(usual, weights), expected, rtol=0, atol=bound)
    _, angles_LGP = scores_of(ordered, rotated)
    assert float(angles_LGP[..., -1].sin().abs().max()) < 0.02, "it is turned by its best angle"


def test_an_empty_pair_is_borrowed(tmp_path):
    description, source = in_float64("llama2", tmp_path, empty=3)
    lines = []
    found, weights = rotate_borrowed_pair(
        description, source, tokens=written_by(description, source), report=lines.append
    )
    assert found.borrowed_rope_pair == 3
    assert lines[0].startswith("borrowed RoPE pair 3 of 8: zeroing its channel adds 0.000 nats")
    scores_P, _ = scores_of(description, source)
    assert scores_P.argmin() == 3 and scores_P[3] == 0 < scores_P[-1]
    state = state_of(found, weights)
    assert all(not pair_rows(state[n], found, -1).any() for n in state if ".linear_qkv.w" in n)


def test_zero_out_costs_less(tmp_path):
    """Logits without the borrowed channel stay nearer to those with it."""
    description, source = in_float64("llama2", tmp_path)
    text = written_by(description, source)
    ordered, rotated = rotate_borrowed_pair(description, source, tokens=text)
    whole, errors = logits_of(description, source), []
    for model, of in ((description, source), (ordered, rotated)):
        state = state_of(model, of)
        for name, tensor in state.items():
            if name.endswith("linear_qkv.weight"):
                pair_rows(tensor, model, -1).select(2, 1).zero_()
        errors.append(float((logits_of(model, StateSource(state)) - whole).norm()))
    assert errors[1] < 0.5 * errors[0]
    assert gates.BORROWED_CHANNEL == -1, "the last pair's second channel"


def test_the_last_pair_on_a_tie(tmp_path):
    """Heads of nothing: every channel costs the same."""
    description, source = in_float64("llama2", tmp_path)
    state = state_of(description, source)
    for name in state:
        if name.endswith("linear_qkv.weight"):
            state[name].zero_()
    found, _ = rotate_borrowed_pair(description, StateSource(state), tokens=TEXT[:100])
    assert found == description


def test_command(tmp_path, capsys):
    """From the shell: the converted model is the same up to rounding, and its flags are there."""
    save(CASES["llama2"], tmp_path / "hf")
    prefix = tmp_path / "data"
    write_dataset(prefix, TEXT.numpy())
    command = ["convert", "--to", "megatron", "--calibration-data", str(prefix), str(tmp_path / "hf"),
               str(tmp_path / "out")]  # fmt: skip
    assert cli.main(command) == 0
    pair = load_model(tmp_path / "out").description.borrowed_rope_pair
    assert f"borrowed RoPE pair {7 if pair is None else pair} of 8" in capsys.readouterr().out
    flags = (tmp_path / "out" / FLAGS_FILE).read_text().split()
    assert ("--dmc-borrowed-rope-pair" in flags) == (pair is not None)
    command[2], command[-1] = "hf", str(tmp_path / "stock")
    assert cli.main(command) == 0 and "borrowed RoPE pair 7 of 8" in capsys.readouterr().out
    before = load_model(tmp_path / "hf").model
    for name in ("out", "stock"):
        after = load_model(tmp_path / name).model
        torch.testing.assert_close(
            full_forward(after, tokens()), full_forward(before, tokens()), atol=1e-4, rtol=0
        )
        weight = "decoder.layers.0.self_attention.linear_qkv.weight"
        assert not torch.equal(after.state_dict()[weight], before.state_dict()[weight])


@pytest.mark.parametrize("case", ["llama2", "qwen2", "qwen3"])
def test_a_plain_model_is_exported_in_the_usual_order(case, tmp_path):
    """Its weights are transformers' again, with biases and QK-norm, and stock transformers runs them."""
    model = save(CASES[case], tmp_path / "hf")

    def exchange(description, source):
        return replace(description, borrowed_rope_pair=2), ExchangedPair(source, description, 2)

    convert("hf", "megatron", tmp_path / "hf", tmp_path / "megatron", transform=exchange)
    loaded = load_model(tmp_path / "megatron")
    assert loaded.description.borrowed_rope_pair == 2
    with torch.no_grad():
        expected = model(tokens()).logits
    logits = full_forward(loaded.model, tokens())[..., : expected.shape[-1]]
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=0)
    convert("megatron", "hf", tmp_path / "megatron", tmp_path / "back")
    assert "borrowed_rope_pair" not in (tmp_path / "back" / "config.json").read_text()
    before, after = weights(tmp_path / "hf"), weights(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


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
