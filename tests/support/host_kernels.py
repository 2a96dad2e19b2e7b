"""The CUDA kernels on the CPU: compiled by the host's compiler and run by tests/support/csrc/emulator.h.

A stand-in for `megatron_dmc.ops.cuda.decode` and `megatron_dmc.ops.cuda.prefill`, with the same functions.
Dimension letters as in `ops.paged.decode`.
"""

import ctypes
import os
import subprocess
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from megatron_dmc.ops.paged.kv_pages import tensors_of

SOURCES = Path(__file__).resolve().parent / "csrc"
INCLUDE = SOURCES.parents[2] / "megatron_dmc" / "csrc" / "include"
NUM_WORKERS = 5


def compile_host(source: str, target: Path, *options: str) -> None:
    compiler = os.environ.get("CXX", "c++").split()
    subprocess.run(
        [*compiler, "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
         f"-I{INCLUDE}", *options, str(SOURCES / source), "-o", str(target)],
        check=True,
    )  # fmt: skip


def compile_library(target: Path) -> None:
    """For `library`, which finds it by DMC_HOST_LIBRARY."""
    compile_host("host_kernels.cpp", target, "-shared", "-fPIC", "-O1")  # compiles faster


@cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(os.environ["DMC_HOST_LIBRARY"])
    structs = (
        AppendParams, AttentionParams, PlanParams, ReleaseParams, PrefillParams, PrefillAttentionParams
    )  # fmt: skip
    for which, struct in enumerate(structs):
        assert loaded.sizes(which) == ctypes.sizeof(struct), struct.__name__
    loaded.set_lazy_copies(int(os.environ.get("DMC_LAZY_COPIES", "0")))
    return loaded


def fields(names: str, ctype) -> list[tuple[str, type]]:
    return [(name, ctype) for name in names.split()]


class PagedKV(ctypes.Structure):
    _fields_ = [
        *fields("k_pages v_pages k_scales v_scales table entries", ctypes.c_void_p),
        *fields("table_row table_head entries_row entries_head", ctypes.c_int64),
        *fields("page_shift head_dim table_width stored", ctypes.c_int),
    ]


class AppendParams(ctypes.Structure):
    _fields_ = [
        ("kv", PagedKV),
        *fields("q k v q_out cos sin is_merge omega positions rows segments", ctypes.c_void_p),
        *fields("free_ids free_state late_merge late_omega", ctypes.c_void_p),
        *fields("q_b q_n k_b k_g v_b v_g o_b o_n cos_x sin_x seg_r seg_g", ctypes.c_int64),
        *fields("num_requests num_kv_heads group half merge_window num_free", ctypes.c_int),
        *fields("delay", ctypes.c_int),
        *fields("alpha_offset eps", ctypes.c_float),
        *fields("compress may_merge", ctypes.c_bool),
    ]


class AttentionParams(ctypes.Structure):
    _fields_ = [
        ("kv", PagedKV),
        *fields("q out rows plan part part_lse", ctypes.c_void_p),
        *fields("q_b q_n o_b o_n", ctypes.c_int64),
        *fields("num_requests num_kv_heads group num_workers", ctypes.c_int),
        ("scale", ctypes.c_float),
    ]


class PlanParams(ctypes.Structure):
    _fields_ = [
        *fields("entries rows plan", ctypes.c_void_p),
        *fields("layer_stride row_stride head_stride", ctypes.c_int64),
        *fields("num_layers num_requests num_kv_heads ahead", ctypes.c_int),
    ]


class ReleaseParams(ctypes.Structure):
    _fields_ = [
        ("ids", ctypes.c_void_p),
        *fields("row_stride row_length num_ids", ctypes.c_int64),
        *fields("free_ids state extra_owners", ctypes.c_void_p),
    ]


