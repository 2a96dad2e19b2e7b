"""The kernels of prefill (K6): attention alone, and the whole op with merge scan and page write.

Regime: one request's prompt of T tokens in one chunk, page 16, D = 128, 32 query heads (on a CPU less),
decisions drawn at random at a given CR, the same in every head. Metric: median milliseconds, over the
same op without DMC (a plain cache) and over a dense causal flash kernel on contiguous tensors; the
products that attention cannot do without per second, over those of a large matrix product in this run.
The op is compared with the specification before it is timed.

Dimension letters as in `ops.paged.prefill`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_dmc.bench.measure import Settings, as_row, measure_time
from megatron_dmc.bench.output import Case, Row
from megatron_dmc.ops import rope
from megatron_dmc.ops.backends import PREFILL
from megatron_dmc.ops.paged import prefill
from megatron_dmc.ops.paged.chunks import Chunks
from megatron_dmc.ops.testing import decode_case, prefill_case
from megatron_dmc.ops.training.attention import causal_attention

CHECKED_TOKENS = 600
PAGE_SIZE = 16


def heads_of(settings: Settings) -> tuple[int, int]:
    """Query heads, and channels of a head."""
    return (32, 128) if settings.on_gpu else (4, 64)


def groups_of(settings: Settings) -> tuple[int, int]:
    """Query heads of a KV head: of the two kinds of model that are measured."""
    return (1, 8) if settings.on_gpu else (1, 4)


class Prompt:
    """One request's prompt, and an empty cache with the pages that it needs."""

    def __init__(
        self, settings: Settings, num_tokens: int, num_heads: int, group: int, dim: int,
        cr: float | None, seed: int = 0,
    ):  # fmt: skip
        make: dict[str, Any] = dict(dtype=settings.dtype, device=settings.device)
        num_kv_heads = num_heads // group
        self.group, self.scale = group, dim**-0.5
        self.chunks = Chunks.of([0], [num_tokens], settings.device)
        self.qkv = decode_case.random_heads(
            num_tokens, [num_heads, num_kv_heads, num_kv_heads], dim, seed=seed, **make
        )
        self.gates = None
        if cr is not None:
            self.gates = prefill_case.random_decisions(
                num_tokens, [1 - 1 / cr] * num_kv_heads, device=settings.device, seed=seed
            )
        frequency = 10000.0 ** (-torch.arange(dim // 2, device=settings.device) / (dim / 2))
        half = torch.arange(num_tokens, device=settings.device)[:, None] * frequency
        self.freqs = torch.cat([half, half], dim=-1)
        width = -(-num_tokens // PAGE_SIZE)
        self.cache = decode_case.random_cache(
            torch.zeros(1, num_kv_heads, dtype=torch.int64), dim=dim, page_size=PAGE_SIZE,
            room=width, num_free=width * num_kv_heads, seed=seed, **make,
        )  # fmt: skip

    def check(self, backend: str) -> dict[str, float]:
        """Errors of the op; see `prefill_case.check_prefill`."""
        return prefill_case.check_prefill(
            functools.partial(prefill.prefill, backend=backend), self.qkv, self.gates, self.freqs,
            self.cache, self.chunks, softmax_scale=self.scale,
        )  # fmt: skip

    def flash(self) -> Tensor:
        """Dense causal attention without a cache."""
        return causal_attention(*(x[:, None] for x in self.qkv))

    def whole(self, backend: str) -> Callable[[], Tensor]:
        """The op on the empty cache."""
        cache = replace(self.cache, free_pages=None)
        new_BG = prefill.new_entries(self.gates, cache.num_entries_RG, self.chunks)
        prefill_case.give_pages(self.cache, new_BG, self.chunks)
        q, k, v = self.qkv

        def run() -> Tensor:
            cache.num_entries_RG.zero_()
            return prefill.prefill(
                cache, self.chunks, q, k, v, self.gates, self.freqs, softmax_scale=self.scale,
                backend=backend,
            )  # fmt: skip

        return run

    def attention(self, backend: str) -> tuple[Callable[[], object], int]:
        """Attention alone, after the write, for which `whole` has given the pages; and the operations
        of its products."""
        (q, k, v), cache = self.qkv, self.cache
        cache.num_entries_RG.zero_()
        run: Callable[[], object]
        if backend == "torch":
            written = prefill.write_chunk(cache, 0, k, v, self.gates, self.freqs, merge_window=0)
            entry_TG = written.entry_TG
            run = functools.partial(
                prefill.attend_chunk, cache, 0, q, written, self.freqs, softmax_scale=self.scale
            )
        else:
            angles = rope.cosine_and_sine(self.freqs, q.dtype)
            module = PREFILL.kernels(backend)
            states = module.write_chunks(
                cache, self.chunks, k, v, self.gates, angles, merge_window=0
            )
            entry_TG = states[-1]
            run = functools.partial(
                module.attend_chunks, cache, self.chunks, q, states, angles,
                softmax_scale=self.scale,
            )  # fmt: skip
        return run, 4 * q.shape[2] * self.group * int((entry_TG.long() + 1).sum())


def measure(
    settings: Settings, num_tokens: int, crs: Sequence[float], group: int, backend: str, rate: float
) -> Iterator[Row]:  # fmt: skip
    """Rows of one length, group and backend, as they are measured: without DMC, and at each CR.

    Args:
        rate: of a large matrix product, per second.

    Raises:
        DMCError: a result is wrong.
    """
    num_heads, dim = heads_of(settings)
    shape = (num_heads, group, dim)
    time = functools.partial(measure_time, device=settings.device, repeats=settings.repeats)
    plain: dict[str, float] = {}
    for cr in (None, *crs):
        errors = Prompt(settings, min(num_tokens, CHECKED_TOKENS), *shape, cr, seed=1).check(
            backend
        )
        prompt = Prompt(settings, num_tokens, *shape, cr)
        if cr is None:
            flash = time(prompt.flash)
        whole = prompt.whole(backend)
        attention, operations = prompt.attention(backend)
        for op, function in (("prefill attention", attention), ("prefill", whole)):
            timing = time(function)
            row = as_row(
                timing, op=op, variant=backend, tokens=num_tokens, cr=cr, group=group,
                head_dim=dim, errors=errors,
            )  # fmt: skip
            row["time_over_plain"] = timing.median_ms / plain.setdefault(op, timing.median_ms)
            if op == "prefill attention":
                achieved = operations / (timing.median_ms / 1e3)
                row |= {
                    "operations": operations,
                    "operations_per_second": achieved,
                    "fraction_of_product": achieved / rate,
                    "time_over_flash": timing.median_ms / flash.median_ms,
                }
            yield row


def cases(
    settings: Settings, lengths: Sequence[int], crs: Sequence[float], variants: Sequence[str],
    rate: float,
) -> list[Case]:  # fmt: skip
    """K6 of every length, group and back end: decode's `variants` that prefill, else PyTorch."""
    ours = (name if PREFILL.kernels(name) is not None else "torch" for name in variants)
    return [
        Case(
            f"prefill T={n} {group}:1 {name}",
            functools.partial(measure, settings, n, crs, group, name, rate),
        )
        for name in dict.fromkeys(ours) for n in lengths for group in groups_of(settings)
    ]  # fmt: skip
