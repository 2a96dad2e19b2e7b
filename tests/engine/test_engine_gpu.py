"""The engine on a GPU: what the tests of a CPU can only stand in for. `pytest -m gpu`.

Where tokens are compared exactly, batches are the same ones or the model is in float64: elsewhere a product's
rounding may depend on the number of its rows.
"""

import functools
import math

import pytest
import torch
from random_models import VOCAB, random_model, retrofitted
from test_no_waiting import EVERYTHING

from megatron_dmc import LLM, SamplingParams, ops
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.load import LoadedModel, build_model
from megatron_dmc.config import DMCConfig
from megatron_dmc.engine import imposed
from megatron_dmc.ops import gates
from megatron_dmc.ops.backends import DECODE
from megatron_dmc.ops.paged import decode
from megatron_dmc.ops.testing import decode_case
from megatron_dmc.ops.training import flash

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = [[5 + i] * n for i, n in enumerate((1, 9, 3, 30, 17))]


def half_precision_model() -> LoadedModel:
    """A model that all kernels take; about half of its tokens merge."""
    dmc = DMCConfig(stage="finetune", target_cr=2.0, alpha_offset=0.1)
    description = ModelDescription(
        num_layers=3, hidden_size=256, ffn_hidden_size=384, num_attention_heads=8,
        num_query_groups=4, kv_channels=64, vocab_size=VOCAB, max_position_embeddings=128,
        dtype=torch.bfloat16, dmc=dmc,
    )  # fmt: skip
    model = build_model(description, dmc=dmc, device=DEVICE)
    generator = torch.Generator(device=DEVICE).manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0.0, 0.1, generator=generator)
        else:
            parameter.fill_(1.0)
    return LoadedModel(model, description, None)


def generated(llm, prompts=PROMPTS, **options):
    """Tokens, log-probabilities and entries of greedy and of drawn completions; all pages come back."""
    params = [
        SamplingParams(max_tokens=20, logprobs=0, **({"temperature": 0} if i % 2 else {"seed": i}))
        for i in range(len(prompts))
    ]
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(asked, params, use_tqdm=False, **options)
    llm.engine.check_integrity()
    assert llm.engine.context.pool.num_held == 0
    return [
        (o.outputs[0].token_ids, o.outputs[0].cumulative_logprob, o.metrics.num_entries)
        for o in outputs
    ]


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8", "int8"])
def test_captured_steps_give_what_eager_ones_give(kv_cache_dtype):
    """Bit for bit, in batches of one to five, over 8-bit pages too; and again in the same engine."""
    loaded = half_precision_model()
    options = {"device": DEVICE, "max_num_seqs": 5, "kv_cache_dtype": kv_cache_dtype}
    eager = LLM(loaded, enforce_eager=True, **options)
    captured = LLM(loaded, cudagraph_capture_sizes=[1, 2, 3, 4, 5], **options)
    assert captured.engine.runner._graphs is not None
    first = generated(eager)
    assert generated(captured) == first == generated(captured)
    entries = sum(n for *_, n in first)
    assert 1.2 < eager.stats().measured_cr < 10 and entries > 0


def test_padded_steps_give_what_eager_ones_give():
    loaded = half_precision_model()
    options = {"device": DEVICE, "max_num_seqs": 8, "max_num_batched_tokens": 16}
    eager = LLM(loaded, enforce_eager=True, **options)
    captured = LLM(loaded, cudagraph_capture_sizes=[8], **options)
    # the first token of each comes out of the same prefill; what follows may round differently
    results = [[tokens[0] for tokens, *_ in generated(llm)] for llm in (eager, captured)]
    assert results[0] == results[1]


def test_imposed_decisions_are_captured_too():
    loaded, most = half_precision_model(), 256
    decisions = imposed.ImposedDecisions.of(imposed.spread_weights(3, 4), 2.0, num_tokens=40)
    options = {
        "device": DEVICE, "max_num_seqs": 5, "max_num_batched_tokens": most,
        "make_context": functools.partial(
            imposed.ImposingContext, decisions=decisions, max_num_batched_tokens=most
        ),
    }  # fmt: skip
    eager = generated(LLM(loaded, enforce_eager=True, **options))
    assert generated(LLM(loaded, cudagraph_capture_sizes=[1, 2, 3, 4, 5], **options)) == eager