class PrefillParams(ctypes.Structure):
    _fields_ = [
        ("kv", PagedKV),
        *fields("k v own_k own_v cos sin is_merge omega chunks tiles starts", ctypes.c_void_p),
        *fields("segments appends base sums entry", ctypes.c_void_p),
        *fields("k_t k_g v_t v_g cos_t sin_t seg_r seg_g", ctypes.c_int64),
        *fields("num_chunks num_tiles num_kv_heads half merge_window first_entry", ctypes.c_int),
    ]


class PrefillAttentionParams(ctypes.Structure):
    _fields_ = [
        ("kv", PagedKV),
        *fields("q out own_k own_v cos sin entry chunks tiles", ctypes.c_void_p),
        *fields("near_k near_v far", ctypes.c_void_p),
        *fields("q_t q_n o_t o_n cos_t sin_t", ctypes.c_int64),
        *fields("num_tiles tile_tokens num_kv_heads group half delay", ctypes.c_int),
        ("scale", ctypes.c_float),
    ]


def refusal(*args) -> str:
    return ""


def address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def paged(cache, entries=None) -> PagedKV:
    """Args: entries: None for kernels that do not read them."""
    pages = tensors_of(cache.k_pages_PSD), tensors_of(cache.v_pages_PSD)
    (k, *k_scales), (v, *v_scales) = pages
    scales, table = (*k_scales, *v_scales) or (None, None), cache.block_table_RGM
    return PagedKV(
        *map(address, (k, v, *scales, table, entries)), *table.stride()[:2],
        *((0, 0) if entries is None else entries.stride()),
        k.shape[1].bit_length() - 1, k.shape[2], table.shape[2],
        {torch.float8_e4m3fn: 1, torch.int8: 2}.get(k.dtype, 0),
    )  # fmt: skip


def call(name: str, params: ctypes.Structure, dtype: torch.dtype | None = None) -> None:
    suffix = {None: "", torch.bfloat16: "_bf16", torch.float16: "_fp16"}[dtype]
    assert getattr(library(), name + suffix)(ctypes.byref(params)) == 0


def decode_append(
    cache, rows, q, k, v, gates, angles, positions, *, compress, may_merge, alpha_offset,
    merge_window,
):  # fmt: skip
    (is_merge, omega), (cos, sin) = gates or (None, None), angles
    segments, free = cache.segments_RGUA, cache.free_pages
    free_ids, free_state = (None, None) if free is None else (free.page_ids, free.state)
    out = None if q is None else torch.full(q.shape, float("nan"), dtype=q.dtype)
    late_merge = late_omega = None
    if cache.delayed is not None:
        late_merge, late_omega = cache.delayed.is_merge_XGW, cache.delayed.omega_XGW
    zero = (0, 0)
    params = AppendParams(
        paged(cache, cache.num_entries_RG), *map(address, (q, k, v, out, cos, sin)),
        *map(address, (is_merge, omega, positions, rows, segments if compress else None)),
        *map(address, (free_ids, free_state, late_merge, late_omega)),
        *(zero if q is None else q.stride()[:2]), *k.stride()[:2], *v.stride()[:2],
        *(zero if out is None else out.stride()[:2]),
        *(0 if x is None else x.stride(0) for x in (cos, sin)),
        *(zero if segments is None else segments.stride()[:2]), k.shape[0], k.shape[1], 1 if q is None else q.shape[1] // k.shape[1],
        0 if cos is None else cos.shape[1] // 2, merge_window,
        0 if free_ids is None else free_ids.numel(), cache.delay, alpha_offset, torch.finfo(k.dtype).eps,
        compress, may_merge,
    )  # fmt: skip
    call("append", params, k.dtype)
    return out


def plan(entries_LRG: Tensor, rows: Tensor, *, ahead: int = 0) -> Tensor:
    out = torch.full((entries_LRG.shape[0], rows.numel() * entries_LRG.shape[2] + 1), -1).int()
    call(
        "plan",
        PlanParams(
            *map(address, (entries_LRG, rows, out)), *entries_LRG.stride(), entries_LRG.shape[0],
            rows.numel(), entries_LRG.shape[2], ahead,
        ),
    )  # fmt: skip
    return out


