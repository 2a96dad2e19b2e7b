"""Exported models are trained as Megatron's are: the same equations, loss and gradients."""

from pathlib import Path

import pytest
import torch
from hf_models import VOCAB, in_float64, model_of, save_with_code, tokens

import megatron_dmc.ops
from megatron_dmc.checkpoint.hf_tensors import pieces
from megatron_dmc.checkpoint.load import load_model
from megatron_dmc.checkpoint.remote import attention_dmc, modeling_dmc, ops_dmc
from megatron_dmc.config import DMCConfig
from megatron_dmc.ops import gates, reference
from megatron_dmc.training.loss import compression_loss

# The same equations as the package's


def test_settings_that_are_refused():
    for refused in ({"policy": "drop"}, {"pool_after_rope": True}, {"hinge": "token"},
                    {"importance": "random"}, {"merge_window": -1}, {"window": 3}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(refused)).replace("_", "[-_]")):
            modeling_dmc.complete_settings(refused)
    assert modeling_dmc.complete_settings(None) == DMCConfig().to_dict()


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


def test_copies_of_the_packages_files(tmp_path):
    save_with_code(model_of(), tmp_path)
    exported = (tmp_path / "gates_dmc.py").read_bytes()
    assert exported == Path(gates.__file__).read_bytes()
    assert "from .gates_dmc import" in (tmp_path / "attention_dmc.py").read_text()
    assert "from .errors_dmc import" in (tmp_path / "configuration_dmc.py").read_text()
    assert not any("from megatron" in f.read_text() for f in tmp_path.glob("*.py"))


@pytest.mark.parametrize("merge_window", [0, 1, 5, 64])
@pytest.mark.parametrize("hard", [False, True])
def test_merge_is_the_packages(merge_window, hard):
    _, k, v = random_case()
    omega = (torch.rand(37, 2, 2, dtype=torch.float64) + 0.01).requires_grad_()
    alpha = torch.rand(37, 2, 2, dtype=torch.float64)
    alpha = (alpha.round() if hard else alpha).requires_grad_()
    ours = ops_dmc.merge(k, v, alpha, omega, merge_window=merge_window)
    theirs = megatron_dmc.ops.merge(k, v, alpha, omega, merge_window=merge_window)
    assert_all_close(ours, theirs)
    inputs = [k, v, alpha, omega]
    assert_all_close(gradients(ours, inputs), gradients(theirs, inputs), atol=1e-10)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("block", [1024, 10])
def test_attention_is_the_packages(implementation, block, monkeypatch):
    monkeypatch.setattr(ops_dmc, "QUERY_BLOCK", block)
    q, k, v = random_case()
    log_keep = torch.nn.functional.logsigmoid(3 * torch.randn(37, 2, 2, dtype=torch.float64))
    log_keep.requires_grad_()
    without = torch.ones(8, dtype=torch.float64)
    without[-1] = 0  # the caller leaves the borrowed channel out of the queries
    out, weights = ops_dmc.attend(
        q * without, (k, v), log_keep, softmax_scale=0.3, implementation=implementation
    )
    expected = megatron_dmc.ops.training_attention(q, k, v, log_keep, softmax_scale=0.3)
    inputs = [q, k, v, log_keep]
    torch.testing.assert_close(out, expected, atol=1e-11, rtol=0)
    assert_all_close(gradients([out], inputs), gradients([expected], inputs), atol=1e-10)
    assert (weights is None) == (implementation == "sdpa")


def total_loss(logits, ids, compression_loss=0.0):
    """In the logits' dtype; transformers' own language-model loss is computed in float32."""
    lm = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return lm + compression_loss


def assert_same_gradients(ours: dict, theirs: dict):
    """Loss and gradients by name, equal to float64's rounding relative to each one's norm."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = float((ours[name] - expected).norm())
        assert error <= 1e-12 * float(expected.norm()), name


VARIANTS = [
    {},
    {"merge_window": 3},
    {"shared_decisions": True},
    {"importance": "constant"},
    {"merge_window": 3, "shared_decisions": True},
    {"merge_delay": 4},
    {"policy": "evict", "eviction_delay": 3},
]


@pytest.mark.parametrize("ops", [None, megatron_dmc.ops], ids=["export", "package"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_loss_and_gradients_are_those_of_the_reference(changes, ops):
    model = in_float64(model_of(**changes)).train()
    ids = tokens(2, 40)
    results = []
    for chosen in (ops, reference):
        model.set_dmc_ops(chosen)
        model.zero_grad()
        torch.manual_seed(7)
        output = model(ids)
        loss = total_loss(output.logits, ids, output.compression_loss)
        loss.backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters()})
        results[-1]["loss"] = loss.detach()
    assert_same_gradients(*results)
    assert 1.2 < float(output.measured_cr) < 3
    assert float(output.compression_loss.detach()) > 0.01


@pytest.mark.parametrize("training", [True, False], ids=["relaxed", "hard"])
@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_loss_and_gradients_are_those_of_megatrons_model(tmp_path, changes, training):
    """Gates in the whole model, without noise: logits, loss and the gradient of every parameter."""
    model = model_of(noise_scale=0.0, **changes)
    save_with_code(model, tmp_path / "dmc")
    loaded = load_model(tmp_path / "dmc", dtype=torch.float64)
    model = in_float64(model).train(training)
    megatron = loaded.model.train(training).requires_grad_(True)
    ids = tokens(2, 40)
    logits = model(ids, use_cache=False).logits
    positions = torch.arange(40).expand_as(ids)
    expected = megatron(ids, positions, attention_mask=None)[..., :VOCAB]
    assert logits.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(logits, expected, atol=1e-11, rtol=0)
    for x in (logits, expected):
        total_loss(x, ids).backward()
    gradients = {name: p.grad for name, p in megatron.named_parameters()}
    assert_same_gradients(
        {name: p.grad for name, p in model.named_parameters()},
        {
            p.hf_name: p.view(gradients[p.megatron_name], loaded.description).reshape(p.hf_shape)
            for p in pieces(loaded.description)
        },
    )


# Training


def test_compression_loss_is_the_packages_and_part_of_the_loss():
    model = model_of(loss_weight=1.5, noise_scale=0.0).train()
    ids = tokens(3, 40)
    state = attention_dmc.ForwardState()
    model.model(ids, dmc_state=state)
    merges_B = torch.stack(list(state.merges_B.values())).sum(0)
    rate_B = merges_B / (3 * 2 * 39)
    expected = 1.5 * compression_loss(rate_B, target_cr=4.0)
    output = model(ids, labels=ids)
    torch.testing.assert_close(output.compression_loss, expected)
    assert float(output.measured_cr) == pytest.approx(
        3 * 40 * 6 / (3 * 40 * 6 - float(merges_B.sum()))
    )
    for hinge in ("batch", "none"):
        model.set_dmc(hinge=hinge)
        expected = 1.5 * compression_loss(rate_B, target_cr=4.0, hinge=hinge)
        torch.testing.assert_close(model(ids, labels=ids).compression_loss, expected)
    model.set_dmc(hinge="sequence")
    lm = float(output.loss - output.compression_loss)
    assert lm == pytest.approx(
        float(
            torch.nn.functional.cross_entropy(
                output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
            )
        )
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
        results.append(
            [output.loss, output.compression_loss, *(p.grad for p in model.parameters())]
        )
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
