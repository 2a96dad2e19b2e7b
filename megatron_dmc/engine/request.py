"""A generation request, its state and its output."""

import enum
import time
from dataclasses import dataclass, field

import numpy as np

from megatron_dmc.engine.sampling_params import SamplingParams


class RequestStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass
class Logprob:
    """Log-probability of one token at one position, by the model: before biases, penalties and temperature."""

    logprob: float
    rank: int
    """1 for the most likely token."""


@dataclass
class RequestMetrics:
    """Times are `time.monotonic()` seconds; cache figures are those of the request's own cache."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    first_scheduled_time: float | None = None
    num_preemptions: int = 0
    num_cached_prompt_tokens: int = 0
    """Prompt tokens found in a cached prefix when the request was first scheduled."""
    num_cached_tokens: int = 0
    """Tokens in the cache: seq_len when last computed, times layers and KV heads."""
    num_entries: int = 0
    """Entries that hold them, summed over layers and KV heads."""
    num_pages: int = 0
    """Pages that hold these."""

    @property
    def measured_cr(self) -> float | None:
        """Tokens / entries; None before anything is cached."""
        return self.num_cached_tokens / self.num_entries if self.num_entries else None


class RequestDecisions:
    """Decisions about a request's tokens, one bit for each head of each layer."""

    def __init__(self) -> None:
        self._rows: list[bytes | None] = []  # None: taken from a cached prefix

    def add(self, start: int, is_merge_LTG: np.ndarray) -> tuple[int, int]:
        """Record the decisions about tokens `start` and following, in place of earlier ones.

        Args:
            is_merge_LTG: bool.

        Returns:
            number of decisions made a second time, and of those that differ from the first.
        """
        self._rows += [None] * (start - len(self._rows))
        flat = is_merge_LTG.transpose(1, 0, 2).reshape(is_merge_LTG.shape[1], -1).copy()
        if start == 0 and len(flat):
            flat[0] = False  # a sequence's first token never merges
        rows = [row.tobytes() for row in np.packbits(flat, axis=1)]
        repeated = flipped = 0
        for old, new in zip(self._rows[start:], rows, strict=False):
            if old is not None:
                change = int.from_bytes(old, "little") ^ int.from_bytes(new, "little")
                flipped += change.bit_count()
                repeated += flat.shape[1]
        self._rows[start : start + len(rows)] = rows
        return repeated, flipped


@dataclass(eq=False)
class Request:
    """The state of a request; everything else is derived.

    Invariant: `num_computed_tokens` tokens are in the cache, or will be when the device has done what it was given.
    """

    request_id: str
    number: int
    """Running number in order of arrival."""
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    max_total_tokens: int
    """Prompt and completion together, at most."""
    metrics: RequestMetrics = field(
        default_factory=lambda: RequestMetrics(arrival_time=time.monotonic())
    )
    priority: int = 0
    """Lower goes first, with the scheduling policy "priority"."""
    cache_salt: str | None = None
    """Cached prefixes are shared with requests of the same salt only."""
    prefix_keys: list[bytes] = field(default_factory=list)
    """Keys of the full blocks of its tokens, computed on demand."""
    decisions: RequestDecisions | None = None
    """Merge decisions about its tokens, where flipped ones are counted."""
    bad_words_token_ids: list[list[int]] = field(default_factory=list)
    """Token sequences that are never generated."""
    ending_token_ids: frozenset[int] = frozenset()
    """Tokens that end the completion, as `OutputProcessor` finds them."""
    output_token_ids: list[int] = field(default_factory=list)
    num_pending_tokens: int = 0
    """Tokens of the completion that are sampled on the device and not yet in `output_token_ids`."""
    num_computed_tokens: int = 0
    status: RequestStatus = RequestStatus.WAITING
    row: int | None = None
    """The cache's row while running."""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    """Message of finish_reason "error"."""
    cumulative_logprob: float = 0.0
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] = field(default_factory=list)
    """By position; begins with None for each prompt token before the first one asked for."""

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the completion, pending ones included."""
        return len(self.output_token_ids) + self.num_pending_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens so far, computed or not, pending ones included."""
        return len(self.prompt_token_ids) + len(self.output_token_ids) + self.num_pending_tokens

    @property
    def num_known_tokens(self) -> int:
        """Tokens that the host knows."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def max_cached_tokens(self) -> int:
        """Tokens that this request can ever have in the cache: the last one never enters it."""
        return self.max_total_tokens - 1

    @property
    def is_finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def tokens_between(self, start: int, end: int) -> list[int]:
        """Token ids at positions [start, end), without pending ones."""
        num_prompt = len(self.prompt_token_ids)
        generated = slice(max(start - num_prompt, 0), max(end - num_prompt, 0))
        return self.prompt_token_ids[start:end] + self.output_token_ids[generated]


@dataclass(slots=True)
class CompletionOutput:
    """The completion so far. Tokens and log-probabilities are copied on access: most outputs of a step
    are never read."""

    index: int
    text: str
    num_tokens: int
    """`len(token_ids)`, without the copy."""
    request_token_ids: list[int] = field(repr=False)
    """The request's own list, which keeps growing."""
    cumulative_logprob: float | None
    request_logprobs: list[dict[int, Logprob]] | None = field(repr=False)
    finish_reason: str | None
    """"stop", "length", "abort", "error", or None while it continues."""
    stop_reason: str | int | None
    """The stop text or token; None for the tokenizer's end-of-text token."""

    @property
    def token_ids(self) -> list[int]:
        """The tokens so far."""
        return self.request_token_ids[: self.num_tokens]

    @property
    def logprobs(self) -> list[dict[int, Logprob]] | None:
        """Log-probabilities of each token, if requested."""
        logprobs = self.request_logprobs
        return None if logprobs is None else logprobs[: self.num_tokens]


@dataclass(slots=True)
class RequestOutput:
    """The output of a request, from a step or from `LLM.generate`."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    cr: float | None
    """Measured CR of this request: tokens / entries, over all layers and KV heads."""
    error: str | None = None
    """Message of finish_reason "error"; the completion has no text then."""
