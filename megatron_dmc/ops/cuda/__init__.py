"""The cache ops in the CUDA extension `megatron_dmc._C`, where it is built."""

import functools
import importlib

HEAD_DIMS = (64, 96, 128, 256)
PAGE_SIZES = (8, 16, 32, 64)


def largest_group(head_dim: int) -> int:
    """Query heads of a KV head that decode attention takes."""
    return 16 if head_dim <= 128 else 8


@functools.cache
def absence() -> str:
    """Why the extension is not there; empty where it is."""
    try:
        importlib.import_module("megatron_dmc._C")
    except ImportError as error:
        if getattr(error, "name", None) == "megatron_dmc._C":
            return "the CUDA extension is not built (pip install --no-build-isolation, with nvcc)"
        return f"the CUDA extension does not load ({error})"
    return ""
