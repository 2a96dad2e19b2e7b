"""The kernels of prefill (K6): attention alone, and the whole op with merge scan and page write.

Regime: one request's prompt of T tokens in one chunk, page 16, D = 128, 32 query heads (on a CPU less),
decisions drawn at random at a given CR, the same in every head. Metric: median milliseconds, over the
same op without DMC (a plain cache) and over a dense causal flash kernel on contiguous tensors; the
products that attention cannot do without per second, over those of a large matrix product in this run.
The op is compared with the specification before it is timed.

Dimension letters as in `ops.paged.prefill`.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_dmc.bench.measure import Settings, as_row, measure_time
from megatron_dmc.bench.output import Panel
from megatron_dmc.ops import rope
from megatron_dmc.ops.backends import PREFILL
from megatron_dmc.ops.paged import prefill
from megatron_dmc.ops.paged.chunks import Chunks
from megatron_dmc.ops.testing import decode_case, prefill_case
from megatron_dmc.ops.training.attention import causal_attention

CHECKED_TOKENS = 600
PAGE_SIZE = 16


class _Prompt:
    """One request's prompt, and an empty cache with the pages that it needs."""

    def __init__(
        self, settings: Settings, num_tokens: int, num_kv_heads: int, group: int, dim: int,
        cr: float | None, seed: int = 0,
    ):  # fmt: skip
        make: dict[str, Any] = dict(dtype=settings.dtype, device=settings.device)
        self.chunks = Chunks.of([0], [num_tokens], settings.device)
        self.q, self.k, self.v = decode_case.random_heads(
            num_tokens, [num_kv_heads * group, num_kv_heads, num_kv_heads], dim, seed=seed, **make
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
        self.scale = dim**-0.5

    def check(self, backend: str) -> dict[str, float]:
        """Errors of the op; see `prefill_case.check_prefill`."""

        def run(*args: Any, **options: Any) -> Tensor:
            return prefill.prefill(*args, **options, backend=backend)

        return prefill_case.check_prefill(
            run, [self.q, self.k, self.v], self.gates, self.freqs, self.cache, self.chunks,
            softmax_scale=self.scale,
        )  # fmt: skip

    def whole(self, backend: str) -> Callable[[], Tensor]:
        """The op on the empty cache."""
        cache = replace(self.cache, free_pages=None)
        new_BG = prefill.new_entries(self.gates, cache.num_entries_RG, self.chunks)
        prefill_case.give_pages(self.cache, new_BG, self.chunks)

        def run() -> Tensor:
            cache.num_entries_RG.zero_()
            return prefill.prefill(
                cache, self.chunks, self.q, self.k, self.v, self.gates, self.freqs,
                softmax_scale=self.scale, backend=backend,
            )  # fmt: skip

        return run

    def attention(self, backend: str) -> tuple[Callable[[], Tensor], int]:
        """Attention alone, after the write, for which `whole` has given the pages; and the operations
        of its products."""
        q, k, v = self.q, self.k, self.v
        cache, dim = self.cache, q.shape[2]
        cache.num_entries_RG.zero_()
        if backend == "torch":
            written = prefill.write_chunk(cache, 0, k, v, self.gates, self.freqs, merge_window=0)
            entry_TG = written.entry_TG

            def run() -> Tensor:
                return prefill.attend_chunk(
                    cache, 0, q, written, self.freqs, softmax_scale=self.scale
                )[0]
        else:
            angles = rope.cosine_and_sine(self.freqs, q.dtype)
            module = PREFILL.kernels(backend)
            states = module.write_chunks(
                cache, self.chunks, k, v, self.gates, angles, merge_window=0
            )
            entry_TG = states[-1]

            def run() -> Tensor:
                attended: Tensor = module.attend_chunks(
                    cache, self.chunks, q, states, angles, softmax_scale=self.scale
                )
                return attended

        group = q.shape[1] // k.shape[1]
        return run, 4 * dim * group * int((entry_TG.long() + 1).sum())


def _flash(prompt: _Prompt) -> Callable[[], Tensor]:
    q, k, v = (x[:, None] for x in (prompt.q, prompt.k, prompt.v))
    return lambda: causal_attention(q, k, v)


def prefill_backends(backends: list[str]) -> list[str]:
    """Decode's back ends `backends` as far as they have kernels for prefill, else PyTorch."""
    has_kernels = (name if PREFILL.kernels(name) is not None else "torch" for name in backends)
    return list(dict.fromkeys(has_kernels))


def prefill_rows(
    settings: Settings, lengths: list[int], crs: list[float], heads: int, dim: int,
    groups: tuple[int, ...], backends: list[str], rate: float,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Rows of the table for every length, group and backend, as they are measured: without DMC, and at
    each CR.

    Raises:
        DMCError: a result is wrong.
    """
    cases = list(itertools.product(lengths, groups, backends))
    for num_tokens, group, backend in tqdm(cases, disable=None, leave=False):
        shape = (heads // group, group, dim)
        plain: dict[str, float] = {}
        flash = None
        for cr in (None, *crs):
            checked = _Prompt(settings, min(num_tokens, CHECKED_TOKENS), *shape, cr, seed=1)
            errors = checked.check(backend)
            prompt = _Prompt(settings, num_tokens, *shape, cr)
            if flash is None:
                flash = measure_time(_flash(prompt), settings.device, repeats=settings.repeats)
            whole = prompt.whole(backend)
            attention, operations = prompt.attention(backend)
            for op, function in (("prefill attention", attention), ("prefill", whole)):
                timing = measure_time(function, settings.device, repeats=settings.repeats)
                row = as_row(
                    timing, op=op, variant=backend, tokens=num_tokens, cr=cr, group=group,
                    head_dim=dim, errors=errors,
                )  # fmt: skip
                if cr is None:
                    plain[op] = timing.median_ms
                row["time_over_plain"] = timing.median_ms / plain[op]
                if op == "prefill attention":
                    achieved = operations / (timing.median_ms / 1e3)
                    row |= {
                        "operations": operations,
                        "operations_per_second": achieved,
                        "fraction_of_product": achieved / rate,
                        "time_over_flash": timing.median_ms / flash.median_ms,
                    }
                yield row


def prefill_panel(rows: list[dict[str, Any]]) -> Panel:
    """One bar for each measurement."""
    bars = [
        (
            f"{r['op']} T={r['tokens']} {r['group']}:1 {r['variant']} "
            + ("without DMC" if r["cr"] is None else f"CR {r['cr']:g}"),
            r["median_ms"],
            r["cr"] is not None,
        )
        for r in rows
    ]
    return Panel("Prefill of one prompt, one layer", "ms", bars)
