"""Documents packed into one sequence: each gives the logits that it gives alone."""

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from random_models import VOCAB, random_model, retrofitted

from megatron_dmc.checkpoint.load import full_forward
from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.model.decisions import GateKey
from megatron_dmc.training.step import document_starts

LENGTHS = [[7, 1, 12, 5], [25], [1, 1, 23]]


def alone(model, tokens, lengths) -> torch.Tensor:
    parts = torch.tensor(tokens).split(lengths)
    return torch.cat([full_forward(model, part[None]) for part in parts], dim=1)[0]


CASES = {"off": None, "unlimited": {}, "window3": {"merge_window": 3},
         "after-rope": {"pool_after_rope": True}}  # fmt: skip


@pytest.fixture(params=CASES.values(), ids=CASES)
def model(request):
    dmc = None if request.param is None else retrofitted(**request.param)
    return random_model(dmc=dmc).model.eval()


def draw(*shape) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(6))


@torch.no_grad()
def test_a_batch_of_packed_sequences(model):
    tokens = draw(3, 25)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in LENGTHS])
    starts = document_starts(positions)
    assert starts == [[7, 8, 20], [], [1, 2]]
    out = model(tokens, positions, GateKey(0, 0, 0, 0).to_tensor(starts))
    for b, lengths in enumerate(LENGTHS):
        expected = alone(model, tokens[b].tolist(), lengths)
        torch.testing.assert_close(out[b], expected, rtol=1e-10, atol=1e-10)
    together = full_forward(model, tokens)
    assert (together[0] - out[0]).abs().max() > 1e-3, "packing must make a difference"


@torch.no_grad()
def test_megatrons_packed_format(model):
    tokens = draw(1, 25)
    bounds = torch.tensor([0, 7, 8, 20, 25], dtype=torch.int32)
    params = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=12,
        max_seqlen_kv=12,
    )  # fmt: skip
    positions = torch.cat([torch.arange(n) for n in LENGTHS[0]])[None]
    out = model(tokens, positions, None, packed_seq_params=params)
    expected = alone(model, tokens[0].tolist(), LENGTHS[0])
    torch.testing.assert_close(out[0], expected, rtol=1e-10, atol=1e-10)


def test_the_key_and_the_starts_survive_the_wire():
    key = GateKey(2**40, -3, 4, 5, 1)
    for starts in (None, [[], [3, 9], []], [[1]]):
        assert GateKey.from_tensor(key.to_tensor(starts)) == (key, starts)
    model = random_model(dmc=retrofitted()).model
    with pytest.raises(UnsupportedConfig, match="attention_mask=None"):
        model(draw(1, 4), torch.arange(4)[None], torch.ones(1, 1, 4, 4, dtype=torch.bool))
