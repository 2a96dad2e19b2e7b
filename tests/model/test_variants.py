"""The settings of the ablations: pooling after RoPE, constant importances, relaxed gates in evaluation.

The attention layer is held against the formulas of docs/method.md, written out, in float64.
"""

import json

import pytest
import torch
from random_models import VOCAB, random_model, retrofitted

from megatron_dmc import LLM
from megatron_dmc.checkpoint.hf_config import from_hf_folder, to_hf_config
from megatron_dmc.checkpoint.remote_code import write_remote_code
from megatron_dmc.config import DMCConfig
from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.model.decisions import GateKey
from megatron_dmc.ops import gates, reference
from megatron_dmc.quality.likelihood import engine_difference, evaluate, full_forward

KEY = GateKey(5, 2, 0, 3)


def weighted_means(x_TBGD, alpha_TBG, omega_TBG, merge_window):
    """`y_t`: sum over j <= t of (alpha_{j+1} ... alpha_t) omega_j x_j over the same without x_j."""
    num_tokens = x_TBGD.shape[0]
    rows = []
    for t in range(num_tokens):
        weights = torch.zeros_like(omega_TBG)
        oldest = max(0, t - merge_window + 1) if merge_window else 0
        for j in range(oldest, t + 1):
            chain = alpha_TBG[j + 1 : t + 1].prod(0)
            weights = weights.index_add(0, torch.tensor([j]), (chain * omega_TBG[j])[None])
        rows.append((weights[..., None] * x_TBGD).sum(0) / weights.sum(0)[..., None])
    return torch.stack(rows)


def written_out(attention, x_TBH, freqs_T11F, dmc):
    """The layer's output by the formulas, with T x T scores."""
    q, k, v = attention.get_query_key_value_tensors(x_TBH)
    logit = k[..., -1] - dmc.alpha_offset
    if dmc.importance == "constant":
        omega = torch.ones_like(logit)
    else:
        omega = torch.sigmoid(q[..., -1].unflatten(-1, (2, 2)).mean(-1) + dmc.alpha_offset)
        omega = omega + torch.finfo(torch.float64).eps
    if attention.training:
        noise = gates.logistic_noise(len(x_TBH), 2, seed=5, step=2, samples=[3, 4], layer=0)
        alpha, log_keep, _ = gates.soft_gate(logit, noise, temperature=dmc.temperature)
    else:
        alpha, log_keep, _ = gates.hard_gate(logit)
        assert 0.2 < alpha.mean() < 0.8, "the case must merge to mean anything"

    def without(t):
        return torch.cat([t[..., :-1], torch.zeros_like(t[..., :1])], dim=-1)

    def rotate(t):
        return reference.rotate(t, freqs_T11F[:, 0, 0])

    def pool(t):
        return weighted_means(t, alpha, omega, dmc.merge_window)

    k = pool(without(rotate(without(k)))) if dmc.pool_after_rope else rotate(pool(without(k)))
    out = reference.training_attention(rotate(without(q)), k, pool(v), log_keep)
    return attention.linear_proj(out.flatten(2))[0]


VARIANTS = [{}, {"pool_after_rope": True}, {"importance": "constant"},
            {"pool_after_rope": True, "importance": "constant", "merge_window": 3}]  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "+".join(v) or "default")
