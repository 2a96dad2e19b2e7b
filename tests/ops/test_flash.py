"""Choice of the stock attention kernel, and the adapter of each kernel.

The packages are not installed here: their functions are stood in for, with their own signatures, by
plain PyTorch on CPU tensors.
"""

import logging
import re
import types

import pytest
import torch

from megatron_dmc import ops
from megatron_dmc.ops import backends, gates
from megatron_dmc.ops.training import flash

ON_CPU = ("cpu", "dense")


def randn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_inputs(num_tokens=37, heads=4, kv_heads=2, dim=16):
    logit = 4 * randn(num_tokens, 2, kv_heads, seed=0)
    return [
        randn(num_tokens, 2, heads, dim, seed=1),
        randn(num_tokens, 2, kv_heads, dim, seed=2),
        randn(num_tokens, 2, kv_heads, dim, seed=3),
        gates.soft_gate(logit, None, temperature=1.0)[1],
    ]


def outputs_and_grads(inputs, **options):
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = ops.training_attention(*inputs, **options)
    return [out, *torch.autograd.grad(out, inputs, randn(*out.shape, seed=4))]


def dense_forward(q, k, v, scale, causal):
    """Any layout of heads before tokens, as the packages' kernels compute it."""
    out, lse, _ = flash.KERNELS["dense"].forward(q, k, v, scale, causal)
    return out, lse


def dense_backward(grad_out, q, k, v, out, lse, scale, causal):
    return flash.KERNELS["dense"].backward(grad_out, q, k, v, out, lse, None, scale, causal)


def swap(*tensors):
    return [x.transpose(1, 2) for x in tensors]


def fake_flash_attn_2():
    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        alibi_slopes, return_softmax,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap) == (0.0, -1, -1, 0.0)
        out, lse = dense_forward(*swap(q, k, v), softmax_scale, causal)
        return out.transpose(1, 2).contiguous(), lse, torch.empty(0), torch.zeros(2)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert rng_state.shape == (2,) and softmax_lse.is_contiguous()
        grads = dense_backward(*swap(dout, q, k, v, out), softmax_lse, softmax_scale, causal)
        for buffer, grad in zip((dq, dk, dv), swap(*grads), strict=True):
            buffer.copy_(grad)
        return torch.empty(0)

    return types.SimpleNamespace(**locals())


def fake_flash_attn_3():
    def _flash_attn_forward(
        q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
        cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None,
        rotary_sin=None, seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None,
        softmax_scale=None, causal=False, window_size_left=-1, window_size_right=-1,
        attention_chunk=0, softcap=0.0, rotary_interleaved=True, scheduler_metadata=None,
        num_splits=1, pack_gqa=None, sm_margin=0,
    ):  # fmt: skip
        out, lse = dense_forward(*swap(q, k, v), softmax_scale, causal)
        return out.transpose(1, 2).contiguous(), lse, torch.empty(0), torch.empty(0)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None,
        sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None,
        softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1,
        softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert cu_seqlens_q is None and max_seqlen_k is None
        grads = dense_backward(*swap(dout, q, k, v, out), softmax_lse, softmax_scale, is_causal)
        for buffer, grad in zip((dq, dk, dv), swap(*grads), strict=True):
            buffer.copy_(grad)
        return torch.empty(0)

    return types.SimpleNamespace(**locals())


