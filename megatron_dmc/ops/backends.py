"""Choose the back end of an op: which kernels run it on these tensors.

An `Op` lists its back ends in order of preference; the first one that can run the tensors is chosen, and the
choice and its reasons are logged once. The argument `backend` of the op, or else the environment variable
`DMC_<OP>_BACKEND` (DMC_DECODE_BACKEND, ...), names one back end instead; if that one cannot run the tensors,
or does not exist, a `ValueError` lists every back end with its reason.

The kernels of a back end are an object, usually the module of their host side, with

    refusal(...)    why they cannot run on these tensors, "" if they can; the arguments of `Op.choose`
    ...             the functions of the op, with the signatures of its other back ends

To add a back end, write such a module in a folder of `ops/`, register it below (one loader, and its name in the
ops that it has), and give the kernel cases of the tests its name. To replace one for a while, as tests do, put
a `Backend` into `Op.backends`.
"""

import functools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        load: imports and returns the kernels of the op of this name; ImportError: they are not installed.
            None: the PyTorch version inside the op, which runs everything.
        device: type of the devices on which it is a default; None: on any.
    """

    load: Callable[[str], Any] | None = None
    device: str | None = None


@functools.cache
def _load(load: Callable[[str], Any], op: str) -> tuple[Any, str]:
    try:
        return load(op), ""
    except ImportError as error:
        return None, f"{error.name or error} is not installed"


class Op:
    """An op and its back ends.

    Attributes:
        backends: by name, in order of preference.
        environment: the variable that names one of them.
    """

    def __init__(self, name: str, **backends: Backend):
        self.name = name
        self.backends = backends
        self.environment = f"DMC_{name.upper()}_BACKEND"

    def choose(self, x: Tensor, *args: Any, backend: str | None = None) -> str:
        """The name of the back end that runs the op.

        Args:
            x: the tensor whose device counts; `x` and `args` go to the back ends' `refusal`.
            backend: a name; None: as the environment says, else the first that can.

        Raises:
            ValueError: the named back end does not exist or cannot run these tensors.
        """
        source = "backend"
        if backend is None:
            backend, source = os.environ.get(self.environment) or None, self.environment
        if backend is not None:
            if backend not in self.backends or self.refusal(backend, x, *args):
                raise ValueError(self._error(f"{source}={backend!r}", backend, x, *args))
            _announce(self.name, backend, x.device.type, x.dtype, (source,))
            return backend
        reasons: list[str] = []
        for name, candidate in self.backends.items():
            if candidate.device not in (None, x.device.type):
                continue
            reason = self.refusal(name, x, *args)
            if not reason:
                _announce(self.name, name, x.device.type, x.dtype, tuple(reasons))
                return name
            reasons.append(f"{name}: {reason}")
        raise ValueError(self._error("no back end", None, x, *args))

    def refusal(self, backend: str, *args: Any) -> str:
        """The reason why a back end cannot run the op with these arguments; "" if it can."""
        load = self.backends[backend].load
        if load is None:
            return ""
        kernels, reason = _load(load, self.name)
        return reason or kernels.refusal(*args)

    def kernels(self, backend: str) -> Any:
        """The kernels of a back end that `choose` returned; None: the PyTorch version inside the op."""
        load = self.backends[backend].load
        return None if load is None else _load(load, self.name)[0]

    def _error(self, what: str, backend: str | None, x: Tensor, *args: Any) -> str:
        if backend is None or backend in self.backends:
            problem = f"{what} can run {x.dtype} of shape {tuple(x.shape)} on {x.device}"
            problem = problem if backend is None else problem.replace(" can run", " cannot run")
        else:
            problem = f"{what} does not exist"
        listed = []
        for name in self.backends:
            reason = self.refusal(name, x, *args)
            listed.append(f"{name} ({reason})" if reason else name)
        return f"{self.name}: {problem}; the back ends are {', '.join(listed)}"


@functools.cache
def _announce(op: str, name: str, device: str, dtype: torch.dtype, reasons: tuple[str, ...]):
    because = f" ({'; '.join(reasons)})" if reasons else ""
    logger.info("%s of %s on %s runs in %r%s", op, dtype, device, name, because)


def _cuda(op: str) -> Any:
    from megatron_dmc.ops.cuda import decode, pages, prefill

    return {"decode": decode, "pages": pages, "prefill": prefill}[op]


def _cpu(op: str) -> Any:
    from megatron_dmc.ops.cpu import decode, linear, merge, near, norm, pages, prefill, swiglu

    return {
        "decode": decode, "linear": linear, "merge": merge, "near": near, "norm": norm, "pages": pages,
        "prefill": prefill, "swiglu": swiglu,
    }[op]  # fmt: skip


def _triton(op: str) -> Any:
    from megatron_dmc.ops.triton import (
        decode,
        merge,
        near,
        norm,
        pages,
        prefill,
        swiglu,
        truncate,
    )  # fmt: skip

    return {
        "decode": decode, "merge": merge, "near": near, "norm": norm, "pages": pages,
        "prefill": prefill, "swiglu": swiglu, "truncate": truncate,
    }[op]  # fmt: skip


CUDA, TRITON, CPU, PYTORCH = (
    Backend(_cuda, "cuda"), Backend(_triton, "cuda"), Backend(_cpu, "cpu"), Backend(),
)  # fmt: skip

DECODE = Op("decode", cuda=CUDA, triton=TRITON, cpu=CPU, torch=PYTORCH)
"""`ops.paged.decode`. Its arguments are (x, page_size, group=1): queries or keys (..., D), slots of a page,
query heads per KV head where attention is computed."""

PREFILL = Op("prefill", cuda=CUDA, triton=TRITON, cpu=CPU, torch=PYTORCH)
"""`ops.paged.prefill`: (q, cache, merge_window), the window 0 where nothing merges."""

PAGES = Op("pages", cuda=CUDA, triton=TRITON, cpu=CPU, torch=PYTORCH)
"""`ops.paged.pages`: (page_ids)."""

MERGE = Op("merge", triton=TRITON, cpu=CPU, torch=PYTORCH)
"""`ops.training.merge`: (k, v, merge_window)."""

NEAR = Op("near", triton=TRITON, cpu=CPU, torch=PYTORCH)
"""`ops.training.near`: (q, n), the raw tokens that a query sees."""

TRUNCATE = Op("truncate", triton=TRITON, torch=PYTORCH)
"""Top-k, top-p and min-p, `ops.truncate.truncate`: (scores)."""

LINEAR = Op("linear", cpu=CPU, torch=PYTORCH)
"""Products of weights in inference, `model.inference`: (weight)."""

NORM = Op("norm", triton=TRITON, cpu=CPU, torch=PYTORCH)
"""RMSNorm in inference, `model.inference`: (weight)."""

SWIGLU = Op("swiglu", triton=TRITON, cpu=CPU, torch=PYTORCH)
"""The gate of an MLP in inference, `model.inference`: (weight), the one whose product is gated."""
