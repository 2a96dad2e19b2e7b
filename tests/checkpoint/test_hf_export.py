"""Exported models in transformers: the code that travels with them, and its cache."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hf_models import FAMILIES, VOCAB, model_of, save_with_code, settings, tokens
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.checkpoint.convert import convert
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.hf_config import from_hf_folder, plain_config
from megatron_dmc.checkpoint.load import full_forward, load_model
from megatron_dmc.checkpoint.remote.cache_dmc import DMCCache
from megatron_dmc.checkpoint.remote_code import dmc_config, write_remote_code
from megatron_dmc.checkpoint.tokenizer import HuggingFaceTokenizer
from megatron_dmc.config import DMCConfig

pytestmark = pytest.mark.usefixtures("remote_modules")


# Export


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Path]:
    """Models, exported by `convert` from Megatron's format."""
    folders = {}
    for name, changes in {
        "gqa": {},
        "window": {"merge_window": 3},
        "shared": {"shared_decisions": True, "alpha_offset": 0.1},
        "delay": {"merge_delay": 5},
        "dms": {"policy": "evict", "eviction_delay": 4},
        "pair": {"sizes": {"borrowed_rope_pair": 1}},
    }.items():
        work = tmp_path_factory.mktemp(name)
        save_with_code(model_of(seed=5, **changes), work / "made")
        convert("hf", "megatron", work / "made", work / "megatron")
        convert("megatron", "hf", work / "megatron", work / "hf")
        folders[name] = work / "hf"
    return folders


ALONE = """
import json, sys
for name in ("megatron_dmc", "megatron"):
    sys.modules[name] = None  # importing them fails
import torch
from transformers import AutoModelForCausalLM

case = json.load(open(sys.argv[1]))
ids, mask = torch.tensor(case["ids"]), torch.tensor(case["mask"])
results = {}
for folder in case["folders"]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=24, do_sample=False, return_dict_in_generate=True,
    )
    cache = output.past_key_values
    entries = sum(layer.num_slots_BG().sum(1) for layer in cache.layers)
    with torch.no_grad():
        logits = model(ids[:1]).logits
    results[folder] = {
        "new": output.sequences[:, ids.shape[1]:].tolist(), "entries": entries.tolist(),
        "cr": cache.compression_ratio(), "logits": logits.tolist(), "class": type(model).__name__,
    }
json.dump(results, open(sys.argv[2], "w"))
"""


@pytest.fixture(scope="module")
def alone(exported, tmp_path_factory) -> tuple[list[list[int]], dict]:
    """Prompts, and what a process without this package makes of them, by folder."""
    work = tmp_path_factory.mktemp("alone")
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (30, 1, 17, 5)]
    longest = max(map(len, prompts))
    case = {
        "folders": [str(f) for f in exported.values()],
        "ids": [[0] * (longest - len(p)) + p for p in prompts],
        "mask": [[0] * (longest - len(p)) + [1] * len(p) for p in prompts],
    }
    (work / "case.json").write_text(json.dumps(case))
    result = subprocess.run(
        [sys.executable, "-c", ALONE, work / "case.json", work / "results.json"],
        cwd=work, capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"HF_MODULES_CACHE": str(work / "modules"), "PYTHONPATH": ""},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return prompts, json.loads((work / "results.json").read_text())


@pytest.mark.parametrize("name", ["gqa", "window", "shared", "delay", "dms", "pair"])
def test_without_the_package_it_generates_what_the_engine_does(exported, alone, name):
    """Ragged prompts, left-padded in one batch; tokens, entries and logits."""
    prompts, results = alone
    result = results[str(exported[name])]
    assert result["class"] == "DMCLlamaForCausalLM"
    loaded = load_model(exported[name], dtype=torch.float32)
    assert loaded.description.borrowed_rope_pair == (1 if name == "pair" else None)
    llm = LLM(loaded, max_num_batched_tokens=9, device="cpu")
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in prompts],
        SamplingParams(temperature=0, max_tokens=24),
        use_tqdm=False,
    )
    assert result["new"] == [o.outputs[0].token_ids for o in outputs]
    assert result["entries"] == [o.metrics.num_entries for o in outputs]
    assert result["cr"] > (1.2 if name in ("delay", "dms") else 1.3)
    logits = full_forward(loaded.model, torch.tensor(prompts[:1]))[..., :VOCAB]
    torch.testing.assert_close(torch.tensor(result["logits"]), logits, atol=5e-5, rtol=0)


def test_folder_says_what_it_is(exported):
    folder = exported["window"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "dmc_llama"
    assert config["architectures"] == ["DMCLlamaForCausalLM"]
    assert dmc_config(plain_config(config)) == config
    assert plain_config(config)["architectures"] == ["LlamaForCausalLM"]
    assert from_hf_folder(folder).dmc == DMCConfig.from_dict(settings(merge_window=3))
    card = (folder / "README.md").read_text()
    for text in (
        "finetune: constant target CR",
        "| 4 (tokens",
        "latest 3 tokens",
        "| Data | unknown |",
    ):
        assert text in card
    with pytest.raises(ValueError, match="trust_remote_code"):  # not silently a plain Llama
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)