def test_layer_equals_the_formulas_with_gradients(variant, training):
    dmc = retrofitted(temperature=0.5, **variant)
    model = random_model(2, dmc=dmc).model.train(training)
    attention = model.decoder.layers[0].self_attention
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(19, 2, 32, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(19, 2, 32, generator=generator, dtype=torch.float64)
    freqs = model.rotary_pos_emb(19)
    qkv = attention.linear_qkv.weight.requires_grad_()
    results = []
    for forward in (
        lambda: attention(x, KEY.to_tensor(), rotary_pos_emb=freqs)[0],
        lambda: written_out(attention, x, freqs, dmc),
    ):
        out = forward()
        results.append([out, *torch.autograd.grad((out * weight).sum(), [x, qkv])])
    ours, theirs = results
    # hard decisions: the dense formula's gradient of log_keep at minus infinity is no number
    for a, b in zip(ours[: 3 if training else 1], theirs, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert ours[0].detach().abs().max() > 0.1
    rows = ours[2].view(2, 4, 8, 32)  # [two query heads, key, value] of each group
    importance_rows = rows[:, :2, -1]
    if dmc.importance == "constant":
        assert (importance_rows == 0).all(), "what is read from the queries' channel is nothing"
    else:
        assert importance_rows.abs().max() > 1e-6
    assert bool(rows[:, 2, -1].abs().max() > 0) is training  # the decisions learn either way


def test_variants_differ_from_the_default():
    """The variants compute something else, and where nothing merges, the same."""
    tokens = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    for offset, differs in ((0.3, True), (50.0, False)):
        default, *others = (
            full_forward(random_model(dmc=DMCConfig(**base | variant)).model, tokens)
            for base in [{"stage": "finetune", "alpha_offset": offset}]
            for variant in VARIANTS
        )
        for other in others:
            assert bool((default - other).abs().max() > 1e-3) is differs
            if not differs:
                torch.testing.assert_close(default, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("settings", [{}, {"merge_window": 3}, {"shared_decisions": True}])
def test_constant_importance_in_the_engine(settings):
    loaded = random_model(2, dmc=retrofitted(importance="constant", **settings))
    tokens = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    assert engine_difference(loaded, tokens, [7, 1, 20]) < 1e-10


def test_pooling_after_rope_is_refused_in_the_engine():
    loaded = random_model(dmc=retrofitted(pool_after_rope=True))
    with pytest.raises(UnsupportedConfig, match="--dmc-pool-after-rope.*enable_dmc=False"):
        LLM(loaded, max_model_len=32, device="cpu")
    llm = LLM(loaded, max_model_len=32, enable_dmc=False, device="cpu")  # every entry is one token
    assert llm.engine.context.rule.may_merge is False


def test_an_exported_folder_of_it_has_no_code(tmp_path):
    description = random_model(dmc=retrofitted(pool_after_rope=True)).description
    (tmp_path / "config.json").write_text(json.dumps(to_hf_config(description)))
    write_remote_code(tmp_path, description)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "config.json"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "dmc_llama" and "auto_map" not in config
    assert "its engine does not run it" in (tmp_path / "README.md").read_text()
    assert from_hf_folder(tmp_path).dmc == description.dmc


def test_settings_of_older_checkpoints_load():
    new = {"cr_schedule", "importance", "pool_after_rope", "hinge"}
    values = DMCConfig(stage="finetune", target_cr=3.0, merge_window=5).to_dict()
    older = {name: value for name, value in values.items() if name not in new}
    assert len(older) == len(values) - len(new)
    assert DMCConfig.from_dict(older) == DMCConfig.from_dict(values)
    changed = values | {"cr_schedule": "cosine", "importance": "constant",
                        "pool_after_rope": True, "hinge": "none"}  # fmt: skip
    assert DMCConfig.from_dict(changed).to_dict() == changed


@pytest.mark.parametrize("noise_scale", [0.0, 1.0])
def test_soft_evaluation_is_trainings_forward(noise_scale):
    """`evaluate(gates="soft")` of a model in evaluation mode: `train()`'s forward of the same keys."""
    loaded = random_model(dmc=retrofitted(noise_scale=noise_scale))
    tokens = torch.randint(0, VOCAB, (101,), generator=torch.Generator().manual_seed(4))
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()
              if isinstance(value, torch.Tensor)}  # fmt: skip

    def measured(**settings):
        return evaluate(loaded, tokens.numpy(), length=20, progress=False, **settings)

    soft = measured(gates="soft", seed=9, batch=2)
    hard = measured(batch=2)
    rows = torch.stack([tokens[start : start + 21] for start in range(0, 100, 20)])
    positions = torch.arange(20).expand(5, 20)
    nll = 0.0
    loaded.model.train()
    for first in range(5):
        key = GateKey(9, 0, 0, first).to_tensor()
        with torch.no_grad():
            logits = loaded.model(rows[first : first + 1, :-1], positions[:1], key)[..., :VOCAB]
        nll += float(
            torch.nn.functional.cross_entropy(logits[0].float(), rows[first, 1:], reduction="sum")
        )
    assert measured(batch=2).nll == hard.nll, "hard is hard in train mode too"
    loaded.model.eval()
    assert soft.nll == pytest.approx(nll, rel=1e-6)
    assert abs(soft.nll - hard.nll) > 0.1
    other = measured(gates="soft", seed=10, batch=5)
    if noise_scale:
        assert soft.num_entries_LG.tolist() != hard.num_entries_LG.tolist()
        assert other.nll != pytest.approx(soft.nll, rel=1e-6)
        assert measured(gates="soft", seed=9, batch=5).nll == pytest.approx(soft.nll, rel=1e-6)
    else:  # nothing is drawn
        assert other.nll == pytest.approx(soft.nll, rel=1e-6)
    assert measured(batch=2).nll == hard.nll, "the gates are hard again afterwards"
    assert all(
        torch.equal(value, loaded.model.state_dict()[name]) for name, value in before.items()
    )
    with pytest.raises(ValueError, match="gates='warm': choose hard or soft"):
        measured(gates="warm")
