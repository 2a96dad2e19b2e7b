"""Exported models in transformers: the code that travels with them, its cache, and its training."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers import dynamic_module_utils as dynamic_modules

import megatron_dmc.ops
from megatron_dmc import LLM, SamplingParams
from megatron_dmc.checkpoint.convert import convert
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.remote import (
    modeling_dmc,
    modeling_dmc_llama,
    modeling_dmc_mistral,
    modeling_dmc_qwen2,
    modeling_dmc_qwen3,
)
from megatron_dmc.checkpoint.remote.cache_dmc import DMCCache
from megatron_dmc.checkpoint.remote_code import FAMILIES, dmc_config, plain_config, write_remote_code
from megatron_dmc.checkpoint.tokenizer import HuggingFaceTokenizer
from megatron_dmc.config import DMCConfig
from megatron_dmc.models import full_forward, load_model
from megatron_dmc.ops import gates
from megatron_dmc.training.loss import compression_loss

VOCAB = 96
SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=512, initializer_range=0.35,
    bos_token_id=None, eos_token_id=None, pad_token_id=0, rope_theta=10000.0,
)  # fmt: skip
MODULES = {
    "llama": modeling_dmc_llama,
    "mistral": modeling_dmc_mistral,
    "qwen2": modeling_dmc_qwen2,
    "qwen3": modeling_dmc_qwen3,
}
NAMES = {family: architecture for architecture, family in FAMILIES.items()}


def settings(**changes) -> dict:
    # a small offset: about half of the tokens merge in a random model
    return DMCConfig(**{"stage": "finetune", "target_cr": 4.0, "alpha_offset": 0.3} | changes).to_dict()


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (batch, length), generator=generator)


def model_of(family: str = "llama", seed: int = 0, sizes: dict | None = None, **dmc):
    """A random DMC model in evaluation mode."""
    module, name = MODULES[family], "DMC" + NAMES[family]
    extra = {"sliding_window": None} if family == "mistral" else {}
    config_class = getattr(module, name.replace("ForCausalLM", "Config"))
    torch.manual_seed(seed)
    config = config_class(**SIZES | extra | (sizes or {}), dmc=settings(**dmc))
    return getattr(module, name)(config).eval()


@pytest.fixture(autouse=True)
def modules_cache(tmp_path, monkeypatch):
    """transformers copies code that it loads; here into the test's own folder."""
    monkeypatch.setattr(dynamic_modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    yield
    for name in [n for n in sys.modules if n.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def save_with_code(model, folder: Path) -> None:
    """A folder as the export writes it, from a model of any family."""
    plain = model.config.to_dict()
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    description = replace(
        ModelDescription(2, 8, 8, 2, 2, 4, 8, 8), dmc=DMCConfig.from_dict(plain["dmc"])
    )
    (folder / "config.json").write_text(json.dumps(config))
    write_remote_code(folder, description)


# The same equations as the package's


def test_settings_are_those_of_the_package():
    assert DMCConfig().to_dict() == modeling_dmc.DEFAULTS


def random_case(num_tokens=37, num_heads=4):
    torch.manual_seed(3)
    q = torch.randn(num_tokens, 2, num_heads, 8, dtype=torch.float64)
    k, v = (torch.randn(num_tokens, 2, 2, 8, dtype=torch.float64) for _ in range(2))
    return [x.requires_grad_() for x in (q, k, v)]


def gradients(outputs, inputs):
    torch.manual_seed(4)
    total = sum((o * torch.randn(o.shape, dtype=o.dtype)).sum() for o in outputs)
    found = torch.autograd.grad(total, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def assert_all_close(ours, theirs, atol=1e-11):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


def test_gates_are_the_packages():
    q, k, _ = random_case()
    first = torch.zeros(37, 2, dtype=torch.bool)
    first[0] = first[9, 1] = True
    noise = gates.logistic_noise(37, 2, seed=1, step=2, samples=[0, 1], layer=0).double()
    logit = modeling_dmc.decision_logit(k, alpha_offset=0.2)
    expected_logit = gates.decision_logit(k, alpha_offset=0.2)
    assert torch.equal(logit, expected_logit)
    omega = modeling_dmc.importance(q, 2, alpha_offset=0.2)
    assert torch.equal(omega, gates.importance(q, 2, alpha_offset=0.2))
    ours = modeling_dmc.soft_gate(logit, noise, first, temperature=0.1)
    theirs = gates.soft_gate(expected_logit, noise, temperature=0.1, starts_TB=first)
    assert_all_close(ours, theirs, atol=0)
    assert_all_close(gradients(ours, [k]), gradients(theirs, [k]), atol=1e-12)
    for a, b in zip(
        modeling_dmc.hard_gate(logit, first), gates.hard_gate(expected_logit, starts_TB=first)
    ):
        assert torch.equal(a, b)


def test_noise_is_logistic():
    torch.manual_seed(0)
    noise = modeling_dmc.logistic_noise((200_000,), torch.device("cpu"))
    for x in (-3.0, -1.0, 0.0, 0.5, 2.0):
        below = float((noise < x).float().mean())
        assert below == pytest.approx(1 / (1 + math.exp(-x)), abs=0.01)


@pytest.mark.parametrize("merge_window", [0, 1, 5, 64])
@pytest.mark.parametrize("hard", [False, True])
def test_merge_is_the_packages(merge_window, hard):
    _, k, v = random_case()
    omega = (torch.rand(37, 2, 2, dtype=torch.float64) + 0.01).requires_grad_()
    alpha = torch.rand(37, 2, 2, dtype=torch.float64)
    alpha = (alpha.round() if hard else alpha).requires_grad_()
    ours = modeling_dmc.merge(k, v, alpha, omega, merge_window=merge_window)
    theirs = megatron_dmc.ops.merge(k, v, alpha, omega, merge_window=merge_window)
    assert_all_close(ours, theirs)
    inputs = [k, v, alpha, omega]
    assert_all_close(gradients(ours, inputs), gradients(theirs, inputs), atol=1e-10)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("block", [1024, 10])
def test_attention_is_the_packages(implementation, block, monkeypatch):
    monkeypatch.setattr(modeling_dmc, "QUERY_BLOCK", block)
    q, k, v = random_case()
    log_keep = torch.nn.functional.logsigmoid(3 * torch.randn(37, 2, 2, dtype=torch.float64))
    log_keep.requires_grad_()
    without = torch.ones(8, dtype=torch.float64)
    without[-1] = 0  # the caller leaves the borrowed channel out of the queries
    out, weights = modeling_dmc.attend(
        q * without, k, v, log_keep, softmax_scale=0.3, implementation=implementation
    )
    expected = megatron_dmc.ops.training_attention(q, k, v, log_keep, softmax_scale=0.3)
    inputs = [q, k, v, log_keep]
    torch.testing.assert_close(out, expected, atol=1e-11, rtol=0)
    assert_all_close(gradients([out], inputs), gradients([expected], inputs), atol=1e-10)
    assert (weights is None) == (implementation == "sdpa")


@pytest.mark.parametrize("merge_window", [0, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_loss_and_gradients_are_those_of_the_packages_ops(merge_window, shared):
    model = model_of(merge_window=merge_window, shared_decisions=shared).train()
    ids = tokens(2, 40)
    results = []
    for ops in (None, megatron_dmc.ops):
        model.set_dmc_ops(ops)
        model.zero_grad()
        torch.manual_seed(7)
        output = model(ids, labels=ids)
        output.loss.backward()
        results.append([output.loss, *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-4)
    assert 1.2 < float(output.measured_cr) < 3
    assert float(output.compression_loss.detach()) > 0.01


def test_training_is_that_of_megatrons_model(tmp_path):
    """Relaxed gates in the whole model, without noise: transformers' logits are Megatron's."""
    model = model_of(noise_scale=0.0)
    save_with_code(model, tmp_path / "dmc")
    loaded = load_model(tmp_path / "dmc", dtype=torch.float32)
    ids = tokens(2, 40)
    for training in (True, False):
        model.train(training)
        loaded.model.train(training)
        with torch.no_grad():
            logits = model(ids).logits
        expected = full_forward(loaded.model, ids)[..., :VOCAB]
        torch.testing.assert_close(logits, expected, atol=5e-5, rtol=0)


# Export


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, Path]:
    """Three models, exported by `convert` from Megatron's format."""
    folders = {}
    for name, changes in {
        "gqa": {},
        "window": {"merge_window": 3},
        "shared": {"shared_decisions": True, "alpha_offset": 0.1},
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
    entries = sum(layer.num_entries_BG.sum(1) for layer in cache.layers)
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


@pytest.mark.parametrize("name", ["gqa", "window", "shared"])
def test_without_the_package_it_generates_what_the_engine_does(exported, alone, name):
    """Ragged prompts, left-padded in one batch; tokens, entries and logits."""
    prompts, results = alone
    result = results[str(exported[name])]
    assert result["class"] == "DMCLlamaForCausalLM"
    loaded = load_model(exported[name], dtype=torch.float32)
    llm = LLM(loaded, max_num_batched_tokens=9)
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in prompts],
        SamplingParams(temperature=0, max_tokens=24),
        use_tqdm=False,
    )
    assert result["new"] == [o.outputs[0].token_ids for o in outputs]
    assert result["entries"] == [o.metrics.num_entries for o in outputs]
    assert result["cr"] > 1.3
    logits = full_forward(loaded.model, torch.tensor(prompts[:1]))[..., :VOCAB]
    torch.testing.assert_close(torch.tensor(result["logits"]), logits, atol=5e-5, rtol=0)


def test_folder_says_what_it_is(exported):
    folder = exported["window"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "dmc_llama"
    assert config["architectures"] == ["DMCLlamaForCausalLM"]
    assert dmc_config(plain_config(config)) == config
    assert plain_config(config)["architectures"] == ["LlamaForCausalLM"]
    assert ModelDescription.from_hf_folder(folder).dmc == DMCConfig.from_dict(settings(merge_window=3))
    card = (folder / "README.md").read_text()
    for text in ("finetune: constant target CR", "| 4 (tokens", "latest 3 tokens", "not recorded"):
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
    other = dmc_config({"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"})
    assert other == {"architectures": ["DMCMixtralForCausalLM"], "model_type": "dmc_mixtral"}
    (tmp_path / "config.json").write_text(json.dumps(plain_config(other)))
    write_remote_code(tmp_path, replace(description, dmc=DMCConfig()), facts={"Data": "a corpus"})
    card = (tmp_path / "README.md").read_text()
    assert "no code for this architecture" in card and "| Data | a corpus |" in card
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


@pytest.mark.parametrize("family", list(MODULES))
def test_family(tmp_path, family):
    """Off it is transformers' own model; on, chunks and padding change nothing; saved, it comes back."""
    off = model_of(family, stage="off")
    plain = dict(off.config.to_dict(), model_type=family)
    del plain["dmc"]
    import transformers

    own = getattr(transformers, NAMES[family])
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
    assert type(again).__name__ == "DMC" + NAMES[family]
    again.set_dmc(target_cr=3.0)
    again.save_pretrained(tmp_path / "second")  # transformers copies the code along
    last = AutoModelForCausalLM.from_pretrained(tmp_path / "second", trust_remote_code=True)
    assert last.config.dmc == settings(target_cr=3.0)
    with torch.no_grad():
        assert torch.equal(last(ids).logits, full.logits)


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
    again = model.generate(ids, max_new_tokens=9, do_sample=True, temperature=0.8, prefill_chunk_size=5)
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
    with pytest.raises(ValueError, match="unknown dmc settings"):
        model.set_dmc(target_ratio=3)
    with pytest.raises(ValueError, match="stage 'warmup'"):
        model_of().set_dmc(stage="warmup")
    with pytest.raises(ValueError, match="sliding_window=16"):
        model_of("mistral", sizes={"sliding_window": 16})
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        model.train()(ids, past_key_values=DMCCache())
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(ValueError, match="use_reentrant"):
        model(ids, labels=ids)


# Training


def test_compression_loss_is_the_packages_and_part_of_the_loss():
    model = model_of(loss_weight=1.5, noise_scale=0.0).train()
    ids = tokens(3, 40)
    decisions = modeling_dmc.Decisions()
    model.model(ids, dmc_decisions=decisions)
    merges_B = torch.stack(list(decisions.merges_B.values())).sum(0)
    rate_B = merges_B / (3 * 2 * 39)
    expected = 1.5 * compression_loss(rate_B, target_cr=4.0)
    output = model(ids, labels=ids)
    torch.testing.assert_close(output.compression_loss, expected)
    assert float(output.measured_cr) == pytest.approx(3 * 40 * 6 / (3 * 40 * 6 - float(merges_B.sum())))
    lm = float(output.loss - output.compression_loss)
    assert lm == pytest.approx(
        float(torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    )
    model.set_dmc_step(target_cr=1.0)  # the hinge is one-sided
    assert float(model(ids, labels=ids).compression_loss) == 0
    model.eval()
    output = model(ids, labels=ids)
    assert output.compression_loss is None and float(output.measured_cr) > 1


def test_accumulated_microbatches_have_the_loss_of_the_batch():
    """As Trainer calls it: every microbatch's loss is divided by the labels of the whole batch."""
    model = model_of(noise_scale=0.0).train()
    ids = tokens(4, 30)
    labels = ids.clone()
    labels[:2, :11], labels[2:, :3] = -100, -100
    total = (labels[:, 1:] != -100).sum()
    parts = [
        model(i, labels=x, num_items_in_batch=total)
        for i, x in zip(ids.split(2), labels.split(2), strict=True)
    ]
    shares = [(x[:, 1:] != -100).sum() / total for x in labels.split(2)]
    whole = model(ids, labels=labels)
    lm = whole.loss - whole.compression_loss
    expected = lm + sum(s * p.compression_loss for s, p in zip(shares, parts, strict=True))
    torch.testing.assert_close(parts[0].loss + parts[1].loss, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_part_in_training(side):
    model = model_of(noise_scale=0.0).train()
    ids, pad = tokens(2, 30), 12
    mask, labels = torch.ones_like(ids), ids.clone()
    hidden = slice(None, pad) if side == "left" else slice(-pad, None)
    mask[1, hidden], labels[1, hidden] = 0, -100
    output = model(ids, attention_mask=mask, labels=labels)
    rows = [model(ids[:1], labels=ids[:1])]
    shown = ids[1:, pad:] if side == "left" else ids[1:, :-pad]
    rows.append(model(shown, labels=shown))
    hinge = sum(r.compression_loss for r in rows) / 2
    torch.testing.assert_close(output.compression_loss, hinge)
    if side == "right":  # (a row's first token after left padding is a target of the padding)
        lm = [r.loss - r.compression_loss for r in rows]
        torch.testing.assert_close(
            output.loss - output.compression_loss, (29 * lm[0] + 17 * lm[1]) / 46
        )
    else:
        torch.testing.assert_close(output.logits[1, pad:], rows[1].logits[0], atol=1e-4, rtol=0)


def test_packed_documents_are_apart():
    model = model_of(noise_scale=0.0).train()
    lengths = [9, 20, 11]
    ids = tokens(1, 40)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(ids, position_ids=positions).logits[0]
    apart = [model(part).logits[0] for part in ids.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(apart), atol=1e-4, rtol=0)


def test_gradient_checkpointing_changes_no_gradient():
    model = model_of().train()
    ids = tokens(2, 30)
    results = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        torch.manual_seed(1)
        output = model(ids, labels=ids)
        output.loss.backward()
        results.append([output.loss, output.compression_loss, *(p.grad for p in model.parameters())])
        results[-1] = [x.detach().clone() for x in results[-1]]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert all(layer.self_attn.k_proj.weight.grad.abs().sum() > 0 for layer in model.model.layers)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_zero_out_ends_where_the_retrofit_begins(family):
    model = model_of(family, stage="zero-out").train()
    ids = tokens(2, 30)
    with torch.no_grad():
        for p in model.parameters():  # biases of Qwen2 start at zero
            p.add_(0.05 * torch.randn_like(p))
        model.set_dmc(stage="off")
        plain = model(ids).logits
        model.set_dmc(stage="zero-out")
        model.set_dmc_step(zero_out_scale=1.0)
        torch.testing.assert_close(model(ids).logits, plain, atol=1e-4, rtol=0)
        model.set_dmc_step(zero_out_scale=0.5)
        assert float((model(ids).logits - plain).abs().max()) > 1e-3
        model.set_dmc_step(zero_out_scale=0.0)
        faded = model(ids).logits
        model.zero_borrowed_channels()
        if family != "qwen3":  # its norm of a head counts the channel that is gone
            torch.testing.assert_close(model(ids).logits, faded, atol=1e-4, rtol=0)
        model.set_dmc(stage="retrofit", alpha_offset=5.0)
        model.eval()
        assert float(model(ids).measured_cr) == 1.0


def test_lora_fades_with_its_base():
    peft = pytest.importorskip("peft")
    model = model_of(stage="zero-out").train()
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, lora)
    wrapped.zero_borrowed_channels()
    wrapped.set_dmc(stage="retrofit", alpha_offset=5.0)
    ids = tokens(2, 30)
    assert float(wrapped.eval()(ids).measured_cr) == 1.0
    wrapped.train()(ids, labels=ids).loss.backward()
    names = [n for n, p in wrapped.named_parameters() if p.grad is not None]
    assert names and all("lora_" in n for n in names)
    merged = wrapped.eval().merge_and_unload()
    assert type(merged).__name__ == "DMCLlamaForCausalLM"
