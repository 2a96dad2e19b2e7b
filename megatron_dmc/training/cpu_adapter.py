"""Lets Megatron's training loop run on a machine without a GPU, for tests and small models.

`install()` is called by entry points, never on import. It stands in for the CUDA device: factory
calls that ask for "cuda" make CPU tensors, streams and events do nothing, and the CUDA random
state is the CPU's. Nothing of it is used where a GPU is present. The flags that a CPU needs are defaults:
`accelerators`.
"""

import contextlib
import types
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_installed = False


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda"))


class _CudaToCpu(TorchFunctionMode):
    def __torch_function__(self, func, types_, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is torch.Tensor.to:
            args = tuple(
                torch.device("cpu") if i and not isinstance(a, bool) and _is_cuda(a) else a
                for i, a in enumerate(args)
            )
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return func(*args, **kwargs)


class _Stream:
    """A stream that is always done."""

    device = torch.device("cpu")

    def __init__(self, *args, **kwargs):
        pass

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def synchronize(self):
        pass

    def record_event(self, event=None):
        return event or _Event()

    def query(self):
        return True


class _Event:
    """An event that has happened."""

    def __init__(self, *args, **kwargs):
        pass

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0


def _nothing():
    """A function that does nothing; each its own, because Dynamo wants one rule for an object."""
    return lambda *args, **kwargs: None


def _zero():
    return lambda *args, **kwargs: 0


def is_needed() -> bool:
    """True on a machine without a CUDA device."""
    return not torch.cuda.is_available()


def install() -> None:
    """Make this process's torch and Megatron treat the CPU as the CUDA device. Idempotent.

    Mutates `torch.cuda`, a few names in Megatron, and enters a TorchFunctionMode for the rest of
    the process. Does nothing where a GPU is present.
    """
    global _installed
    if _installed or not is_needed():
        return
    _installed = True
    cuda: Any = torch.cuda
    cpu = torch.device("cpu")
    cuda.current_device = lambda: cpu
    cuda.device_count = lambda: 1
    for name in (
        "set_device",
        "synchronize",
        "empty_cache",
        "reset_peak_memory_stats",
        "ipc_collect",
    ):
        setattr(cuda, name, _nothing())
    for name in ("manual_seed", "manual_seed_all"):
        setattr(cuda, name, lambda seed: torch.default_generator.manual_seed(seed))
    for name in (
        "memory_allocated",
        "max_memory_allocated",
        "memory_reserved",
        "max_memory_reserved",
    ):
        setattr(cuda, name, _zero())
    cuda.memory_stats = lambda *a, **k: _Zeros()
    cuda.Stream = _Stream
    cuda.Event = _Event
    cuda.current_stream = cuda.default_stream = lambda *a, **k: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.get_device_capability = lambda device=None: (8, 0)
    cuda.get_device_name = lambda device=None: "cpu"
    cuda.get_device_properties = lambda device=None: types.SimpleNamespace(
        major=8, minor=0, total_memory=0, multi_processor_count=1, name="cpu"
    )
    cuda.nvtx = types.SimpleNamespace(range_push=_nothing(), range_pop=_nothing(), mark=_nothing())
    _CudaToCpu().__enter__()
    _patch_megatron()


class _Zeros(dict):
    def __missing__(self, key):
        return 0


def _patch_megatron() -> None:
    import functools

    from megatron.core.fusions import fused_bias_swiglu
    from megatron.core.tensor_parallel import random as mcore_random
    from megatron.training import training

    from megatron_dmc.ops.cpu import swiglu

    mcore_random._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
    mcore_random._set_cuda_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    training.initialize_megatron = functools.partial(
        training.initialize_megatron, allow_no_cuda=True
    )
    # fused elementwise functions are compiled and warmed up for a GPU; a CPU runs them as they are
    training.set_jit_fusion_options = _nothing()
    torch._dynamo.config.disable = True
    swiglu.install(fused_bias_swiglu)
