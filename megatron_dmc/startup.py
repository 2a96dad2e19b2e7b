"""Shorten the start of a process."""

import contextlib
import functools
import gc
import inspect
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def compiling_at_first_call() -> Iterator[None]:
    """Within, `torch.compile` of a function returns at once, and the function is compiled when it is first called.

    For the import of Megatron: torch's compiler takes longer to import than all the rest, and neither inference nor
    training on a CPU calls what Megatron decorates with it.
    """
    import torch

    at_once = torch.compile

    def later(model: Any = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(later, **options)
        if not inspect.isfunction(model):
            return at_once(model, **options)
        compiled = functools.cache(lambda: at_once(model, **options))

        @functools.wraps(model)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():  # a part of what calls it
                return model(*args, **kwargs)
            return compiled()(*args, **kwargs)

        return call

    torch.compile = later
    try:
        yield
    finally:
        torch.compile = at_once


@contextlib.contextmanager
def without_garbage_collector() -> Iterator[None]:
    """Within, no garbage is collected; afterwards the collector leaves out the objects that exist then.

    For programs that import libraries and load a model, which stay: collecting meanwhile takes 6 % of that time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()
