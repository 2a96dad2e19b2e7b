"""The contract of cache strategies, and the recipe for a new one."""

import pytest
from tiny_gpt import check_idle, dmc_config, drain, greedy_params, make_engine, make_prompts

from megatron_dmc.cache.strategies import BY_MODEL, BY_NAME, CompressionRule
from megatron_dmc.cache.strategies.merging import MergingStore
from megatron_dmc.errors import UnsupportedConfig

MODELS = {
    "merging": (dmc_config(), {}),
    "delayed": (dmc_config(merge_delay=3), {}),
    "delayed/evict": (dmc_config(policy="evict", eviction_delay=3), {}),
    **{name: (None, {"cache_policy": name, "cache_budget": 6}) for name in BY_NAME},
}


def tokens_of(engine, num_new=6):
    for i, prompt in enumerate(make_prompts(4, seed=3)):
        engine.add_request(str(i), prompt, greedy_params(num_new))
    return {i: output.outputs[0].token_ids for i, output in drain(engine).items()}


def test_every_strategy_has_a_model():
    assert {name.partition("/")[0] for name in MODELS} == {*BY_MODEL, *BY_NAME}


@pytest.mark.parametrize("name", MODELS)
def test_no_head_exceeds_the_strategys_bound(name):
    dmc, settings = MODELS[name]
    engine = make_engine(dmc, max_num_batched_tokens=7, **settings)
    store, tables = engine.context.store, engine.context.tables
    assert type(store) is (BY_MODEL | BY_NAME)[name.partition("/")[0]]
    for i, prompt in enumerate(make_prompts(4, seed=3)):
        engine.add_request(str(i), prompt, greedy_params(6))
    while engine.has_unfinished_requests:
        engine.step()
        engine.context.update_counts()
        for request in engine.scheduler.running:
            bound = store.most_entries(request.num_computed_tokens, request.num_prompt_tokens)
            assert 0 < tables.entries(request.row).max() <= bound
    check_idle(engine)


def test_a_new_strategy_is_one_class_and_one_line(monkeypatch):
    class Everything(MergingStore):
        def __init__(self, storage, rule):
            super().__init__(storage, None)

    monkeypatch.setitem(BY_NAME, "everything", Everything)
    engine = make_engine(None, cache_policy="everything", cache_budget=1.0)
    assert tokens_of(engine) == tokens_of(make_engine(None))
    check_idle(engine)


def test_rules_name_their_strategy():
    assert CompressionRule(5.0).strategy == "merging"
    assert CompressionRule(5.0, merge_delay=4).strategy == "delayed"
    assert CompressionRule(5.0, eviction_delay=0).strategy == "delayed"
    with pytest.raises(UnsupportedConfig, match="cache_policy='lru': use one of h2o, tova, window"):
        make_engine(None, cache_policy="lru", cache_budget=4)
