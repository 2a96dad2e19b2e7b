"""Mean-pooled KV heads: the weights, and that what comes out runs and trains."""

import pytest
import torch
from family_cases import CASES, VOCAB, save, tokens
from safetensors.torch import load_file
from test_legacy_checkpoint import by_hand
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.checkpoint.convert import convert, open_checkpoint
from megatron_dmc.checkpoint.gqa import pool_kv_heads
from megatron_dmc.checkpoint.hf_config import from_hf_folder
from megatron_dmc.checkpoint.load import full_forward, load_model
from megatron_dmc.checkpoint.weights import StateSource
from megatron_dmc.cli import main as cli
from megatron_dmc.errors import UnsupportedConfig


@pytest.mark.parametrize(
    ("case", "kept"), [("llama2", 2), ("llama2", 1), ("qwen2", 1), ("qwen3", 1)]
)
def test_pooled_weights_are_means(case, kept, tmp_path):
    config = CASES[case]
    save(config, tmp_path / "hf")
    command = ["convert", "--to", "hf", "--kv-heads", str(kept), str(tmp_path / "hf"),
               str(tmp_path / "gqa")]  # fmt: skip
    assert cli.main(command) == 0
    before, after = (load_file(tmp_path / p / "model.safetensors") for p in ("hf", "gqa"))
    assert set(before) == set(after)
    pooled = 0
    for name, tensor in after.items():
        if "k_proj" not in name and "v_proj" not in name:
            assert torch.equal(tensor, before[name]), name
            continue
        head_dim = tensor.shape[0] // kept
        heads = before[name].unflatten(0, (-1, head_dim))
        size = len(heads) // kept
        for j in range(kept):
            mean = sum(heads[j * size + i] for i in range(size)) / size
            torch.testing.assert_close(
                tensor[j * head_dim : (j + 1) * head_dim], mean, atol=1e-6, rtol=0
            )
        pooled += 1
    assert pooled == len([n for n in before if "k_proj" in n or "v_proj" in n]) > 0
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "gqa")(tokens()).logits
    loaded = load_model(tmp_path / "gqa")
    assert loaded.description.num_query_groups == kept
    logits = full_forward(loaded.model, tokens())[..., :VOCAB]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=0)


def test_all_heads_are_the_same_model(tmp_path):
    save(CASES["llama2"], tmp_path / "hf")
    description, source, _ = open_checkpoint(tmp_path / "hf")
    assert pool_kv_heads(description, source, num_kv_heads=4) == (description, source)


def test_it_runs_in_the_engine_and_trains(tmp_path):
    """Through Megatron's format: greedy tokens, then a step of up-training lowers the loss."""
    save(CASES["llama2"], tmp_path / "hf")
    command = ["convert", "--to", "megatron", "--kv-heads", "2", str(tmp_path / "hf"),
               str(tmp_path / "gqa")]  # fmt: skip
    assert cli.main(command) == 0
    convert(None, "hf", tmp_path / "gqa", tmp_path / "back")
    assert from_hf_folder(tmp_path / "back").num_query_groups == 2
    loaded = load_model(tmp_path / "gqa")
    prompt = tokens()[0, :20]
    output = LLM(loaded, max_model_len=64, device="cpu").generate(
        [{"prompt_token_ids": prompt.tolist()}],
        SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False,
    )[0]  # fmt: skip
    sequence = prompt
    for _ in range(8):
        last = full_forward(loaded.model, sequence[None])[0, -1, :VOCAB]
        sequence = torch.cat([sequence, last.argmax()[None]])
    assert output.outputs[0].token_ids == sequence[20:].tolist()

    model = loaded.model.train().requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ids = tokens(2, 64)
    positions = torch.arange(64).expand_as(ids)
    losses = []
    for _ in range(2):
        logits = model(ids, positions, attention_mask=None)[:, :-1, :VOCAB]
        loss = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        losses.append(float(loss))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gradient = model.decoder.layers[0].self_attention.linear_qkv.weight.grad
    assert gradient.view(2, 4, 16, -1)[:, -2:].abs().sum(-1).gt(0).all(), "pooled heads learn"
    assert losses[1] < losses[0]


def test_what_cannot_be_pooled():
    loaded = by_hand()
    source = StateSource(loaded.model.state_dict())
    with pytest.raises(UnsupportedConfig, match="--kv-heads 3: the model has 4 KV heads"):
        pool_kv_heads(loaded.description, source, num_kv_heads=3)
    with pytest.raises(UnsupportedConfig, match="pool the base model, then retrofit"):
        pool_kv_heads(loaded.description, source, num_kv_heads=2)
