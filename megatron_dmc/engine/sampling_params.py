"""Sampling parameters of a request."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron_dmc.errors import InvalidRequest

MAX_LOGPROBS = 20
"""Most log-probabilities per token that a request may ask for."""
MAX_TEMPERATURE = 1e6
"""All tokens are equally likely long before."""
_MAX_INT = 2**31 - 1


def _is_int(value: Any, least: int, most: int) -> bool:
    """Whether it is a whole number within the bounds; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_real(value: Any, least: float, most: float) -> bool:
    """Whether it is a number within the bounds, which NaN and infinity never are."""
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _are_token_ids(values: Iterable[Any]) -> bool:
    """Whether they may be some model's; the engine compares them with its own vocabulary."""
    return all(_is_int(i, 0, _MAX_INT) for i in values)


@dataclass
class SamplingParams:
    """Names and defaults as vLLM's. Validated at construction: `InvalidRequest` names the field.

    Within the bounds every number is exact enough in float32.
    """

    n: int = 1
    """Completions per prompt. Only 1: pass a prompt several times for several completions."""

    temperature: float = 1.0
    """0 to 1e6. 0, and all below 1e-5, is greedy."""

    top_k: int = 0
    """Only the k most likely tokens; 0 or -1 is all of them. Below 2^31."""

    top_p: float = 1.0
    """Only the most likely tokens whose probabilities sum to this; above 0, at most 1."""

    min_p: float = 0.0
    """Only tokens at least this likely, relative to the most likely one; 0 to 1."""

    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the completion has; -2 to 2."""

    frequency_penalty: float = 0.0
    """Subtracted for every time that the completion has the token; -2 to 2."""

    repetition_penalty: float = 1.0
    """Above 1: tokens that prompt or completion have get less likely; below 1: more.
    0.01 to 100."""

    logit_bias: dict[int, float] | None = None
    """Added to the logits of these tokens; -100 to 100."""

    allowed_token_ids: list[int] | None = None
    """Only these tokens are generated; None: all."""

    bad_words: list[str] = field(default_factory=list)
    """Texts that are not generated, as far as their tokens are those of the text encoded by itself (with and
    without a space before it)."""

    min_tokens: int = 0
    """No end-of-text token, stop token or stop text before this number of tokens; at most `max_tokens`."""

    seed: int | None = None
    """Seed of this request's random numbers, -2^63 to 2^64 - 1. None: from the engine's seed and the
    request's number."""

    stop: list[str] = field(default_factory=list)
    """Texts that end the completion (one text or several)."""

    stop_token_ids: list[int] = field(default_factory=list)
    """Tokens that end the completion, in addition to the end-of-text token."""

    max_tokens: int | None = 16
    """Most tokens to generate, at least 1; None: up to the context's end."""

    ignore_eos: bool = False
    """Continue after the end-of-text token."""

    logprobs: int | None = None
    """Return log-probabilities of the chosen token and of this number of most likely ones, 0 to 20."""

    prompt_logprobs: int | None = None
    """The same for every prompt token but the first."""

    prompt_logprobs_start: int = 1
    """First prompt token (by position) whose log-probability is wanted; None stands for those before."""

    include_stop_str_in_output: bool = False
    """Leave the stop text at the end of the completion."""

    skip_special_tokens: bool = True
    """Leave special tokens out of the text. The name of one in `stop` ends the completion all the same."""

    detokenize: bool = True
    """Make the text. Without one there is no `stop`."""

    def __post_init__(self) -> None:
        self.stop = [self.stop] if isinstance(self.stop, str) else self._list_of("stop")
        self.stop_token_ids = self._list_of("stop_token_ids")
        self.bad_words = self._list_of("bad_words")
        self._require("n", _is_int(self.n, 1, 1),
                      "one completion per prompt; pass the prompt several times")  # fmt: skip
        self._require("temperature", _is_real(self.temperature, 0, MAX_TEMPERATURE),
                      f"use 0 for greedy decoding or a number up to {MAX_TEMPERATURE:g}")  # fmt: skip
        self._require("top_k", _is_int(self.top_k, -1, _MAX_INT),
                      f"use 1 to {_MAX_INT}, or 0 for no limit")  # fmt: skip
        self._require("top_p", _is_real(self.top_p, 0, 1) and self.top_p > 0,
                      "use a number above 0 and at most 1")  # fmt: skip
        self._require("min_p", _is_real(self.min_p, 0, 1), "use 0 to 1")
        self._require("seed", self.seed is None or _is_int(self.seed, -(2**63), 2**64 - 1),
                      "use a whole number of 64 bits, or None")  # fmt: skip
        self._require("stop", all(isinstance(s, str) and s for s in self.stop),
                      "use non-empty texts")  # fmt: skip
        self._require("stop_token_ids", _are_token_ids(self.stop_token_ids),
                      "use token ids, which are not negative")  # fmt: skip
        self._require("max_tokens", self.max_tokens is None or _is_int(self.max_tokens, 1, _MAX_INT),
                      f"use 1 to {_MAX_INT}, or None for up to the context's end")  # fmt: skip
        self._require("prompt_logprobs_start", _is_int(self.prompt_logprobs_start, 1, _MAX_INT),
                      "use a position from 1 on: nothing predicts the first token")  # fmt: skip
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            self._require(name, value is None or _is_int(value, 0, MAX_LOGPROBS),
                          f"use None or 0 to {MAX_LOGPROBS}")  # fmt: skip
        for name in (
            "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize",
        ):  # fmt: skip
            self._require(name, isinstance(getattr(self, name), bool), "use True or False")
        self._require("stop", self.detokenize or not self.stop,
                      "texts are found with detokenize=True only; use stop_token_ids")  # fmt: skip
        self._check_logit_rules()

    def _check_logit_rules(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            self._require(name, _is_real(getattr(self, name), -2, 2), "use -2 to 2")
        self._require("repetition_penalty", _is_real(self.repetition_penalty, 0.01, 100),
                      "use 0.01 to 100; 1 is none")  # fmt: skip
        bias = self.logit_bias
        self._require("logit_bias", bias is None or (
            isinstance(bias, dict) and _are_token_ids(bias)
            and all(_is_real(value, -100, 100) for value in bias.values())
        ), "use {token id: -100 to 100}")  # fmt: skip
        self.logit_bias = None if bias is None else dict(bias)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = self._list_of("allowed_token_ids")
            self._require("allowed_token_ids",
                          bool(self.allowed_token_ids) and _are_token_ids(self.allowed_token_ids),
                          "use token ids, one at least")  # fmt: skip
        self._require("bad_words", all(isinstance(s, str) and s.strip() for s in self.bad_words),
                      "use texts that are not blank")  # fmt: skip
        most = _MAX_INT if self.max_tokens is None else self.max_tokens
        self._require("min_tokens", _is_int(self.min_tokens, 0, most),
                      f"use 0 to max_tokens={self.max_tokens}")  # fmt: skip

    @property
    def has_penalties(self) -> bool:
        """Whether the tokens so far change the logits."""
        return (self.presence_penalty, self.frequency_penalty, self.repetition_penalty) != (0, 0, 1)

    @property
    def has_logit_rules(self) -> bool:
        """Whether the logits are changed before temperature and truncation."""
        return bool(
            self.has_penalties or self.logit_bias or self.allowed_token_ids is not None
            or self.bad_words or self.min_tokens
        )  # fmt: skip

    @property
    def greedy(self) -> bool:
        """True where no randomness is involved; below 1e-5 the scores would overflow."""
        return self.temperature < 1e-5

    def _list_of(self, name: str) -> list:
        value = getattr(self, name)
        if value is None:
            return []
        self._require(
            name, isinstance(value, Iterable) and not isinstance(value, str), "use a list"
        )
        return list(value)

    def _require(self, name: str, holds: bool, remedy: str) -> None:
        if not holds:
            raise InvalidRequest(f"SamplingParams: {name}={_shown(getattr(self, name))}: {remedy}")


def _shown(value: Any) -> str:
    """A value in an error message: Python does not print integers of more than 4,300 digits."""
    try:
        text = repr(value)
    except ValueError:
        return f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."
