"""Random caches for decoding, and the checks that tests and benchmarks share.

Dimension letters as in `ops.paged.decode`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dmc.bench.measure import errors_within_twice_the_yardstick
from megatron_dmc.errors import DMCError
from megatron_dmc.ops import gates, reference, rope
from megatron_dmc.ops.paged import decode, kv_pages
from megatron_dmc.ops.paged.kv_pages import Pages, ScaledPages
from megatron_dmc.ops.paged.pages import FreePages
from megatron_dmc.ops.tensors import accumulator_dtype
from megatron_dmc.ops.training.merge import num_kept

NAN = float("nan")
_AT_ONCE = 1 << 20


@dataclass
class LayerCache:
    """One layer's storage over a pool of its own; whatever holds no entry is NaN."""

    k_pages_PSD: Pages
    v_pages_PSD: Pages
    block_table_RGM: Tensor
    num_entries_RG: Tensor
    segments_RGUA: Tensor
    free_pages: FreePages

    def clone(self, dtype: torch.dtype) -> "LayerCache":
        """A copy with keys and values in another dtype, and the sums in its accumulator's. Entries of
        8 bits stay what they are, but in float64 they are widened."""
        return LayerCache(
            _clone(self.k_pages_PSD, dtype),
            _clone(self.v_pages_PSD, dtype),
            self.block_table_RGM.clone(),
            self.num_entries_RG.clone(),
            self.segments_RGUA.to(accumulator_dtype(dtype), copy=True),
            FreePages(self.free_pages.page_ids.clone(), self.free_pages.state.clone()),
        )

    def of_rows(self, rows: slice) -> "LayerCache":
        """A view of some requests' cache, over the same pool."""
        return LayerCache(
            self.k_pages_PSD, self.v_pages_PSD, self.block_table_RGM[rows],
            self.num_entries_RG[rows], self.segments_RGUA[rows], self.free_pages,
        )  # fmt: skip

    def compacted(self, dtype: torch.dtype, num_taken: int) -> "LayerCache":
        """As `clone`, with no other pages than those in the tables and the `num_taken` free ones that are
        taken next, renumbered: a check widens what it compares, however large the pool."""
        table, asked = self.block_table_RGM, int(self.free_pages.state[0])
        free = self.free_pages.page_ids[asked : asked + num_taken]
        held = table[table >= 0].unique()
        pages = torch.cat([held, free])
        numbers = torch.arange(len(held) - asked, len(pages), device=table.device)
        return LayerCache(
            _some(self.k_pages_PSD, pages),
            _some(self.v_pages_PSD, pages),
            torch.where(
                table < 0, -1, torch.searchsorted(held, table.clamp_min(0), out_int32=True)
            ),
            self.num_entries_RG,
            self.segments_RGUA,
            FreePages(numbers.int(), self.free_pages.state),
        ).clone(dtype)

    def entries(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """All live entries, head by head, keys and values side by side: (entries, 2 D) in `dtype`."""
        page_size, dim = self.k_pages_PSD.shape[1:]
        lengths = self.num_entries_RG
        entries = torch.arange(int(lengths.max()), device=lengths.device).expand(*lengths.shape, -1)
        is_live = entries < lengths[..., None]
        slots = decode.slots_of_entries(self.block_table_RGM, entries, page_size)[is_live]
        if (slots < 0).any():
            raise DMCError("an entry has no page")
        kv = torch.empty(len(slots), 2 * dim, dtype=dtype, device=slots.device)
        for out, pages in zip(
            kv.split(dim, dim=1), (self.k_pages_PSD, self.v_pages_PSD), strict=True
        ):
            for to, some in zip(out.split(_AT_ONCE), slots.split(_AT_ONCE), strict=True):
                to.copy_(kv_pages.load(_slots_as_pages(pages), some, dtype)[:, 0])
        return kv

    def is_poisoned(self) -> Tensor:
        """Slots whose key is NaN, bool (P, S)."""
        keys = self.k_pages_PSD
        return keys.isnan().any(-1) if isinstance(keys, Tensor) else keys.scales_PS.isnan()


def _some(pages: Pages, page_ids: Tensor) -> Pages:
    some = [x[page_ids] for x in kv_pages.tensors_of(pages)]
    return some[0] if isinstance(pages, Tensor) else ScaledPages(*some)


def _slots_as_pages(pages: Pages) -> Pages:
    """The same memory as pages of one slot."""
    flat = [x.flatten(0, 1).unsqueeze(1) for x in kv_pages.tensors_of(pages)]
    return flat[0] if isinstance(pages, Tensor) else ScaledPages(*flat)


def _clone(pages: Pages, dtype: torch.dtype) -> Pages:
    if isinstance(pages, Tensor):
        return pages.to(dtype, copy=True)
    if dtype == torch.float64:
        return kv_pages.dequantise(pages.values_PSD, pages.scales_PS, dtype)
    return ScaledPages(pages.values_PSD.clone(), pages.scales_PS.clone())


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
    seed: int = 0,
    in_order: bool = False,
) -> LayerCache:
    """A cache whose heads have these numbers of entries, in pages dealt out at random.

    Args:
        cache_dtype: what pages hold; None: `dtype`.
        room: width of the block table beyond the longest head, in pages; -1 there.
        num_free: free pages besides those in the tables.
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
    entries = torch.arange(int(lengths.max()), device=device).expand(num_rows, num_kv_heads, -1)
    slots = decode.slots_of_entries(table, entries, page_size) if total else entries
    slots = torch.where(entries < lengths[..., None], slots, -1).flatten()
    on_device = torch.Generator(device=device).manual_seed(seed)
    live = slots[slots >= 0]
    for pages in (k_pages, v_pages):
        kv_pages.fill_with_nan(pages, slice(None))
        for some in live.split(_AT_ONCE):
            rows = torch.randn(len(some), dim, generator=on_device, device=device)
            if pages is k_pages:
                gates.borrowed(rows).zero_()
            kv_pages.store(pages, some, rows)
    state = torch.randn(
        num_rows, num_kv_heads, num_kept(merge_window), 2 * dim + 1, generator=on_device,
        device=device,
    )  # fmt: skip
    state[..., -1] = state[..., -1].abs() + 0.1
    free_pages = FreePages.of(order[total:].to(device))
    return LayerCache(k_pages, v_pages, table, lengths, state, free_pages)


def random_heads(
    batch: int, heads: list[int], dim: int, *, dtype, device, seed: int, strided: bool = False
) -> list[Tensor]:
    """Raw q, k, v with so many heads each; `strided`: parts of one tensor, as a fused projection
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
    """Run `attend(q, k_pages, v_pages, table_RGM, entries_RG, rows_B, softmax_scale=...)` and compare.

    Args:
        checked: the requests whose results are compared.

    Returns:
        the relative error.

    Raises:
        DMCError: more than twice the error of the specification in this dtype, or not zero for a head
            without entries or for padding.
    """
    args = (cache.block_table_RGM, cache.num_entries_RG)
    out = attend(q_BND, cache.k_pages_PSD, cache.v_pages_PSD, *args, rows_B,
                 softmax_scale=softmax_scale)  # fmt: skip
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
    q, k, v, positions, rows, angles_XF, cache, *,
    alpha_offset, merge_window=0, compress=True, may_merge=True,
) -> Tensor:  # fmt: skip
    """The specification's rotated queries, and its work on the float64 cache; the gates are those of
    the tensors' own dtype, whose epsilon is part of them."""
    is_merge = omega = None
    if compress:
        is_merge, omega = gates.decide(q, k, alpha_offset=alpha_offset, may_merge=may_merge)
        omega = omega.double()
    angles = None if angles_XF is None else angles_XF[positions].double()
    cos, sin = rope.cosine_and_sine(angles, torch.float64)
    decode.torch_append(
        k.double(), v.double(), is_merge, omega, cos, sin, cache.k_pages_PSD, cache.v_pages_PSD,
        cache.block_table_RGM, cache.num_entries_RG, cache.segments_RGUA, rows, merge_window,
        cache.free_pages,
    )  # fmt: skip
    return rope.rotate_by(q.double(), angles, compress=compress)


