"""Incremental detokenization."""

from collections.abc import Collection, Sequence
from functools import partial

from megatron_dmc.checkpoint.tokenizer import Tokenizer
from megatron_dmc.engine.sampling_params import SamplingParams

_CONTEXT = 5
"""Prompt tokens decoded with the completion, which keeps its leading space."""
_WINDOW = 16
"""Tokens that are decoded at a time, at most, unless more of them make one character."""
_INCOMPLETE = "\ufffd"


def context_of(prompt_token_ids: Sequence[int], skipped: Collection[int]) -> list[int]:
    """The last prompt tokens, with which a completion is decoded; none where it begins a text."""
    kept = [i for i in prompt_token_ids[-2 * _CONTEXT :] if i not in skipped]
    return kept[-_CONTEXT:]


class IncrementalDetokenizer:
    """Adds tokens one at a time; text that may still change (an unfinished UTF-8 character) is held
    back until it is complete or `flush` is called.

    Attributes:
        text: the completion so far.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
    ):
        self._decode = partial(tokenizer.decode, skip_special_tokens=False)
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._token_ids = context_of(prompt_token_ids, self._skipped)
        # the last tokens, and the part of their text that is in `text` or precedes it
        self._before = self._decode(self._token_ids)
        self._num_done = len(self._token_ids)
        self.text = ""

    def add(self, token_id: int) -> None:
        """Add a token, and append the text that can no longer change."""
        if token_id in self._skipped:
            return
        self._token_ids.append(token_id)
        new = self._undelivered()
        if new and not new.endswith(_INCOMPLETE):
            self._deliver(new)

    def skips(self, token_id: int) -> bool:
        """Whether it is a special token that leaves no text."""
        return token_id in self._skipped

    def find_skipped_stop(self, token_id: int, stops: Sequence[str]) -> tuple[int, str] | None:
        """`find_stop` for a skipped special token, whose name may be a stop text."""
        name = self._decode([token_id])
        return (len(self.text), name) if name in stops else None

    def flush(self) -> None:
        """Append the text that was held back; no token follows."""
        new = self._undelivered()
        if new:
            self._deliver(new)

    def _undelivered(self) -> str:
        return self._decode(self._token_ids)[len(self._before) :]

    def _deliver(self, new: str) -> None:
        self.text += new
        self._before += new
        if len(self._token_ids) > _WINDOW:
            del self._token_ids[: self._num_done]
            self._before = self._decode(self._token_ids)
        self._num_done = len(self._token_ids)


class CompletionText:
    """The text of a completion, as its tokens come, up to a stop text."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams
    ):
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, prompt_token_ids, skip_special_tokens=params.skip_special_tokens
        )
        self._params = params

    def append(self, token_id: int, number: int, *, ends: bool, is_last: bool) -> str | None:
        """Add a token's text, cut off at a stop text, which is returned.

        Args:
            number: of the token in the completion, from 1 on.
            ends: the token itself ends the completion.
            is_last: no token follows this one.
        """
        detokenizer, params = self._detokenizer, self._params
        num_old = len(detokenizer.text)
        if not ends or params.include_stop_str_in_output:
            detokenizer.add(token_id)
        if ends or is_last:
            detokenizer.flush()
        if not params.stop:
            return None
        found = find_stop(detokenizer.text, num_old, params.stop)
        if found is None and detokenizer.skips(token_id):
            found = detokenizer.find_skipped_stop(token_id, params.stop)
        if found is None or number <= params.min_tokens:
            return None
        at, stop_text = found
        end = at + len(stop_text) if params.include_stop_str_in_output else at
        detokenizer.text = detokenizer.text[:end]
        return stop_text

    def visible(self, *, is_finished: bool) -> str:
        """The text so far; while tokens may follow, without what may turn out to begin a stop text."""
        text, params = self._detokenizer.text, self._params
        if is_finished or not params.stop or params.include_stop_str_in_output:
            return text
        held = max(len(stop) for stop in params.stop) - 1
        return text[: max(0, len(text) - held)]


def find_stop(text: str, num_old: int, stops: Sequence[str]) -> tuple[int, str] | None:
    """The first stop text that ends in `text[num_old:]`: (where it begins, which), or None."""
    found = []
    for stop in stops:
        at = text.find(stop, max(0, num_old - len(stop) + 1))
        if at >= 0:
            found.append((at, stop))
    return min(found) if found else None