def paged_decode_attention(
    cache, rows, q, plan_Y, *, softmax_scale, num_workers=NUM_WORKERS
):  # fmt: skip
    entries = cache.num_entries_RG
    plan_Y = plan(entries[None], rows)[0] if plan_Y is None else plan_Y
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    group = q.shape[1] // cache.num_kv_heads
    part = torch.full((num_workers, 2, group, q.shape[2]), float("nan"))
    part_lse = torch.full((num_workers, 2, group), float("nan"))
    params = AttentionParams(
        paged(cache, entries), *map(address, (q, out, rows, plan_Y)),
        *map(address, (part, part_lse)), *q.stride()[:2], *out.stride()[:2], q.shape[0],
        cache.num_kv_heads, group, num_workers, softmax_scale * 1.4426950408889634,
    )  # fmt: skip
    call("attend", params, q.dtype)
    return out


def release_pages(page_ids_XY, free_page_ids, free_state, num_extra_owners_P):
    params = ReleaseParams(
        address(page_ids_XY), page_ids_XY.stride(0), page_ids_XY.shape[1], page_ids_XY.numel(),
        *map(address, (free_page_ids, free_state, num_extra_owners_P)),
    )  # fmt: skip
    call("release", params)


def write_chunks(cache, chunks, k, v, gates, angles, *, merge_window):
    (is_merge, omega), (cos, sin) = gates or (None, None), angles
    entries, segments = cache.num_entries_RG, cache.segments_RGUA
    tiles = chunks.tiles(32)
    num_tiles, compress = len(tiles.table_X2), is_merge is not None
    own_k, own_v = (torch.full(k.shape, float("nan"), dtype=k.dtype) for _ in range(2))
    appends, base = (torch.full((num_tiles, k.shape[1]), -1).int() for _ in range(2))
    if not compress:
        base = entries[chunks.table_B3[:, 0].long()].int()
    sums = torch.full((num_tiles, k.shape[1], 2 * k.shape[2] + 1), float("nan"))
    entry = torch.full(k.shape[:2], -1).int()
    call(
        "prefill_write",
        PrefillParams(
            paged(cache, entries),
            *map(address, (k, v, own_k, own_v, cos, sin, is_merge, omega, chunks.table_B3)),
            *map(address, (tiles.table_X2, tiles.starts_Y, segments if compress else None)),
            *map(address, (appends, base, sums, entry)), *k.stride()[:2], *v.stride()[:2],
            *(0 if x is None else x.stride(0) for x in (cos, sin)), *segments.stride()[:2],
            len(chunks.rows), num_tiles, k.shape[1], 0 if cos is None else cos.shape[1] // 2,
            merge_window if compress else 0, cache.delay,
        ),
        k.dtype,
    )  # fmt: skip
    return (own_k, own_v, entry) if compress else (None, None, entry)


def attend_chunks(cache, chunks, q, states, angles, *, softmax_scale, near=None):
    from megatron_dmc.ops.cuda.prefill import rows_of

    (own_k, own_v, entry), (cos, sin) = states, angles
    group = q.shape[1] // cache.num_kv_heads
    tile_tokens = rows_of(q.shape[2]) // group
    tiles = chunks.tiles(tile_tokens, latest_first=True).table_X2
    out = torch.full(q.shape, float("nan"), dtype=q.dtype)
    call(
        "prefill_attend",
        PrefillAttentionParams(
            paged(cache),
            *map(address, (q, out, own_k, own_v, cos, sin, entry, chunks.table_B3, tiles)),
            *map(address, near or (None, None, None)),
            *q.stride()[:2], *out.stride()[:2],
            *(0 if x is None else x.stride(0) for x in (cos, sin)), len(tiles), tile_tokens,
            cache.num_kv_heads, group, 0 if cos is None else cos.shape[1] // 2,
            cache.delay, softmax_scale * 1.4426950408889634,
        ),
        q.dtype,
    )  # fmt: skip
    return out
