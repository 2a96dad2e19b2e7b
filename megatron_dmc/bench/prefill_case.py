"""Random chunks for prefill, and the check that tests and benchmarks share.

Dimension letters as in `ops.paged.prefill`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_dmc.bench.decode_case import LayerCache
from megatron_dmc.bench.measure import errors_within_twice_the_yardstick
from megatron_dmc.errors import DMCError
from megatron_dmc.ops.paged import prefill
from megatron_dmc.ops.paged.kv_pages import tensors_of
from megatron_dmc.ops.paged.prefill import Chunks


def random_decisions(
    num_tokens: int, merge_rates_G: Sequence[float], *, device: torch.device | str, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """is_merge_TG, bool, with a rate for each head, and omega_TG, float32."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, len(merge_rates_G))
    is_merge = torch.rand(shape, generator=generator) < torch.tensor(merge_rates_G)
    omega = torch.rand(shape, generator=generator) * 0.9 + 0.1
    return is_merge.to(device), omega.to(device)


def give_pages(cache: LayerCache, new_BG: Tensor, chunks: Chunks) -> None:
    """Give every head the pages that its new entries need, from the cache's free list."""
    page_size, at = cache.k_pages_PSD.shape[1], 0
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
    is_merge_TG: Tensor | None,
    omega_TG: Tensor | None,
    freqs_TF: Tensor | None,
    cache: LayerCache,
    chunks: Chunks,
    *,
    softmax_scale: float,
    merge_window: int = 0,
) -> dict[str, float]:
    """Run `run(q, k, ..., segments_RGUA, chunks, softmax_scale=..., merge_window=...)` on the cache, and
    compare its output and all that it mutated with the PyTorch version in float64.

    Returns:
        the relative errors.

    Raises:
        DMCError: more than twice the error of PyTorch in this dtype; or counts differ, or something was
            written that was not to be.
    """
    dtype = qkv[0].dtype
    new_BG = prefill.new_entries(is_merge_TG, cache.num_entries_RG, chunks)
    give_pages(cache, new_BG, chunks)
    before, exact, honest = (cache.clone(d) for d in (dtype, torch.float64, dtype))

    def call(op, cache: LayerCache, dtype: torch.dtype, **options) -> Tensor:
        return op(
            *(x.to(dtype) for x in qkv) if dtype != qkv[0].dtype else qkv, is_merge_TG, omega_TG,
            None if freqs_TF is None else freqs_TF.to(cache.segments_RGUA.dtype),
            cache.k_pages_PSD, cache.v_pages_PSD, cache.block_table_RGM, cache.num_entries_RG,
            cache.segments_RGUA, chunks, softmax_scale=softmax_scale, merge_window=merge_window,
            **options,
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
    (keys,), (keys_before,) = (tensors_of(c.k_pages_PSD) for c in (cache, before))
    filled = (keys.isnan() != keys_before.isnan()).any(-1).sum()
    if filled != new_BG.sum():
        raise DMCError(f"{int(filled)} slots were filled for {int(new_BG.sum())} new entries")
    return errors_within_twice_the_yardstick(
        ["out", "entries", "segments"],
        [ours, cache.entries(), cache.segments_RGUA],
        [wanted, exact.entries(), exact.segments_RGUA],
        [usual, honest.entries(), honest.segments_RGUA],
    )
