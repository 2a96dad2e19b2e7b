"""Random caches for decoding, and the checks that tests and benchmarks share.

Dimension letters as in `ops.paged.decode`.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megatron_dmc.errors import DMCError
from megatron_dmc.ops import gates, reference, rope
from megatron_dmc.ops.paged import decode, kv_pages
from megatron_dmc.ops.paged.kv_pages import Pages, ScaledPages
from megatron_dmc.ops.paged.layer_cache import DelayedDecisions, LayerCache
from megatron_dmc.ops.paged.pages import FreePages
from megatron_dmc.ops.testing.yardstick import errors_within_twice_the_yardstick
from megatron_dmc.ops.training.merge import num_kept

NAN = float("nan")
_AT_ONCE = 1 << 20


def compacted(cache: LayerCache, dtype: torch.dtype, num_taken: int) -> LayerCache:
    """As `LayerCache.clone`, with no other pages than those in the tables and the `num_taken` free ones that are
    taken next, renumbered: a check widens what it compares, however large the pool."""
    free_pages, table = cache.free_pages, cache.block_table_RGM
    assert free_pages is not None
    asked = int(free_pages.state[0])
    held = table[table >= 0].unique()
    pages = torch.cat([held, free_pages.page_ids[asked : asked + num_taken]])
    numbers = torch.arange(len(held) - asked, len(pages), device=table.device)
    return replace(
        cache,
        k_pages_PSD=_some(cache.k_pages_PSD, pages),
        v_pages_PSD=_some(cache.v_pages_PSD, pages),
        block_table_RGM=torch.where(
            table < 0, -1, torch.searchsorted(held, table.clamp_min(0), out_int32=True)
        ),
        free_pages=FreePages(numbers.int(), free_pages.state),
    ).clone(dtype)


def entries_of(cache: LayerCache, dtype: torch.dtype = torch.float64) -> Tensor:
    """All live entries, head by head, keys and values in one row: (entries, 2 D) in `dtype`."""
    lengths = cache.num_entries_RG
    entries = torch.arange(int(lengths.max()), device=lengths.device).expand(*lengths.shape, -1)
    slots = cache.slots(slice(None), entries)[entries < lengths[..., None]]
    if (slots < 0).any():
        raise DMCError("an entry has no page")
    kv = torch.empty(len(slots), 2 * cache.head_dim, dtype=dtype, device=slots.device)
    for to, some in zip(kv.split(_AT_ONCE), slots.split(_AT_ONCE), strict=True):
        torch.cat(cache.load_slots(some, dtype), dim=1, out=to)
    return kv


def results_of(out: Tensor, cache: LayerCache) -> list[Tensor]:
    """The results by which an op that appends is checked: output, live entries, and, where tokens merge, open
    segments and, with a delay, the importances in the rings."""
    late = None if cache.delayed is None else cache.delayed.omega_XGW
    return [out, entries_of(cache), *(x for x in (cache.segments_RGUA, late) if x is not None)]


def names_of(cache: LayerCache, out: str) -> list[str]:
    """Of `results_of`."""
    late = cache.delayed is not None and not cache.evicts
    return [out, "entries"] + ["segments"] * (not cache.evicts) + ["late importances"] * late


def _decisions(cache: LayerCache) -> Tensor:
    return torch.empty(0) if cache.delayed is None else cache.delayed.is_merge_XGW


def _some(pages: Pages, page_ids: Tensor) -> Pages:
    some = [x[page_ids] for x in kv_pages.tensors_of(pages)]
    return some[0] if isinstance(pages, Tensor) else ScaledPages(*some)


def random_cache(
    lengths_RG: Tensor,
    *,
    dim: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    cache_dtype: torch.dtype | None = None,
    room: int = 0,
    num_free: int = 0,
    merge_window: int = 0,
    delay: int = 0,
    evicts: bool = False,
    seed: int = 0,
    in_order: bool = False,
) -> LayerCache:
    """A cache whose heads have these numbers of entries, in pages dealt out at random.

    Args:
        cache_dtype: what pages hold; None: `dtype`.
        room: width of the block table beyond the longest head, in pages; -1 there.
        num_free: free pages besides those in the tables.
        delay: the heads' first slots are a ring of this many tokens, which merge afterwards; `evicts`: or are evicted.
        in_order: pages are dealt out head by head instead.
    """
    generator = torch.Generator().manual_seed(seed)
    num_rows, num_kv_heads = lengths_RG.shape
    needed = (lengths_RG + page_size - 1) // page_size
    total = int(needed.sum())
    num_pages = total + num_free
    order = torch.arange(num_pages) if in_order else torch.randperm(num_pages, generator=generator)
    order = order.to(torch.int32)
    table = torch.full((num_rows, num_kv_heads, int(needed.max()) + room), -1, dtype=torch.int32)
    has_page = torch.arange(table.shape[2]) < needed[..., None]
    table[has_page] = order[:total]
    k_pages, v_pages = (
        kv_pages.empty_pages(num_pages, page_size, dim, dtype=cache_dtype or dtype, device=device)
        for _ in range(2)
    )
    table, lengths = table.to(device), lengths_RG.to(device, copy=True)
    on_device = torch.Generator(device=device).manual_seed(seed)
    cache = LayerCache(k_pages, v_pages, table, lengths)
    cache.poison()
    entries = torch.arange(int(lengths.max()), device=device).expand(num_rows, num_kv_heads, -1)
    slots = cache.slots(slice(None), entries) if total else entries
    is_live = entries < lengths[..., None]
    live, is_merged = slots[is_live], entries[is_live] >= delay
    for pages in (k_pages, v_pages):
        for some, merged in zip(live.split(_AT_ONCE), is_merged.split(_AT_ONCE), strict=True):
            rows = torch.randn(len(some), dim, generator=on_device, device=device)
            if pages is k_pages:
                gates.borrowed(rows)[merged] = 0.0 if not evicts else 1.0
            kv_pages.store(pages, some, rows)
    state = torch.randn(
        num_rows, num_kv_heads, num_kept(merge_window), 2 * dim + 1, generator=on_device,
        device=device,
    )  # fmt: skip
    state[..., -1] = state[..., -1].abs() + 0.1
    free_pages = FreePages.of(order[total:].to(device))
    delayed = None
    if delay:
        rings = torch.rand(num_rows, num_kv_heads, delay, generator=on_device, device=device)
        delayed = DelayedDecisions(rings > 0.5, None if evicts else rings + 0.1)
    return replace(
        cache, segments_RGUA=None if evicts else state, free_pages=free_pages, delayed=delayed
    )


def random_heads(
    batch: int, heads: list[int], dim: int, *, dtype, device, seed: int, strided: bool = False
) -> list[Tensor]:
    """Raw q, k, v with these numbers of heads; `strided`: parts of one tensor, as a fused projection
    gives them."""
    generator = torch.Generator(device=device).manual_seed(seed)
    shape = (batch, sum(heads), dim + 3 if strided else dim)
    x = torch.randn(shape, generator=generator, device=device)[..., :dim].to(dtype)
    if strided:
        wide = torch.full((batch, sum(heads) + 1, dim + 8), NAN, dtype=dtype, device=device)
        wide[:, 1:, :dim] = x
        x = wide[:, 1:, :dim]
    parts = list(x.split(heads, dim=1))
    return parts if strided else [part.contiguous() for part in parts]


def check_attention(
    attend: Callable[..., Tensor],
    q_BND: Tensor,
    cache: LayerCache,
    rows_B: Tensor,
    *,
    softmax_scale: float,
    checked: slice = slice(None),
) -> float:
    """Run `attend(cache, rows_B, q, softmax_scale=...)` and compare.

    Args:
        checked: the requests whose results are compared.

    Returns:
        the relative error.

    Raises:
        DMCError: more than twice the error of the specification in this dtype, or not zero for a head
            without entries or for padding.
    """
    out = attend(cache, rows_B, q_BND, softmax_scale=softmax_scale)
    rows = rows_B[checked]
    lengths = cache.num_entries_RG[rows].masked_fill(rows[:, None] < 0, 0)
    tables, q = cache.block_table_RGM[rows], q_BND[checked]
    # only these requests' pages are converted
    pages = tables[tables >= 0].unique()
    tables = torch.searchsorted(pages, tables.clamp_min(0))
    exact, honest = (
        reference.paged_decode_attention(
            q.to(dtype), kv_pages.load(cache.k_pages_PSD, pages, dtype),
            kv_pages.load(cache.v_pages_PSD, pages, dtype),
            tables, lengths, softmax_scale=softmax_scale,
        )
        for dtype in (torch.float64, q.dtype)
    )  # fmt: skip
    out = out[checked]
    empty = (lengths == 0).repeat_interleave(q.shape[1] // lengths.shape[1], dim=1)
    if (out[empty] != 0).any():
        raise DMCError("attention over no entries is not zero")
    return errors_within_twice_the_yardstick(["out"], [out], [exact], [honest])["out"]


def _append_in_float64(
    cache: LayerCache,
    rows_B: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    angles_XF: Tensor | None,
    positions_B: Tensor,
    *,
    alpha_offset: float | None,
    merge_window: int = 0,
    may_merge: bool = True,
) -> Tensor:
    """The specification's rotated queries, and its work on the float64 cache; the gates are those of
    the tensors' own dtype, whose epsilon is part of them."""
    given = None
    if alpha_offset is not None:
        is_merge, omega = gates.decide(q, k, alpha_offset=alpha_offset, may_merge=may_merge)
        given = is_merge, omega.double()
    angles_XF = None if angles_XF is None else angles_XF.double()
    return decode.gate_and_append(
        cache, rows_B, q.double(), k.double(), v.double(),
        rope.cosine_and_sine(angles_XF, torch.float64), positions_B, alpha_offset=alpha_offset,
        merge_window=merge_window, gates_BG=given, backend="torch",
    )  # fmt: skip


