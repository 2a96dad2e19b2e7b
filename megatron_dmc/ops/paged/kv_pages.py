"""Pages of keys or values as a cache stores them: in the model's dtype, or in 8 bits with scales.

Dimension letters: P pages, S slots per page, D head dim, X entries or any leading dimensions.

Every entry of 8 bits has a scale of its own, from its largest channel:

    scale = max(amax |x|, 2**-100) * float32(1 / largest)      value = round(x / scale)

in float32, to the nearest with ties to even; `largest` is 448 for float8_e4m3fn and 127 for int8.
PyTorch, Triton and CUDA give the same bytes for the same float32 numbers. An entry that merging
rewrites is rounded again from the float32 sums of its segment, and no other entry ever changes, so
errors do not accumulate.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.ops.cpu import untouched_zeros

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""The 8-bit dtypes, and what an entry's largest channel becomes."""
SMALLEST_AMAX = 2.0**-100
KV_CACHE_DTYPES = {
    "auto": None,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "int8": torch.int8,
}
"""Values of `kv_cache_dtype`; None: the model's dtype."""
_POISONED_INT8 = -128  # `quantise` never writes it


def parse_kv_cache_dtype(name: str) -> torch.dtype | None:
    """The pages' dtype, None for the model's.

    Raises:
        UnsupportedConfig: for any other name.
    """
    if name not in KV_CACHE_DTYPES:
        raise UnsupportedConfig(f"kv_cache_dtype={name!r}: use one of {', '.join(KV_CACHE_DTYPES)}")
    return KV_CACHE_DTYPES[name]


@dataclass(frozen=True)
class ScaledPages:
    """Pages of 8-bit entries. The ops take them wherever they take a tensor of pages.

    Attributes:
        values_PSD: float8_e4m3fn or int8.
        scales_PS: float32, one for each slot.
    """

    values_PSD: Tensor
    scales_PS: Tensor

    @property
    def shape(self) -> torch.Size:
        """(P, S, D), as of a tensor of pages."""
        return self.values_PSD.shape


Pages = Tensor | ScaledPages


def empty_pages(
    num_pages: int,
    page_size: int,
    head_dim: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> Pages:
    """Pages of zeros; `ScaledPages` where `dtype` is one of `LARGEST`. On a CPU those that are never written take no
    memory."""
    shape = num_pages, page_size, head_dim
    if torch.device(device).type == "cpu":
        values = untouched_zeros(shape, dtype)
    else:
        values = torch.zeros(*shape, dtype=dtype, device=device)
    if dtype not in LARGEST:
        return values
    return ScaledPages(values, torch.zeros(values.shape[:2], device=device))


def entry_bytes(head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one key or one value, its scale included."""
    return head_dim * dtype.itemsize + (torch.float32.itemsize if dtype in LARGEST else 0)


def tensors_of(pages: Pages) -> tuple[Tensor, ...]:
    """The tensors to copy with a page; the first dimension of each is P."""
    return (pages,) if isinstance(pages, Tensor) else (pages.values_PSD, pages.scales_PS)


def parts_of(
    k_pages_PSD: Pages, v_pages_PSD: Pages
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Keys and values as they are stored, and the scales of both or None: what operators take."""
    (k, *k_scales), (v, *v_scales) = tensors_of(k_pages_PSD), tensors_of(v_pages_PSD)
    k_scale, v_scale = (*k_scales, *v_scales) or (None, None)
    return k, v, k_scale, v_scale


def fill_with_nan(pages: Pages, page_ids: Tensor | slice) -> None:
    """Poison pages: reading any entry yields NaN (8-bit entries through their scale). Mutates `pages`."""
    for x in tensors_of(pages):
        x[page_ids] = _POISONED_INT8 if x.dtype == torch.int8 else float("nan")


def quantise(x_XD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Entries in 8 bits: values_XD in `dtype` and scales_X in float32. NaN in an entry makes its scale
    NaN; so does infinity, in effect."""
    largest = LARGEST[dtype]
    x = x_XD.float()
    # a product: on a GPU PyTorch divides by a number otherwise than the kernels do
    scale = x.abs().amax(-1).clamp_min(SMALLEST_AMAX) * (1.0 / largest)
    values = x / scale[..., None]
    if dtype == torch.int8:
        values = values.round().nan_to_num(0.0)
    return values.to(dtype), scale


def dequantise(values_XD: Tensor, scales_X: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse, computed in float32 (float64) and rounded to `dtype`."""
    acc = torch.promote_types(dtype, torch.float32)
    return (values_XD.to(acc) * scales_X[..., None].to(acc)).to(dtype)


def as_stored(x_XD: Tensor, pages: Pages) -> Tensor:
    """Entries as they will be read again from these pages, in their own dtype."""
    if isinstance(pages, Tensor):
        return x_XD
    return dequantise(*quantise(x_XD, pages.values_PSD.dtype), x_XD.dtype)


def store(pages: Pages, slots_X: Tensor, x_XD: Tensor) -> None:
    """Write entries to physical slots `page_id * S + offset`; -1 in all of them: nothing. Mutates `pages`."""
    if isinstance(pages, Tensor):
        _write(pages.view(-1, pages.shape[-1]), slots_X, x_XD.to(pages.dtype))
        return
    values, scales = quantise(x_XD, pages.values_PSD.dtype)
    _write(pages.values_PSD.view(-1, pages.shape[-1]), slots_X, values)
    _write(pages.scales_PS.view(-1, 1), slots_X, scales[:, None])


def _write(to_YD: Tensor, slots_X: Tensor, x_XD: Tensor) -> None:
    # no boolean index: its shape depends on values, which the host would wait for
    if x_XD.dtype.itemsize == 1:  # there is no `where` of 8-bit floats
        to_YD, x_XD = to_YD.view(torch.uint8), x_XD.view(torch.uint8)
    to_YD[slots_X] = torch.where(slots_X[:, None] < 0, to_YD[slots_X], x_XD)


def load_slots(pages: Pages, slots_X: Tensor, dtype: torch.dtype) -> Tensor:
    """The entries of physical slots, (X, D) in `dtype`; the inverse of `store`."""
    if isinstance(pages, Tensor):
        return pages.view(-1, pages.shape[-1])[slots_X].to(dtype)
    values = pages.values_PSD.view(-1, pages.shape[-1])[slots_X]
    return dequantise(values, pages.scales_PS.view(-1)[slots_X], dtype)


def load(pages: Pages, page_ids_X: Tensor, dtype: torch.dtype) -> Tensor:
    """Whole pages (X, S, D) in `dtype`."""
    if isinstance(pages, Tensor):
        return pages[page_ids_X].to(dtype)
    return dequantise(pages.values_PSD[page_ids_X], pages.scales_PS[page_ids_X], dtype)
