"""A GPU that computes nothing: fake tensors, the CUDA kernels' host side, and a guard against waiting.

What a host would wait for shows without a device: values that are read, shapes that depend on values, and
copies between the host and the device that are not asynchronous.
"""

import contextlib

import numpy as np
import torch
from random_models import VOCAB
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_dmc.cache import tables as block_tables
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.load import build_model
from megatron_dmc.config import DMCConfig
from megatron_dmc.engine import EngineConfig, LLMEngine, sampler
from megatron_dmc.ops import backends, cuda
from megatron_dmc.ops.cuda import decode as cuda_decode
from megatron_dmc.ops.triton import norm, swiglu, truncate

aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)


def _is_pinned(x):
    return getattr(x, "pinned", False)


class NoWaiting(TorchDispatchMode):
    """Refuses operations that make the host wait for a GPU.

    A list as an index and `torch.tensor(..., device="cuda")` are copies from pageable memory; so is a
    number that is assigned through a tensor of indices (a 0-dimensional tensor on the host, which
    `index_put_` copies). Values that are read and shapes that depend on data are refused by fake tensors.

    Attributes:
        calls: names of the operations on the GPU, in order.
    """

    def __init__(self):
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.prim.device.default:
            return out
        tensors = [x for x in tree_leaves((args, kwargs, out)) if torch.is_tensor(x)]
        devices = {x.device.type for x in tensors}
        if "cuda" in devices:
            self.calls.append(function.name().removeprefix("aten::"))
        if devices >= {"cpu", "cuda"} and not self._is_asynchronous(
            function, tensors, args, kwargs
        ):
            raise AssertionError(f"{function}: the host waits for a copy to or from the device")
        return out

    @staticmethod
    def _is_asynchronous(function, tensors, args, kwargs):
        if function is aten.fill_.Tensor:  # the value becomes an argument of the kernel
            return args[1].device.type == "cpu"
        asked = (kwargs or {}).get("non_blocking", args[2:3] == (True,))
        return function in COPIES and asked and all(x.is_cuda or _is_pinned(x) for x in tensors)


class MadeUpCopy:
    """In place of `AsyncCopy`: values that a GPU could have given. The sampler's are zeros; for block
    tables every row of the step got an entry in each head.

    Attributes:
        read_shapes: what the host waited for, in order.
    """

    read_shapes: list[list[tuple[int, ...]]] = []
    tables: block_tables.BlockTables

    def __init__(self, tensors):
        assert all(x.is_cuda for x in tensors)
        self._arrays = [
            np.zeros(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in tensors
        ]

    def read(self):
        MadeUpCopy.read_shapes.append([x.shape for x in self._arrays])
        return self._arrays


class MadeUpCounts(MadeUpCopy):
    """`MadeUpCopy` for block tables: what a step's rows have once its tokens are appended."""

    def __init__(self, tensors):
        super().__init__(tensors)
        state, entries_LRG = self._arrays
        counts = self.tables.counts
        entries_LRG[:] = counts.entries_KLRG[0] + counts.in_flight_R[:, None]
        state[0] = counts.pages_of(entries_LRG).sum()


@contextlib.contextmanager
def fake_gpu(monkeypatch):
    """Within it tensors "on cuda" compute nothing, and the kernels are called but not run. Gives the
    list of kernels' names as they are called."""
    called = []

    class Operators:
        def __getattr__(self, name):
            def operator(*args):
                devices = {x.device.type for x in args if isinstance(x, torch.Tensor)}
                assert devices == {"cuda"}, (name, devices)
                called.append(name)

            return operator

    def pin_memory(x):
        out = x.clone()
        out.pinned = True
        return out

    monkeypatch.setattr(cuda, "operators", Operators)
    monkeypatch.setattr(cuda_decode, "_num_workers", lambda *args: 4)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(block_tables, "AsyncCopy", MadeUpCounts)
    monkeypatch.setattr(sampler, "AsyncCopy", MadeUpCopy)
    monkeypatch.setattr(MadeUpCopy, "read_shapes", [])

    def result(name, parts=1):
        def kernel(x, *args):
            called.append(name)
            return torch.empty(*x.shape[:-1], x.shape[-1] // parts, dtype=x.dtype, device=x.device)

        return kernel

    monkeypatch.setattr(truncate, "truncate", lambda *args: called.append("truncate"))
    monkeypatch.setattr(norm, "rms_norm", result("rms_norm"))
    monkeypatch.setattr(norm, "add_rms_norm", result("add_rms_norm"))
    monkeypatch.setattr(swiglu, "swiglu", result("swiglu", 2))
    for op in (backends.DECODE, backends.PAGES, backends.PREFILL):
        monkeypatch.setattr(op, "choose", lambda *args, **options: "cuda")
    for op in (backends.NORM, backends.SWIGLU):
        monkeypatch.setattr(op, "choose", lambda *args, **options: "triton")
    with FakeTensorMode(), torch.no_grad():
        yield called


def launches(*, num_layers, ranks=1):
    """Names of the kernels of a decode step, as `fake_gpu` gives them; "sum" stands for the ranks' communication."""
    attention, sums = ["decode_append", "paged_decode_attention"], ["sum"] if ranks > 1 else []
    add = "add_rms_norm" if ranks > 1 else "rms_norm"
    layer = [add, *attention, *sums, add, "swiglu", *sums]
    return ["rms_norm", "plan", *(layer * num_layers)[1:], "rms_norm"]


def small_model(**settings):
    """Three layers of a dense Llama in bfloat16 with these DMC settings, and what it is; outside of `fake_gpu`."""
    dmc = DMCConfig(stage="finetune", target_cr=2.0, **settings)
    description = ModelDescription(
        num_layers=3, hidden_size=128, ffn_hidden_size=64, num_attention_heads=4,
        num_query_groups=2, kv_channels=64, vocab_size=VOCAB, max_position_embeddings=128,
        dtype=torch.bfloat16, dmc=dmc,
    )  # fmt: skip
    return build_model(description, dmc=dmc), description


def move_to_fake_gpu(model):
    """Within `fake_gpu`: fake tensors in place of all of the model's."""

    def fake(x):
        return torch.empty(x.shape, dtype=x.dtype, device="cuda")

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(fake(parameter), requires_grad=False)
        for name, value in vars(module).items():
            if torch.is_tensor(value):
                setattr(module, name, fake(value))


def engine_on_fake_gpu(
    model, description, *, async_scheduling=False, max_num_batched_tokens=64, **options
):
    """Within `fake_gpu`: an engine around the model, which is moved there."""
    move_to_fake_gpu(model)
    config = EngineConfig(
        max_model_len=128,
        num_pages=256,
        block_size=16,
        max_num_seqs=8,
        max_num_batched_tokens=max_num_batched_tokens,
        enforce_eager=True,
        async_scheduling=async_scheduling,
    )
    engine = LLMEngine(model, description, None, config, dtype=torch.bfloat16, eos_id=1, **options)
    MadeUpCopy.tables = engine.context.tables
    return engine
