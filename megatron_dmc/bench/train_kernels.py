"""The kernels of training: merge (K1) and attention (K2).

Regime: one sequence length at a time, random data larger than the GPU's cache, gates as in a retrofit
halfway to CR 2; forward alone and forward with backward. Metric: median milliseconds; for the merge also
the bytes that it must move over the bandwidth of a plain copy on the same machine; for attention also
the time of the same stock kernel without DMC, and with a merge delay that of DMC without one. Every variant of ours is compared with the
specification, on a prefix and one sequence of the same data, before anything is timed.

Dimension letters: T tokens, B batch, N query heads, G key/value heads, D head dim, W merge window.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dmc import ops
from megatron_dmc.bench.measure import (
    Settings,
    against_copy,
    as_row,
    copy_bandwidth,
    document,
    measure_time,
    peak_memory,
    rows_of,
)
from megatron_dmc.bench.output import Case, Panel, Result, Row
from megatron_dmc.bench.prefill_kernels import groups_of
from megatron_dmc.ops import gates, reference
from megatron_dmc.ops.backends import MERGE
from megatron_dmc.ops.testing.yardstick import errors_within_twice_the_yardstick
from megatron_dmc.ops.training.flash import choose_kernel

RELEASED_WINDOW = 12
DELAY = 16
CHECKED_TOKENS = 256

type Op = Callable[..., Any]


def unrolled_merge(
    k_TBGD: Tensor, v_TBGD: Tensor, alpha_TBG: Tensor, omega_TBG: Tensor, *, merge_window: int
) -> tuple[Tensor, Tensor]:
    """Windowed merging as W shifted additions, the formulation that a compiler is given elsewhere."""
    x = torch.cat([k_TBGD, v_TBGD], dim=-1).float() * omega_TBG[..., None]
    weight, chain = omega_TBG.float(), torch.ones_like(omega_TBG, dtype=torch.float32)
    total, mass = x, weight
    for age in range(1, min(merge_window, x.shape[0])):
        # chain_t: the product of alpha over (t - age, t]
        chain = chain[1:] * alpha_TBG[1 : alpha_TBG.shape[0] - age + 1]
        past = chain[..., None] * x[:-age]
        total = total + F.pad(past, (0, 0, 0, 0, 0, 0, age, 0))
        mass = mass + F.pad(chain * weight[:-age], (0, 0, 0, 0, age, 0))
    y = (total / mass[..., None]).to(k_TBGD.dtype)
    return y.split(k_TBGD.shape[-1], dim=-1)  # type: ignore[return-value]


def random_tensors(settings: Settings, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator(device=settings.device).manual_seed(0)
    return [
        torch.randn(s, generator=generator, device=settings.device, dtype=torch.float32).to(
            settings.dtype
        )
        for s in shapes
    ]


def random_gates(settings: Settings, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """alpha, log_keep, omega; about half of the tokens merge."""
    logit, importance = random_tensors(settings, shape, shape)
    alpha, log_keep, _ = gates.soft_gate(logit.float(), None, temperature=0.1)
    return alpha, log_keep, torch.sigmoid(importance.float())


def run_both_ways(op: Op, inputs: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outs = op(*inputs)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    found = torch.autograd.grad(outs, inputs, grads, allow_unused=True)
    zeros = [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]
    return [*(x.detach() for x in outs), *zeros]


def check(
    names: list[str], op: Op, spec: Op, inputs: list[Tensor], heads: list[int], shapes: list[int]
) -> dict[str, float]:
    """Compare `op` on all of the data with `spec` on one sequence's prefix.

    Both are causal, and the outputs' gradient is zero behind the prefix, so a prefix decides alone
    over its outputs and gradients.

    Args:
        heads: of each input, how many heads belong to the first KV head.
        shapes: indices of the inputs whose shape the outputs have.
    """
    tokens = min(CHECKED_TOKENS, inputs[0].shape[0])
    generator = torch.Generator(device=inputs[0].device).manual_seed(1)
    grads = []
    for i in shapes:
        g = torch.randn(inputs[i].shape, generator=generator, device=inputs[i].device)
        g[tokens:] = 0
        grads.append(g.to(inputs[i].dtype))
    parts = [*(heads[i] for i in shapes), *heads]
    ours = [
        x[:tokens, :1, :h] for x, h in zip(run_both_ways(op, inputs, grads), parts, strict=True)
    ]
    inputs = [x[:tokens, :1, :h] for x, h in zip(inputs, heads, strict=True)]
    grads = [x[:tokens, :1, : heads[i]] for x, i in zip(grads, shapes, strict=True)]
    exact = run_both_ways(spec, [x.double() for x in inputs], [x.double() for x in grads])
    dtype = inputs[0].dtype
    honest = run_both_ways(spec, [x.to(dtype) for x in inputs], grads)
    return errors_within_twice_the_yardstick(names, ours, exact, honest)


def measure_both_ways(
    op: Op, inputs: list[Tensor], shapes: list[int], settings: Settings, columns: Row
) -> Iterator[Row]:
    """Rows for the forward alone and for both directions."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    grads = random_tensors(settings, *(inputs[i].shape for i in shapes))
    forward = functools.partial(op, *inputs)
    both = functools.partial(run_both_ways, op, inputs, grads)
    for direction, function in (("forward", forward), ("both", both)):
        timing = measure_time(function, settings.device, repeats=settings.repeats)
        memory = peak_memory(function, settings.device)
        yield as_row(timing, **columns, direction=direction, peak_memory_bytes=memory)