def fake_aten():
    def cudnn(q, k, v, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug, *, scale):
        assert attn_bias is None and compute_log_sumexp and not return_debug
        out, lse = dense_forward(q, k, v, scale, is_causal)
        return out, lse[..., None], None, None, q.shape[2], k.shape[2], 0, 0, None

    def cudnn_backward(
        grad_out, q, k, v, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q,
        cum_seq_k, max_q, max_k, dropout_p, is_causal, *, scale,
    ):  # fmt: skip
        assert logsumexp.shape == (*q.shape[:3], 1) and max_q == q.shape[2]
        return dense_backward(grad_out, q, k, v, out, logsumexp[..., 0], scale, is_causal)

    def flash_(q, k, v, dropout_p, is_causal, return_debug_mask, *, scale):
        out, lse = dense_forward(q, k, v, scale, is_causal)
        return out, lse, None, None, q.shape[2], k.shape[2], 0, 0, None

    def flash_backward(
        grad_out, q, k, v, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p,
        is_causal, philox_seed, philox_offset, *, scale,
    ):  # fmt: skip
        return dense_backward(grad_out, q, k, v, out, logsumexp, scale, is_causal)

    def efficient(q, k, v, attn_bias, compute_log_sumexp, dropout_p, is_causal, *, scale):
        assert compute_log_sumexp and q.shape[1] == k.shape[1] == v.shape[1]
        out, lse = dense_forward(q, k, v, scale, is_causal)
        return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=1e30), 0, 0

    def efficient_backward(
        grad_out, q, k, v, attn_bias, out, logsumexp, philox_seed, philox_offset, dropout_p,
        grad_input_mask, is_causal, *, scale,
    ):  # fmt: skip
        assert logsumexp.shape[-1] % 32 == 0 and grad_input_mask == [True, True, True, False]
        assert torch.isinf(logsumexp[..., q.shape[2] :]).all()
        lse = logsumexp[..., : q.shape[2]]
        return *dense_backward(grad_out, q, k, v, out, lse, scale, is_causal), None

    return types.SimpleNamespace(
        _scaled_dot_product_cudnn_attention=cudnn,
        _scaled_dot_product_cudnn_attention_backward=cudnn_backward,
        _scaled_dot_product_flash_attention=flash_,
        _scaled_dot_product_flash_attention_backward=flash_backward,
        _scaled_dot_product_efficient_attention=efficient,
        _scaled_dot_product_efficient_attention_backward=efficient_backward,
    )


@pytest.fixture
def pretend_gpu(monkeypatch):
    """CPU tensors are taken for half-precision ones on a Hopper GPU with all packages installed."""
    packages = {flash._FA2: fake_flash_attn_2(), flash._FA3: fake_flash_attn_3()}
    monkeypatch.setattr(flash, "_package", lambda name, *functions: packages.get(name))
    monkeypatch.setattr(flash, "_on_gpu", lambda q: True)
    monkeypatch.setattr(flash, "_capability", lambda q: (9, 0))
    monkeypatch.setattr(flash, "_HALF", (torch.float32,))
    monkeypatch.setattr(flash, "aten", fake_aten())
    for name in ("can_use_cudnn_attention", "can_use_flash_attention"):
        monkeypatch.setattr(torch.backends.cuda, name, lambda params: True)
    flash.fault.cache_clear()
    flash._report.cache_clear()
    yield packages
    flash.fault.cache_clear()


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", [n for n in flash.KERNELS if n not in ON_CPU])
def test_adapters_agree_with_the_cpu_kernel(name, kv_heads, pretend_gpu, monkeypatch):
    inputs = make_inputs(kv_heads=kv_heads)
    ours = outputs_and_grads(inputs, backend=name)
    monkeypatch.undo()
    torch.testing.assert_close(ours, outputs_and_grads(inputs, backend="cpu"), rtol=1e-4, atol=1e-5)


def test_dense_agrees_with_the_cpu_kernel():
    inputs = [x.double() for x in make_inputs()]
    torch.testing.assert_close(
        outputs_and_grads(inputs, backend="dense"), outputs_and_grads(inputs, backend="cpu")
    )


def test_the_first_that_is_present_is_picked(pretend_gpu, monkeypatch):
    q, k, v = (x.permute(1, 2, 0, 3) for x in make_inputs()[:3])

    def choice(dtype=torch.float32):
        return flash.choose_kernel(q.to(dtype), k.to(dtype), v.to(dtype)).name

    assert choice() == "flash-attn-3"
    monkeypatch.setattr(flash, "_capability", lambda q: (8, 0))
    assert choice() == "flash-attn-2"
    del pretend_gpu[flash._FA2]
    assert choice() == "flash"
    monkeypatch.setattr(flash, "_capability", lambda q: (9, 0))
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda params: False)
    del pretend_gpu[flash._FA3]
    assert choice() == "cudnn"
    monkeypatch.setattr(flash, "_HALF", (torch.float16,))
    monkeypatch.setattr(flash, "_cpu_takes", lambda *args: "not here")
    others = {
        n: b for n, b in flash.ATTENTION.backends.items() if n != "cpu"
    }  # they are CPU tensors
    monkeypatch.setattr(flash.ATTENTION, "backends", others)
    assert choice() == "efficient"
    assert choice(torch.float64) == "dense"


