"""Which implementation runs the cache ops."""

import functools
import importlib
import importlib.util
import logging
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

Backend = Literal["torch", "triton", "cuda", "cpu"]

logger = logging.getLogger(__name__)


def refusal(backend: str, x: Tensor, page_size: int, group: int = 1) -> str:
    """What a backend's kernels do not take about these tensors; empty if they take them."""
    dtypes: tuple[torch.dtype, ...]
    if backend == "triton":
        try:
            from megatron_dmc.ops.triton.launch import INTERPRETED
        except ImportError:
            return "Triton is not installed"
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        if not (x.is_cuda or INTERPRETED):
            return "tensors that are not on a GPU"
    elif backend == "cpu":
        from megatron_dmc.ops import cpu

        dtypes = (torch.bfloat16, torch.float32)
        if reason := cpu.absence():
            return reason
        if x.device.type != "cpu":
            return "tensors that are not on the CPU"
        if reason := cpu.refusal(x.shape[-1], page_size, group):
            return reason
    else:
        from megatron_dmc.ops import cuda

        dtypes = (torch.bfloat16, torch.float16)
        if reason := cuda.absence():
            return reason
        if not x.is_cuda:
            return "tensors that are not on a GPU"
        if x.shape[-1] not in cuda.HEAD_DIMS:
            return f"head_dim={x.shape[-1]}; they are built for {cuda.HEAD_DIMS}"
        if page_size not in cuda.PAGE_SIZES:
            return f"page_size={page_size}; they are built for {cuda.PAGE_SIZES}"
        if group > (most := cuda.largest_group(x.shape[-1])):
            return f"{group} query heads for each KV head; they take up to {most}"
    if x.dtype not in dtypes:
        return f"dtype {x.dtype}"
    if x.shape[-1] > 256:
        return f"head_dim={x.shape[-1]}, more than 256"
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] < 8:
        return "GPUs before compute capability 8.0"
    return ""


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)


def _check_name(backend: str | None) -> None:
    if backend not in (None, "torch", "triton", "cuda", "cpu"):
        raise ValueError(
            f"backend={backend!r} does not exist; use 'cuda', 'triton', 'cpu', 'torch' or None"
        )


def choose_backend(backend: str | None, x: Tensor, page_size: int, group: int = 1) -> Backend:
    """The one place that picks the default backend of the cache ops.

    Args:
        backend: "torch", "triton", "cuda" or "cpu"; None: on a GPU the CUDA extension, else Triton, on a CPU
            its extension, and where those cannot, PyTorch, the reasons logged once.
        x: queries or keys (..., D).
        group: query heads for each KV head, where attention is computed.

    Raises:
        ValueError: for a backend that does not exist or does not take these tensors.
    """
    _check_name(backend)
    if backend == "torch" or (backend is None and x.device.type not in ("cpu", "cuda")):
        return "torch"
    if backend is not None:
        if reason := refusal(backend, x, page_size, group):
            raise ValueError(f"backend={backend!r} does not take {reason}; use None or 'torch'")
        return backend  # type: ignore[return-value]
    reasons: list[str] = []
    for name in ("cuda", "triton") if x.is_cuda else ("cpu",):
        reason = refusal(name, x, page_size, group)
        if not reason:
            if reasons:
                _say_once(f"cache ops run in {name}: {'; '.join(reasons)}")
            return name  # type: ignore[return-value]
        reasons.append(f"{name} kernels: {reason}")
    _say_once(f"cache ops run in PyTorch: {'; '.join(reasons)}")
    return "torch"


def choose_page_backend(backend: str | None, x: Tensor) -> Backend:
    """As `choose_backend`, for the ops on page ids: kernels wherever they exist for the device of `x`.

    Raises:
        ValueError: for a backend that does not exist.
    """
    _check_name(backend)
    if backend is not None:
        return backend  # type: ignore[return-value]
    from megatron_dmc.ops import cpu, cuda

    if not x.is_cuda:
        return "torch" if x.device.type != "cpu" or cpu.absence() else "cpu"

    if not cuda.absence():
        return "cuda"
    return "triton" if importlib.util.find_spec("triton") else "torch"


def kernels(backend: Backend, of: Literal["decode", "prefill"] = "decode") -> ModuleType:
    """A backend's module of decoding, with `decode_append`, `plan`, `paged_decode_attention` and
    `release_pages`, or of prefill, with `write_chunks` and `attend_chunks`."""
    return importlib.import_module(f"megatron_dmc.ops.{backend}.{of}")
