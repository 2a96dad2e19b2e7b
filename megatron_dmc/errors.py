"""Errors that users meet. Each message names the thing, its value and the remedy."""

from collections.abc import Sequence
from typing import Any


class DMCError(Exception):
    """Base class of this package's errors."""


class UnsupportedConfig(DMCError, ValueError):
    """A setting that DMC cannot be combined with; the message says what and why."""


class InvalidRequest(DMCError, ValueError):
    """A generation request that can never run (prompt over the context, bad sampling parameter)."""


class RequestFailed(DMCError, RuntimeError):
    """A request that was ended by an exception in its own work; the engine and other requests continue.

    Attributes:
        outputs: `LLM.generate`'s: those of all prompts, of failed ones up to the failure.
    """

    def __init__(self, message: str, outputs: Sequence[Any] = ()):
        super().__init__(message)
        self.outputs = list(outputs)


class OutOfPages(DMCError, RuntimeError):
    """The page pool cannot serve an allocation. Nothing has been allocated when it is raised."""


class EngineDead(DMCError, RuntimeError):
    """The engine has failed, was shut down or lost a process that it needs; restart it."""


class CheckpointError(DMCError, ValueError):
    """A checkpoint or tokenizer that is missing, truncated, or does not fit the model."""