@pytest.mark.parametrize(
    "settings",
    [{"policy": "evict", "eviction_delay": 4}, {}, {"merge_window": 3}],
    ids=["evict", "merge", "window"],
)
def test_a_gpu_generates_what_a_cpu_generates(settings):
    """In float64, in which the cache's ops run in PyTorch: eviction among them."""
    loaded = random_model(dmc=retrofitted(**settings))
    greedy = SamplingParams(temperature=0, max_tokens=16)
    asked = [{"prompt_token_ids": p} for p in PROMPTS]
    results = []
    for device in ("cpu", DEVICE):
        loaded.model.to(device)
        rotary = loaded.model.rotary_pos_emb
        rotary.inv_freq = rotary.inv_freq.to(device)
        llm = LLM(loaded, device=device, max_num_seqs=3, max_num_batched_tokens=16)
        outputs = llm.generate(asked, greedy, use_tqdm=False)
        results.append([(o.outputs[0].token_ids, o.metrics.num_entries) for o in outputs])
    assert results[0] == results[1]


@pytest.mark.parametrize("captured", [False, True])
def test_a_decode_step_waits_for_the_sampled_tokens_alone(captured):
    """With every kind of sampling; waiting for an event, as the sampler does, is no synchronisation of the
    device."""
    llm = LLM(half_precision_model(), device=DEVICE, max_num_seqs=8, enforce_eager=not captured)
    engine = llm.engine
    for i, params in enumerate(EVERYTHING):
        engine.add_request(str(i), [i + 2], SamplingParams(max_tokens=12, **params))
    for _ in range(3):  # kernels are loaded, tables made
        engine.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            assert len(engine.step()) == len(EVERYTHING)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    engine.check_integrity()


HEADS = [(32, 32, 128), (8, 2, 128), (4, 1, 64), (16, 2, 64)]


@pytest.mark.parametrize("name", [n for n in flash.KERNELS if n not in ("cpu", "dense")])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_flash_adapters(name, heads):
    """Every installed stock kernel computes attention in our call of it; wrong kernels are distinguished
    from missing ones."""
    num_heads, num_kv_heads, dim = heads
    kernel, dtype = flash.KERNELS[name], torch.bfloat16
    q = torch.empty(2, num_heads, 8, dim, dtype=dtype, device=DEVICE)
    k = torch.empty(2, num_kv_heads, 8, dim, dtype=dtype, device=DEVICE)
    if reason := kernel.takes(q, k, k, True):
        pytest.skip(reason)
    kind = (q.device, dtype, num_heads, num_kv_heads, dim)
    assert flash.fault(kernel, flash.KERNELS["dense"], *kind, True) == ""
    generator = torch.Generator(device=DEVICE).manual_seed(0)

    def inputs(n):
        return torch.randn(300, 2, n, dim, generator=generator, device=DEVICE).requires_grad_()

    q, k, v = inputs(num_heads), inputs(num_kv_heads), inputs(num_kv_heads)
    logit = 4 * torch.randn(300, 2, num_kv_heads, generator=generator, device=DEVICE)
    log_keep = gates.soft_gate(logit, None, temperature=1.0)[1]
    results = []
    for backend, kind in ((name, dtype), ("dense", torch.float32)):
        out = ops.training_attention(*(x.to(kind) for x in (q, k, v)), log_keep, backend=backend)
        weight = torch.arange(out.numel(), device=DEVICE).sin().view(out.shape)
        results.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v))])
    for ours, exact in zip(*results, strict=True):
        assert (ours - exact).norm() < 0.03 * exact.norm()


def attended(backend, stored, batch=16):
    """Decode attention over heads of very different lengths, by a plan of many workers."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 3000, (batch, 4), generator=generator)
    cache = decode_case.random_cache(
        lengths, dim=128, page_size=16, dtype=torch.bfloat16, device=DEVICE, cache_dtype=stored
    )
    (q,) = decode_case.random_heads(
        batch, [16], 128, dtype=torch.bfloat16, device=DEVICE, seed=1
    )  # fmt: skip
    if reason := DECODE.refusal(backend, q, 16, 4):
        pytest.skip(reason)
    rows = torch.arange(batch, device=DEVICE)

    def attend():
        return decode.paged_decode_attention(
            cache, rows, q, softmax_scale=1 / math.sqrt(128), backend=backend
        )

    return attend


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("stored", [None, torch.float8_e4m3fn], ids=str)
def test_attention_gives_the_same_bits_twenty_times(backend, stored):
    """A race shows as a difference."""
    attend = attended(backend, stored)
    first = attend()
    assert first.isfinite().all()
    assert all(torch.equal(attend(), first) for _ in range(20))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_attention_reads_no_workspace_that_it_did_not_write(backend):
    """Outputs, plans and parts of split heads start as NaN."""
    attend = attended(backend, None)
    first = attend()
    was = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(8, device=DEVICE).isnan().all()
        poisoned = attend()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = was
    assert torch.equal(poisoned, first)
