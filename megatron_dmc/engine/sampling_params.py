"""How the tokens of a request are chosen, and when it ends."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron_dmc.errors import InvalidRequest

MAX_LOGPROBS = 20
"""Most log-probabilities per token that a request may ask for."""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass
class SamplingParams:
    """Names and defaults as vLLM's. Validated at construction: `InvalidRequest` names the field."""

    n: int = 1
    """Completions per prompt. Only 1: pass a prompt several times for several completions."""

    temperature: float = 1.0
    """0 is greedy."""

    top_k: int = 0
    """Only the k most likely tokens; 0 or -1 is all of them."""

    top_p: float = 1.0
    """Only the most likely tokens whose probabilities sum to this."""

    min_p: float = 0.0
    """Only tokens at least this likely, relative to the most likely one."""

    seed: int | None = None
    """Seed of this request's own generator. None: from the engine's seed and the request's number."""

    stop: list[str] = field(default_factory=list)
    """Texts that end the completion (one text or several)."""

    stop_token_ids: list[int] = field(default_factory=list)
    """Tokens that end the completion, beside the end-of-text token."""

    max_tokens: int | None = 16
    """Most tokens to generate; None: up to the context's end."""

    ignore_eos: bool = False
    """Go on after the end-of-text token."""

    logprobs: int | None = None
    """Return log-probabilities of the chosen token and of so many most likely ones."""

    prompt_logprobs: int | None = None
    """The same for every prompt token but the first."""

    prompt_logprobs_start: int = 1
    """First prompt token (by position) whose log-probability is wanted; None stands for those before."""

    include_stop_str_in_output: bool = False
    """Leave the stop text at the end of the completion."""

    skip_special_tokens: bool = True
    """Leave begin- and end-of-text tokens out of the text."""

    def __post_init__(self) -> None:
        self.stop = [self.stop] if isinstance(self.stop, str) else self._list_of("stop")
        self.stop_token_ids = self._list_of("stop_token_ids")
        self._require("n", self.n == 1, "one completion per prompt; pass the prompt several times")
        self._require("temperature", _is_real(self.temperature) and self.temperature >= 0,
                      "use 0 for greedy decoding or a positive number")  # fmt: skip
        self._require("top_k", _is_int(self.top_k) and self.top_k >= -1,
                      "use a positive number, or 0 for no limit")  # fmt: skip
        self._require("top_p", _is_real(self.top_p) and 0 < self.top_p <= 1,
                      "use a number above 0 and at most 1")  # fmt: skip
        self._require("min_p", _is_real(self.min_p) and 0 <= self.min_p <= 1, "use 0 to 1")
        self._require("seed", self.seed is None or _is_int(self.seed), "use a whole number or None")
        self._require("stop", all(isinstance(s, str) and s for s in self.stop),
                      "use non-empty texts")  # fmt: skip
        self._require("stop_token_ids", all(_is_int(i) and i >= 0 for i in self.stop_token_ids),
                      "use token ids, which are not negative")  # fmt: skip
        self._require("max_tokens",
                      self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens > 0),
                      "use a positive number, or None for up to the context's end")  # fmt: skip
        self._require("prompt_logprobs_start",
                      _is_int(self.prompt_logprobs_start) and self.prompt_logprobs_start >= 1,
                      "use a position from 1 on: nothing predicts the first token")  # fmt: skip
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            self._require(name, value is None or (_is_int(value) and 0 <= value <= MAX_LOGPROBS),
                          f"use None or 0 to {MAX_LOGPROBS}")  # fmt: skip

    @property
    def greedy(self) -> bool:
        """True where no randomness is involved; below 1e-5 the scores would overflow."""
        return self.temperature < 1e-5

    def _list_of(self, name: str) -> list:
        value = getattr(self, name)
        if value is None:
            return []
        self._require(name, isinstance(value, Iterable), "use a list")
        return list(value)

    def _require(self, name: str, holds: bool, remedy: str) -> None:
        if not holds:
            raise InvalidRequest(f"SamplingParams: {name}={getattr(self, name)!r}: {remedy}")