def merge_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, int]:
    """Bytes that merging must move: forward reads k, v and both gates and writes k, v; backward reads
    k, v, their outputs' gradients and the gates, and writes all gradients."""
    tokens, batch, heads, dim = shape
    rows = tokens * batch * heads
    tensor, gate = rows * dim * dtype.itemsize, rows * 4
    return {"forward": 4 * tensor + 2 * gate, "both": 10 * tensor + 6 * gate}


def measure_merge(
    settings: Settings, length: int, bandwidth: float, *, alternatives: bool
) -> Iterator[Row]:
    """K1 of one length, row by row; without the alternatives only the backend that training takes.

    Raises:
        DMCError: a result is wrong.
    """
    shape = (length, max(1, 16384 // length), 32, 128) if settings.on_gpu else (length, 1, 2, 32)
    k, v = random_tensors(settings, shape, shape)
    alpha, _, omega = random_gates(settings, shape[:3])
    inputs = [k, v, alpha, omega]
    variants: list[tuple[str, int, Op]] = []
    for window in (0, RELEASED_WINDOW):
        backend = MERGE.choose(k, v, window)
        for name in dict.fromkeys((backend, "torch") if alternatives else (backend,)):
            variants.append((name, window, functools.partial(ops.merge, backend=name)))
    if alternatives:
        name = "unrolled, compiled" if settings.on_gpu else "unrolled"
        unrolled = torch.compile(unrolled_merge) if settings.on_gpu else unrolled_merge
        variants.append((name, RELEASED_WINDOW, unrolled))
    needed = merge_bytes(shape, settings.dtype)
    names = ["y_k", "y_v", "grad k", "grad v", "grad alpha", "grad omega"]
    for name, window, merge in variants:
        op, spec = (functools.partial(f, merge_window=window) for f in (merge, reference.merge))
        errors = check(names, op, spec, inputs, [1] * 4, [0, 1])
        columns = {"op": "merge", "variant": name, "tokens": length, "shape_TBGD": shape,
                   "merge_window": window}  # fmt: skip
        for row in measure_both_ways(op, inputs, [0, 1], settings, columns):
            moved = against_copy(needed[row["direction"]], row["median_ms"], bandwidth)
            yield {**row, "errors": errors, **moved}


def flex_attention(num_heads: int, length: int) -> Op:
    """FlexAttention with the bias captured in its score function."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    compiled: Op = torch.compile(flex)
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cuda")

    def attend(q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor) -> Tensor:
        bias = torch.cat([log_keep[1:], torch.zeros_like(log_keep[:1])]).permute(1, 2, 0)
        group = num_heads // k.shape[2]

        def score(s, b, h, i, j):
            return s + torch.where(i == j, 0.0, bias[b, h // group, j])

        q, k = (gates.zero_borrowed_channel(x) for x in (q, k))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        out = compiled(q, k, v, score_mod=score, block_mask=mask, enable_gqa=group > 1)
        return out.permute(2, 0, 1, 3)

    return attend


def dense_bias_attention(q: Tensor, k: Tensor, v: Tensor, log_keep: Tensor) -> Tensor:
    """Memory-efficient attention with a bias for every pair of tokens, as the released code does."""
    length, group = q.shape[0], q.shape[2] // k.shape[2]
    bias = torch.cat([log_keep[1:], torch.zeros_like(log_keep[:1])]).permute(1, 2, 0)
    bias = bias.repeat_interleave(group, dim=1)[:, :, None].expand(-1, -1, length, -1)
    eye = torch.eye(length, dtype=torch.bool, device=q.device)
    future = torch.ones_like(eye).triu(1)
    bias = bias.masked_fill(eye, 0.0).masked_fill(future, float("-inf")).to(q.dtype)
    q, k = (gates.zero_borrowed_channel(x) for x in (q, k))
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).permute(2, 0, 1, 3)


def measure_attention(
    settings: Settings, length: int, group: int, *, alternatives: bool
) -> Iterator[Row]:
    """K2 of one length, row by row; without the alternatives only ours, with and without a delay, and the stock kernel.

    Raises:
        DMCError: a result is wrong.
    """
    batch, heads, dim = (max(1, 16384 // length), 32, 128) if settings.on_gpu else (1, 4, 32)
    shapes = [(length, batch, n, dim) for n in (heads, heads // group, heads // group)]
    q, k, v, raw_k, raw_v = random_tensors(settings, *shapes, *shapes[1:])
    _, log_keep, _ = random_gates(settings, shapes[1][:3])
    inputs = [q, k, v, log_keep]
    delayed = functools.partial(ops.delayed_attention, merge_delay=DELAY)
    variants: list[tuple[str, Op | str]] = [
        ("stock kernel without DMC", lambda q, k, v, _: ops.causal_attention(q, k, v)),
        ("DMC", ops.training_attention),
        (f"DMC, merge delay {DELAY}", delayed),
    ]
    if alternatives:
        flex = flex_attention(heads, length) if settings.on_gpu else "needs a GPU"
        dense: Op | str = dense_bias_attention
        bias_bytes = batch * heads * length**2 * settings.dtype.itemsize
        if settings.on_gpu and 8 * bias_bytes > torch.cuda.mem_get_info(settings.device)[0]:
            dense = "its bias does not fit into memory"
        variants += [("FlexAttention", flex), ("dense bias", dense)]
    columns: Row = {
        "op": "attention",
        "kernel": choose_kernel(*(x.permute(1, 2, 0, 3) for x in (q, k, v))).name,
        "tokens": length,
        "group": group,
        "shape_TBND": shapes[0],
        "num_kv_heads": heads // group,
    }
    specs: dict[Op, Op] = {
        ops.training_attention: reference.training_attention,
        delayed: functools.partial(reference.delayed_attention, merge_delay=DELAY),
    }
    stock: dict[str, float] = {}
    without_delay: dict[str, float] = {}
    for name, op in variants:
        columns["variant"], errors = name, None
        if isinstance(op, str):
            yield {**columns, "skipped": op}
            continue
        given = [q, raw_k, raw_v, k, v, log_keep] if op is delayed else inputs
        if op in specs:
            names = ["out", "grad q", *(f"grad of input {i}" for i in range(1, len(given)))]
            errors = check(names, op, specs[op], given, [group] + [1] * (len(given) - 1), [0])
        for row in measure_both_ways(op, given, [0], settings, columns):
            time, direction = row["median_ms"], row["direction"]
            row |= {"errors": errors, "time_over_stock": time / stock.setdefault(direction, time)}
            if op in specs:
                row["time_over_no_delay"] = time / without_delay.setdefault(direction, time)
            yield row


def cases(settings: Settings, bandwidth: float, *, alternatives: bool = True) -> list[Case]:
    """K1 and K2 of the settings' lengths."""
    merge = functools.partial(
        measure_merge, settings, bandwidth=bandwidth, alternatives=alternatives
    )
    attention = functools.partial(measure_attention, settings, alternatives=alternatives)
    return [
        *(Case(f"K1 merge, T={n}", functools.partial(merge, n)) for n in settings.lengths),
        *(Case(f"K2 attention, T={n} {group}:1", functools.partial(attention, n, group))
          for n in settings.lengths for group in groups_of(settings)),
    ]  # fmt: skip


def run(args: argparse.Namespace) -> Result:
    """`megatron-dmc bench train-kernels`."""
    settings = Settings.from_args(args, gpu=(4096, 8192, 32768), cpu=(128, 256))
    bandwidth = copy_bandwidth(settings)
    rows = rows_of(cases(settings, bandwidth))
    result = document(
        "train-kernels", settings, copy_bytes_per_second=bandwidth, lengths=settings.lengths,
        rows=rows,
    )  # fmt: skip
    both = [row for row in rows if row.get("direction") == "both"]
    merge, attention = ([r for r in both if r["op"] == op] for op in ("merge", "attention"))
    panels = [
        Panel("Merge, forward and backward: bandwidth", "of a copy", merge, "fraction_of_copy",
              ("tokens", "merge_window", "variant")),
        Panel("Training attention, forward and backward", "ms", attention, "median_ms",
              ("tokens", "group", "variant")),
    ]  # fmt: skip
    return Result(result, settings.output, panels)
