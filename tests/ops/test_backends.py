"""The choice of a back end: order, devices, overrides, reasons."""

import logging
from types import SimpleNamespace

import pytest
import torch

from megatron_dmc.ops import backends, cpu
from megatron_dmc.ops.backends import DECODE, MERGE, PAGES, PREFILL, Backend, Op

X = torch.zeros(2, 64)


def kernels(reason=""):
    return lambda op: SimpleNamespace(refusal=lambda x, size: reason and f"{reason}, not {size}")


def missing(op):
    raise ModuleNotFoundError("No module named 'fpga'", name="fpga")


OP = Op(
    "test",
    fpga=Backend(missing),
    gpu=Backend(kernels(), "cuda"),
    small=Backend(kernels("8 slots")),
    host=Backend(kernels(), "cpu"),
    torch=Backend(),
)


def test_the_first_that_can_run_on_this_device(caplog):
    backends._announce.cache_clear()
    with caplog.at_level(logging.INFO, logger=backends.logger.name):
        assert [OP.choose(X, 16) for _ in range(2)] == ["host", "host"]
    (record,) = caplog.records
    assert "fpga is not installed; small: 8 slots, not 16" in record.getMessage()
    assert OP.kernels("host").refusal(X, 16) == ""


def test_overrides(monkeypatch):
    monkeypatch.setenv("DMC_TEST_BACKEND", "gpu")
    assert OP.choose(X, 16) == "gpu"  # explicit: not only on its own device
    assert OP.choose(X, 16, backend="torch") == "torch"
    monkeypatch.setenv("DMC_TEST_BACKEND", "small")
    with pytest.raises(ValueError) as error:
        OP.choose(X, 16)
    assert str(error.value) == (
        "test: DMC_TEST_BACKEND='small' cannot run torch.float32 of shape (2, 64) on cpu; the back ends "
        "are fpga (fpga is not installed), gpu, small (8 slots, not 16), host, torch"
    )
    with pytest.raises(
        ValueError, match="test: backend='tpu' does not exist; the back ends are fpga"
    ):
        OP.choose(X, 16, backend="tpu")


def test_cpu_tensors_run_in_pytorch(monkeypatch):
    monkeypatch.setattr(cpu, "absence", lambda: "not built")
    cache = SimpleNamespace(is_scaled=False, page_size=16)
    assert DECODE.choose(X, 16) == PREFILL.choose(X, cache, 0) == PAGES.choose(X) == "torch"
    assert MERGE.choose(X, X, 0) == "torch"
    with pytest.raises(
        ValueError, match="decode: backend='triton' cannot run.*only tensors on a GPU"
    ):
        DECODE.choose(X, 16, backend="triton")