def test_choice_can_be_forced_and_is_logged_once(monkeypatch, caplog):
    inputs = make_inputs(num_tokens=5)
    backends._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger=backends.logger.name):
        ops.training_attention(*inputs)
        ops.training_attention(*inputs)
        monkeypatch.setenv("DMC_ATTENTION_BACKEND", "dense")
        ops.training_attention(*inputs)
    chosen = [r.args[3] for r in caplog.records if r.args[0] == "attention"]
    assert chosen == ["cpu", "dense"]
    monkeypatch.setenv("DMC_ATTENTION_BACKEND", "fastest")
    named = (
        "DMC_ATTENTION_BACKEND='fastest' does not exist; .* flash-attn-3 .*, flash-attn-2 .*, cpu, "
    )
    with pytest.raises(ValueError, match=named):
        ops.causal_attention(*inputs[:3])
    ops.causal_attention(*inputs[:3], backend="cpu")  # an argument counts for more
    with pytest.raises(
        ValueError, match="backend='cudnn' cannot run torch.float32.*cudnn .only half precision"
    ):
        ops.causal_attention(*inputs[:3], backend="cudnn")


def chosen(caplog, kv_heads=2, **options):
    """The kernel that is chosen, and why others were not."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in make_inputs(kv_heads=kv_heads)[:3])
    with caplog.at_level(logging.WARNING, logger=flash.logger.name):
        name = flash.choose_kernel(q, k, v, **options).name
        assert flash.choose_kernel(q, k, v, **options).name == name  # and refused in one line
    refused = [r.getMessage() for r in caplog.records]
    caplog.clear()
    return name, refused


def spoil(package, name, change):
    function = getattr(package, name)
    setattr(package, name, lambda *args, **kwargs: change(function(*args, **kwargs), *args))


def one_head_wrong(result, *unused):
    result[0][0, 3, -1] *= 1.5  # one token of one head
    return result


def test_wrong_results_are_refused(pretend_gpu, caplog):
    fa3, fa2 = pretend_gpu[flash._FA3], pretend_gpu[flash._FA2]
    spoil(fa3, "_flash_attn_forward", one_head_wrong)
    spoil(fa2, "_flash_attn_backward", lambda result, *args: args[8].mul_(1.01 + args[8].isnan()))
    name, (first, second) = chosen(caplog)
    assert name == "flash"
    assert "'flash-attn-3' is not used on cpu for torch.float32, 4 query heads, 2 KV heads" in first
    assert "its output differs by" in first
    assert "'flash-attn-2' is not used" in second and "its dv differs by 0.01 of" in second
    with pytest.raises(ValueError, match="backend='flash-attn-3' cannot run.*its output differs"):
        chosen(caplog, backend="flash-attn-3")


def test_results_that_are_wrong_for_few_heads_are_refused_there(pretend_gpu, caplog):
    """And not for others; NaN is wrong too."""
    for name in (flash._FA3, flash._FA2):
        spoil(
            pretend_gpu[name], "_flash_attn_forward",
            lambda result, q, k, *args: (result[0] * (float("nan") if k.shape[2] < 4 else 1), *result[1:]),
        )  # fmt: skip
    name, refused = chosen(caplog, kv_heads=2)
    assert name == "flash" and len(refused) == 2 and "its output differs by inf" in refused[0]
    assert chosen(caplog, kv_heads=4) == ("flash-attn-3", [])


def older_forward(q, k, v, softmax_scale, causal, window_size):
    raise AssertionError("is not called")


@pytest.mark.parametrize(
    "function, old, reason",
    [
        ("_flash_attn_forward", older_forward, "TypeError.*missing 1 required.*'window_size'"),
        ("_flash_attn_forward", lambda *a, **k: (a[0].clone(), a[0][:, 0]), "expected .2, 4, 145"),
        ("_flash_attn_backward", lambda dout, q, k, v, out, lse: None, "TypeError.*positional"),
        # does not fill what it is given
        ("_flash_attn_backward", lambda *args: args[12].fill_(float("nan")), "its d[qkv] differs by"),
    ],
)  # fmt: skip
def test_another_signature_falls_through(function, old, reason, pretend_gpu, caplog):
    setattr(pretend_gpu[flash._FA3], function, old)
    name, (line,) = chosen(caplog)
    assert name == "flash-attn-2"
    assert re.search(f"'flash-attn-3' is not used.*{reason}", line)
