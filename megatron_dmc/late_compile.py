"""Import Megatron without torch's compiler: that takes longer to import than all the rest, and inference does not call
what Megatron decorates with it."""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def compiling_at_first_call() -> Iterator[None]:
    """Within, `torch.compile` of a function returns at once, and the function is compiled when it is first called."""
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
            return compiled()(*args, **kwargs)

        return call

    torch.compile = later
    try:
        yield
    finally:
        torch.compile = at_once