def check_append(
    append: Callable[..., Tensor],
    qkv: list[Tensor],
    angles_XF: Tensor | None,
    positions_B: Tensor,
    cache: LayerCache,
    rows_B: Tensor,
    **options,
) -> dict[str, float]:
    """Run `append(cache, rows_B, q, k, v, angles, positions, **options)` and compare everything that it mutated
    with the PyTorch version in float64.

    Returns:
        the relative errors.

    Raises:
        DMCError: as `check_attention`; or counts, pages or decisions differ, or something was written
            that was not to be.
    """

    q, k, v = qkv
    dtype = q.dtype
    poisoned, entries = cache.is_poisoned(), cache.num_entries_RG.clone()
    # a head takes one page at most
    exact, honest = (compacted(cache, d, k.shape[0] * k.shape[1]) for d in (torch.float64, dtype))

    def run(op, cache: LayerCache) -> Tensor:
        angles = rope.cosine_and_sine(angles_XF, dtype)
        return op(cache, rows_B, q, k, v, angles, positions_B, **options)

    q_ours = run(append, cache)
    q_honest = run(functools.partial(decode.gate_and_append, backend="torch"), honest)
    live = rows_B >= 0
    q_exact = _append_in_float64(
        exact, rows_B[live], q[live], k[live], v[live], angles_XF, positions_B[live], **options
    )
    assert cache.free_pages is not None and exact.free_pages is not None
    for name, ours, spec in (
        ("entry counts", cache.num_entries_RG, exact.num_entries_RG),
        ("pages held", cache.block_table_RGM >= 0, exact.block_table_RGM >= 0),
        ("state of the free list", cache.free_pages.state, exact.free_pages.state),
        ("decisions in the rings", _decisions(cache), _decisions(exact)),
    ):
        if not torch.equal(ours, spec):
            raise DMCError(f"{name} differ: {ours.tolist()}, by the specification {spec.tolist()}")
    held = cache.block_table_RGM[cache.block_table_RGM >= 0]
    if held.unique().numel() != held.numel():
        raise DMCError("a page is in two block tables")
    written = (cache.is_poisoned() != poisoned).sum()
    appended = (cache.num_entries_RG - entries).sum()
    if written != appended:
        raise DMCError(f"{int(written)} slots were filled for {int(appended)} new entries")
    return errors_within_twice_the_yardstick(
        names_of(cache, "q"),
        results_of(q_ours[live], cache),
        results_of(q_exact, exact),
        results_of(q_honest[live], honest),
    )
