"""Failures that end one request, and failures that end the engine.

Work that is one request's own (its prompt and parameters, logit rules, sampling, log-probabilities,
detokenising, stop texts, outputs) runs under `own_work`: whatever it raises ends that request. A failure of
the device, or of what all requests share (pages, tables, the other ranks), passes through it and ends the
engine. Device work is done for all requests together, on numbers that were checked when they were added.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_dmc.errors import EngineDead, InvalidRequest, OutOfPages, RequestFailed

_ENDS_ENGINE = (EngineDead, OutOfPages, KeyboardInterrupt, SystemExit)


def ends_engine(error: BaseException) -> bool:
    """Whether the state that requests share is unreliable after this error. Running out of memory in one
    request's own work ends only that request."""
    torch = sys.modules.get("torch")  # the front of a server does not import it for this
    if torch is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return False
        if isinstance(error, torch.AcceleratorError | torch.distributed.DistError):
            return True
    return isinstance(error, _ENDS_ENGINE) or "CUDA error" in str(error)


def failure_of(request_id: str, error: BaseException) -> RequestFailed:
    """The end of a request whose own work raised `error`, panics of Rust libraries included.

    Raises:
        BaseException: the error itself, where it ends the engine.
    """
    if isinstance(error, RequestFailed):
        return error
    if ends_engine(error):
        raise error
    failure = RequestFailed(f"request {request_id}: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


@contextmanager
def own_work(request_id: str) -> Iterator[None]:
    """One request's own work.

    Raises:
        InvalidRequest: unchanged.
        RequestFailed: for every other exception: see `failure_of`.
        BaseException: unchanged, where it ends the engine.
    """
    try:
        yield
    except InvalidRequest:
        raise
    except BaseException as error:
        failure = failure_of(request_id, error)
        if failure is error:
            raise
        raise failure from error
