"""Decode attention of other libraries (K4), with (request, KV head) folded into the batch.

A library sees B x G sequences of one KV head with a group of query heads, each with its own length. `bench.decode_kernels`
gives them the same data and the same check as ours. Some need another layout: flash-attn 2 has pages of 256 at least, so it
gets a cache with such pages; PyTorch's variable-length attention knows no pages and gets entries that lie one after the
other; its scaled-dot-product attention (all that a CPU has) gets them padded to the longest. Making those copies is not
timed, nor is FlashInfer's planning on the host, which is stated separately (`plan_ms`).

Dimension letters as in `ops.paged.decode`; X folded sequences, B x G.
"""

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_dmc.ops.paged.layer_cache import LayerCache
from megatron_dmc.ops.testing import decode_case

Attend = Callable[[], Tensor]


class Absent(Exception):
    """Raised where a library does not run here, with the reason."""


@dataclass(frozen=True)
class Library:
    """A library's attention.

    Attributes:
        make: (queries [B, N, D], cache) -> a function that gives the outputs [B, N, D]; raises
            `Absent`.
        page_size: of the cache that it is given.
    """

    name: str
    make: Callable[[Tensor, LayerCache], Attend]
    page_size: int = 16


def _folded(q_BND: Tensor, cache: LayerCache) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (X, group, D), lengths (X,) int32, block table (X, M)."""
    num_kv_heads = cache.num_entries_RG.shape[1]
    q = q_BND.unflatten(1, (num_kv_heads, -1)).flatten(0, 1)
    return q, cache.num_entries_RG.flatten().int(), cache.block_table_RGM.flatten(0, 1)


def _plain_pages(cache: LayerCache) -> tuple[Tensor, Tensor]:
    """Pages with a dimension for their one KV head: (P, S, 1, D)."""
    k, v = cache.k_pages_PSD, cache.v_pages_PSD
    if not (isinstance(k, Tensor) and isinstance(v, Tensor)):
        raise Absent("takes no 8-bit pages of ours")
    return k.unsqueeze(2), v.unsqueeze(2)


def _need_gpu(q_BND: Tensor) -> None:
    if not q_BND.is_cuda:
        raise Absent("needs a GPU")


def flashinfer(q_BND: Tensor, cache: LayerCache) -> Attend:
    """FlashInfer's batch decode over our own pages."""
    try:
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper
    except ImportError as e:
        raise Absent("not installed") from e
    _need_gpu(q_BND)
    q, lengths, table = _folded(q_BND, cache)
    size = cache.page_size
    pages = (lengths + size - 1) // size
    indptr = torch.cat([pages.new_zeros(1), pages.cumsum(0)]).int()
    held = torch.arange(table.shape[1], device=table.device) < pages[:, None]
    indices = table[held].int()
    last = lengths - (pages - 1) * size
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 << 20, dtype=torch.uint8, device=q.device), "NHD", use_cuda_graph=True,
        use_tensor_cores=q.shape[1] >= 4, paged_kv_indptr_buffer=indptr.clone(),
        paged_kv_indices_buffer=indices.clone(), paged_kv_last_page_len_buffer=last.clone(),
    )  # fmt: skip
    torch.cuda.synchronize()
    began = time.perf_counter()
    wrapper.plan(
        indptr, indices, last, q.shape[1], 1, q.shape[2], size, q_data_type=q.dtype,
        kv_data_type=q.dtype, sm_scale=q.shape[2] ** -0.5,
    )  # fmt: skip
    torch.cuda.synchronize()
    plan_ms = 1e3 * (time.perf_counter() - began)
    kv = _plain_pages(cache)

    def attend() -> Tensor:
        return wrapper.run(q, kv).view_as(q_BND)

    attend.plan_ms = plan_ms  # type: ignore[attr-defined]
    return attend


def flash_attention(module: str, name_of_table: str) -> Callable[..., Attend]:
    """`Library.make` of flash-attn's attention with a paged cache.

    Args:
        module: what has `flash_attn_with_kvcache`.
        name_of_table: its argument for the block table.
    """

    def make(q_BND: Tensor, cache: LayerCache) -> Attend:
        try:
            attention = importlib.import_module(module).flash_attn_with_kvcache
        except (ImportError, AttributeError) as e:
            raise Absent("not installed") from e
        _need_gpu(q_BND)
        q, lengths, table = _folded(q_BND, cache)
        k, v = _plain_pages(cache)
        tables = {name_of_table: table.clamp_min(0)}

        def attend() -> Tensor:
            out = attention(q[:, None], k, v, cache_seqlens=lengths, **tables)
            return (out[0] if isinstance(out, tuple) else out).view_as(q_BND)

        return attend

    return make


def torch_varlen(q_BND: Tensor, cache: LayerCache) -> Attend:
    """PyTorch's variable-length attention; the queries of a group are tokens that see everything."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as e:
        raise Absent("not in this PyTorch") from e
    _need_gpu(q_BND)
    q, lengths, _ = _folded(q_BND, cache)
    num_sequences, group, dim = q.shape
    k, v = (
        x[:, None].contiguous() for x in decode_case.entries_of(cache, q.dtype).split(dim, dim=1)
    )
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    starts = torch.arange(num_sequences + 1, device=q.device, dtype=torch.int32) * group
    packed = q.reshape(-1, 1, dim).contiguous()
    longest = int(lengths.max())

    def attend() -> Tensor:
        out = varlen_attn(packed, k, v, starts, ends, group, longest, scale=dim**-0.5)
        assert isinstance(out, Tensor)
        return out.view_as(q_BND)

    return attend


def torch_sdpa(q_BND: Tensor, cache: LayerCache) -> Attend:
    """PyTorch's scaled-dot-product attention, padded to the longest; group as in `torch_varlen`."""
    q, lengths, _ = _folded(q_BND, cache)
    num_sequences, _, dim = q.shape
    is_entry = torch.arange(int(lengths.max()), device=q.device) < lengths[:, None]
    k, v = (
        torch.zeros(num_sequences, 1, is_entry.shape[1], dim, dtype=q.dtype, device=q.device)
        for _ in "kv"
    )
    k[:, 0][is_entry], v[:, 0][is_entry] = decode_case.entries_of(cache, q.dtype).split(dim, dim=1)
    mask = is_entry[:, None, None]

    def attend() -> Tensor:
        out = scaled_dot_product_attention(q[:, None], k, v, attn_mask=mask, scale=dim**-0.5)
        return out.view_as(q_BND)

    return attend


LIBRARIES = [
    Library("FlashInfer", flashinfer),
    Library("flash-attn 3", flash_attention("flash_attn_interface", "page_table")),
    Library("flash-attn 2", flash_attention("flash_attn", "block_table"), page_size=256),
    Library("torch varlen", torch_varlen),
    Library("torch SDPA", torch_sdpa),
]
