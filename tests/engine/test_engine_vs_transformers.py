"""A few of the prompts of `engine_vs_transformers.py`, in chunks and with cached prefixes."""

import pytest
from engine_vs_transformers import MODELS, compare


def test_engine_and_transformers_agree_token_for_token():
    prompts, theirs, ours, stats = compare(
        10, 12, max_num_seqs=4, max_num_batched_tokens=96, enable_prefix_caching=True,
        prefix_block_size=32,
    )  # fmt: skip
    assert len(set(map(tuple, ours))) > 5 and all(ours)
    assert ours == theirs
    assert stats.num_prompt_tokens == sum(map(len, prompts))


@pytest.mark.parametrize("model", [name for name in MODELS if name != "base"])
def test_dmc_models_agree_with_the_full_forward(model):
    prompts, right, ours, stats = compare(10, 12, model, max_num_seqs=4, max_num_batched_tokens=96)
    assert ours == right and len(set(map(tuple, ours))) > 5
    assert stats.measured_cr > 1.2
