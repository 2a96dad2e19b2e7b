"""A few of the prompts of `engine_vs_transformers.py`, in chunks and with cached prefixes."""

from engine_vs_transformers import compare


def test_engine_and_transformers_agree_token_for_token():
    prompts, theirs, ours, stats = compare(
        10, 12, max_num_seqs=4, max_num_batched_tokens=96, enable_prefix_caching=True,
        prefix_block_size=32,
    )  # fmt: skip
    assert len(set(map(tuple, ours))) > 5 and all(ours)
    assert ours == theirs
    assert stats.num_prompt_tokens == sum(map(len, prompts))
