"""Random chunks for prefill, and the check that tests and benchmarks share.

Dimension letters as in `ops.paged.prefill`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_dmc.errors import DMCError
from megatron_dmc.ops.paged import prefill
from megatron_dmc.ops.paged.chunks import Chunks
from megatron_dmc.ops.paged.decode import Gates
from megatron_dmc.ops.paged.layer_cache import LayerCache
from megatron_dmc.ops.tensors import accumulator_dtype
from megatron_dmc.ops.testing.decode_case import results_of
from megatron_dmc.ops.testing.yardstick import errors_within_twice_the_yardstick


def random_decisions(
    num_tokens: int, merge_rates_G: Sequence[float], *, device: torch.device | str, seed: int = 0
) -> Gates:
    """is_merge_TG, bool, with a rate for each head, and omega_TG, float32."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, len(merge_rates_G))
    is_merge = torch.rand(shape, generator=generator) < torch.tensor(merge_rates_G)
    omega = torch.rand(shape, generator=generator) * 0.9 + 0.1
    return is_merge.to(device), omega.to(device)


def give_pages(cache: LayerCache, new_BG: Tensor, chunks: Chunks) -> None:
    """Give every head the pages that its new entries need, from the cache's free list."""
    page_size, at = cache.page_size, 0
    assert cache.free_pages is not None
    for b, row in enumerate(chunks.rows):
        for g in range(new_BG.shape[1]):
            held = int((cache.block_table_RGM[row, g] >= 0).sum())
            total = int(cache.num_entries_RG[row, g] + new_BG[b, g])
            needed = -(-total // page_size)
            pages = cache.free_pages.page_ids[at : at + max(0, needed - held)]
            cache.block_table_RGM[row, g, held:needed] = pages
            at += len(pages)


def check_prefill(
    run: Callable[..., Tensor],
    qkv: list[Tensor],
    gates_TG: Gates | None,
    freqs_TF: Tensor | None,
    cache: LayerCache,
    chunks: Chunks,
    *,
    softmax_scale: float,
    merge_window: int = 0,
) -> dict[str, float]:
    """Run `run(cache, chunks, q, k, v, gates, freqs, softmax_scale=..., merge_window=...)` and compare its output
    and everything that it mutated with the PyTorch version in float64. It takes no pages.

    Returns:
        the relative errors.

    Raises:
        DMCError: more than twice the error of PyTorch in this dtype; or counts differ, or something was
            written that was not to be.
    """
    dtype = qkv[0].dtype
    new_BG = prefill.new_entries(gates_TG, cache.num_entries_RG, chunks)
    give_pages(cache, new_BG, chunks)
    cache = replace(cache, free_pages=None)
    before, exact, honest = (cache.clone(d) for d in (dtype, torch.float64, dtype))

    def call(op, cache: LayerCache, dtype: torch.dtype, **options) -> Tensor:
        acc = accumulator_dtype(dtype)
        return op(
            cache, chunks, *(x.to(dtype) for x in qkv) if dtype != qkv[0].dtype else qkv, gates_TG,
            None if freqs_TF is None else freqs_TF.to(acc), softmax_scale=softmax_scale,
            merge_window=merge_window, **options,
        )  # fmt: skip

    ours = call(run, cache, dtype)
    wanted = call(prefill.prefill, exact, torch.float64, backend="torch")
    usual = call(prefill.prefill, honest, dtype, backend="torch")
    if not torch.equal(cache.num_entries_RG, exact.num_entries_RG):
        raise DMCError(
            f"entry counts are {cache.num_entries_RG.tolist()}, by the specification "
            f"{exact.num_entries_RG.tolist()}"
        )
    if not torch.equal(cache.block_table_RGM, before.block_table_RGM):
        raise DMCError("the block table was changed")
    filled = (cache.is_poisoned() != before.is_poisoned()).sum()
    if filled != new_BG.sum():
        raise DMCError(f"{int(filled)} slots were filled for {int(new_BG.sum())} new entries")
    return errors_within_twice_the_yardstick(
        ["out", "entries", "segments"],
        results_of(ours, cache),
        results_of(wanted, exact),
        results_of(usual, honest),
    )