def check_append(
    append: Callable[..., Tensor],
    qkv: list[Tensor],
    angles_XF: Tensor | None,
    positions_B: Tensor,
    cache: LayerCache,
    rows_B: Tensor,
    **options,
) -> dict[str, float]:
    """Run `append(q, k, v, cos, sin, positions, k_pages, ..., rows_B, free_pages=..., **options)` on
    the cache, and compare all that it mutated with the PyTorch version in float64.

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
    exact, honest = (cache.compacted(d, k.shape[0] * k.shape[1]) for d in (torch.float64, dtype))

    def run(op, cache: LayerCache) -> Tensor:
        cos, sin = rope.cosine_and_sine(angles_XF, dtype)
        return op(
            q, k, v, cos, sin, positions_B, cache.k_pages_PSD, cache.v_pages_PSD,
            cache.block_table_RGM, cache.num_entries_RG, cache.segments_RGUA, rows_B,
            free_pages=cache.free_pages, **options,
        )  # fmt: skip

    q_ours = run(append, cache)
    q_honest = run(functools.partial(decode.gate_and_append, backend="torch"), honest)
    live = rows_B >= 0
    q_exact = _append_in_float64(
        q[live], k[live], v[live], positions_B[live], rows_B[live], angles_XF, exact, **options
    )
    for name, ours, spec in (
        ("entry counts", cache.num_entries_RG, exact.num_entries_RG),
        ("pages held", cache.block_table_RGM >= 0, exact.block_table_RGM >= 0),
        ("state of the free list", cache.free_pages.state, exact.free_pages.state),
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
        ["q", "entries", "segments"],
        [q_ours[live], cache.entries(), cache.segments_RGUA],
        [q_exact, exact.entries(), exact.segments_RGUA],
        [q_honest[live], honest.entries(), honest.segments_RGUA],
    )