def test_plain_models_and_unknown_architectures(tmp_path):
    plain = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(plain))
    description = ModelDescription(2, 8, 8, 2, 2, 4, 8, 8)
    write_remote_code(tmp_path, description)
    assert [f.name for f in tmp_path.iterdir()] == ["config.json"]
    assert plain_config(plain) is plain
    pooling = dmc_config(plain | {"dmc": {"pool_after_rope": True}})
    assert pooling["model_type"] == "dmc_llama" and "auto_map" not in pooling
    other = dmc_config({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"})
    assert other == {"architectures": ["DMCMixtralForCausalLM"], "model_type": "dmc_mixtral"}
    (tmp_path / "config.json").write_text(json.dumps(plain_config(other)))
    write_remote_code(tmp_path, replace(description, dmc=DMCConfig()), facts={"Data": "a corpus"})
    card = (tmp_path / "README.md").read_text()
    assert "There is no code for this model" in card and "| Data | a corpus |" in card
    with pytest.raises(ValueError, match="dmc_mixtral"):
        AutoConfig.from_pretrained(tmp_path)


def test_tokenizer_is_read_without_asking(tmp_path, monkeypatch):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    save_with_code(model_of(), tmp_path)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked at the keyboard"))
    assert HuggingFaceTokenizer(tmp_path).encode("b") == [1]


@pytest.mark.parametrize(
    "changes",
    [
        {"merge_delay": 1},
        {"merge_delay": 6, "merge_window": 3},
        {"policy": "evict", "eviction_delay": 0},
        {"policy": "evict", "eviction_delay": 5},
    ],
    ids=str,
)
def test_a_delay_in_chunks_and_padded(changes):
    """Rings that fill and go round, rows of several lengths, rows that are selected."""
    model = model_of(**changes).double()
    ids = tokens(2, 31)
    with torch.no_grad():
        whole = model(ids).logits
        cache, parts = DMCCache(), []
        for part in ids.split([2, 9, 1, 1, 1, 12, 5], dim=1):
            parts.append(model(part, past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-9, rtol=0)
        assert cache.compression_ratio() > 1.2

        mask = torch.ones_like(ids)
        mask[1, :8] = 0  # the second row is shorter
        other = model(ids[1:, 8:]).logits
        cache, seen, parts = DMCCache(), 0, []
        for part in ids.split([10, 14, 1, 6], dim=1):
            seen += part.shape[1]
            parts.append(model(part, attention_mask=mask[:, :seen], past_key_values=cache).logits)
            cache.reorder_cache(torch.tensor([0, 1]))
        torch.testing.assert_close(torch.cat(parts, 1)[1:, 8:], other, atol=1e-9, rtol=0)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(model(ids).logits, whole, atol=1e-9, rtol=0)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_family(tmp_path, family):
    """Off it is transformers' own model; on, chunks and padding change nothing; saved, it comes back."""
    off = model_of(family, stage="off")
    plain = dict(off.config.to_dict(), model_type=family)
    del plain["dmc"]
    own = getattr(transformers, FAMILIES[family].architecture)
    reference = own(own.config_class.from_dict(plain)).eval()
    reference.load_state_dict(off.state_dict())
    ids = tokens(3, 40)
    mask = torch.ones_like(ids)
    mask[1, :7], mask[2, :25] = 0, 0
    with torch.no_grad():
        expected = reference(ids).logits
        torch.testing.assert_close(off(ids).logits, expected, atol=2e-5, rtol=0)

        model = model_of(family)
        full = model(ids, use_cache=False)
        assert float((full.logits - expected).abs().max()) > 0.1
        assert 1.2 < float(full.measured_cr) < 3
        for chunks in ([13, 1, 26], [1] * 40):
            cache, parts = None, []
            for part in ids.split(chunks, dim=1):
                output = model(part, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                parts.append(output.logits)
            torch.testing.assert_close(torch.cat(parts, 1), full.logits, atol=1e-4, rtol=0)
            assert cache.compression_ratio() == pytest.approx(float(full.measured_cr))
        padded = model(ids, attention_mask=mask).logits
        for row in range(3):
            start = int((mask[row] == 0).sum())
            alone = model(ids[row : row + 1, start:]).logits[0]
            torch.testing.assert_close(padded[row, start:], alone, atol=1e-4, rtol=0)

    save_with_code(model, tmp_path / "first")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first", trust_remote_code=True)
    assert type(again).__name__ == "DMC" + FAMILIES[family].architecture
    again.set_dmc(target_cr=3.0)
    again.save_pretrained(tmp_path / "second")  # transformers copies the code along
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "second", trust_remote_code=True)
    assert last.config.dmc == settings(target_cr=3.0)
    with torch.no_grad():
        assert torch.equal(last(ids).logits, full.logits)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_family_in_the_engine(tmp_path, family):
    model = model_of(family, seed=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # Qwen2's start at zero
                parameter.add_(0.2 * torch.randn_like(parameter))
    save_with_code(model, tmp_path)
    loaded = load_model(tmp_path, dtype=torch.float32)
    ids = tokens(2, 40)
    with torch.no_grad():
        logits = full_forward(loaded.model, ids)[..., :VOCAB]
        torch.testing.assert_close(model(ids).logits, logits, atol=1e-4, rtol=0)
    result = model.generate(ids, max_new_tokens=16, do_sample=False, return_dict_in_generate=True)
    outputs = LLM(loaded, device="cpu").generate(
        [{"prompt_token_ids": row.tolist()} for row in ids],
        SamplingParams(temperature=0, max_tokens=16),
        use_tqdm=False,
    )
    assert [o.outputs[0].token_ids for o in outputs] == result.sequences[:, 40:].tolist()
    entries = sum(o.metrics.num_entries for o in outputs)
    assert result.past_key_values.num_entries() == entries


# Generation and the cache


def test_cache_is_as_small_as_its_entries():
    model = model_of(sizes={"head_dim": 64, "num_attention_heads": 2}, alpha_offset=0.05).half()
    ids = tokens(2, 300)
    mask = torch.ones_like(ids)
    mask[1, :200] = 0
    plain = DynamicCache()
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=50, do_sample=False, return_dict_in_generate=True
    )
    cache = output.past_key_values
    num_tokens, heads, dim = ids.shape[1] + 49, 2, 64
    for layer in range(3):
        states = torch.zeros(2, heads, num_tokens, dim, dtype=torch.float16)
        plain.update(states, states, layer)
    plain_bytes = sum(2 * x.keys.numel() * x.keys.element_size() for x in plain.layers)
    entry_bytes = cache.num_entries() * 2 * dim * 2
    tokens_cached = int(mask.sum()) + 2 * 49
    assert cache.compression_ratio() == pytest.approx(
        tokens_cached * 3 * heads / cache.num_entries()
    )
    assert cache.compression_ratio() > 1.5
    lengths = torch.stack([x.num_entries_BG for x in cache.layers])
    assert lengths.float().std(dim=(0, 2)).min() > 0, "heads must have lengths of their own"
    segments = 3 * 2 * heads * (2 * dim + 1) * 4
    assert entry_bytes <= cache.num_bytes() - segments <= 1.15 * entry_bytes + 20_000
    assert cache.num_bytes() < 0.5 * plain_bytes
    with pytest.raises(ValueError, match="cannot forget"):
        cache.crop(-1)
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.layers[0].is_initialized


@pytest.mark.parametrize("merge_window", [0, 3])
def test_beams_keep_their_own_segments(merge_window):
    model = model_of(merge_window=merge_window)
    ids = tokens(2, 12)
    kwargs = dict(max_new_tokens=12, num_beams=3, do_sample=False)
    cached = model.generate(ids, **kwargs)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **kwargs))


def test_sampling_chunked_prefill_and_a_cache_that_goes_on():
    model = model_of()
    ids = tokens(2, 23)
    torch.manual_seed(0)
    sampled = model.generate(ids, max_new_tokens=9, do_sample=True, temperature=0.8)
    torch.manual_seed(0)
    again = model.generate(
        ids, max_new_tokens=9, do_sample=True, temperature=0.8, prefill_chunk_size=5
    )
    assert sampled.shape == (2, 32) and torch.equal(sampled, again)
    whole = model.generate(ids, max_new_tokens=12, do_sample=False)
    cache = DMCCache()
    half = model.generate(ids, max_new_tokens=5, do_sample=False, past_key_values=cache)
    rest = model.generate(half, max_new_tokens=7, do_sample=False, past_key_values=cache)
    assert torch.equal(rest, whole)
    assert cache.get_seq_length() == 23 + 12 - 1


def test_cache_rows_can_be_chosen_and_repeated():
    model = model_of()
    ids = tokens(3, 20)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        expected = model(tokens(3, 4, seed=9), past_key_values=cache).logits
        cache = model(ids, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([5, 0]))
        logits = model(tokens(3, 4, seed=9)[[2, 0]], past_key_values=cache).logits
    torch.testing.assert_close(logits, expected[[2, 0]], atol=1e-5, rtol=0)


def test_what_cannot_be_done_is_refused():
    model = model_of()
    ids = tokens(1, 8)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        model.generate(ids, max_new_tokens=4, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        model.generate(ids, max_new_tokens=4, cache_implementation="static")
    with pytest.raises(ValueError, match="DynamicCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="flash_attention_2|Flash Attention 2"):
        model.set_attn_implementation("flash_attention_2")
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\)"):
        model(ids, attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match="unknown DMC settings"):
        model.set_dmc(target_ratio=3)
    with pytest.raises(ValueError, match="stage='warmup'"):
        model_of().set_dmc(stage="warmup")
    with pytest.raises(ValueError, match="sliding_window=16"):
        model_of("mistral", sizes={"sliding_window": 16})
    with pytest.raises(
        ValueError, match="borrowed_rope_pair=4: a head of 8 has the RoPE pairs 0 to 3"
    ):
        model_of(sizes={"borrowed_rope_pair": 4})
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        model.train()(ids, past_key_values=DMCCache())
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant"):
        model(ids, labels=ids)
