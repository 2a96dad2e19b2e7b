"""Incremental detokenization."""

from collections.abc import Collection, Sequence

from megatron_dmc.checkpoint.tokenizer import Tokenizer

_CONTEXT = 5
"""Prompt tokens decoded with the completion, which keeps its leading space."""
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
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._token_ids = context_of(prompt_token_ids, self._skipped)
        # the text of [window, done) is in `text`, that of [done, end) is held back
        self._window, self._done = 0, len(self._token_ids)
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
        name = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return (len(self.text), name) if name in stops else None

    def flush(self) -> None:
        """Append the text that was held back; no token follows."""
        new = self._undelivered()
        if new:
            self._deliver(new)

    def _undelivered(self) -> str:
        before = self._decode(self._token_ids[self._window : self._done])
        return self._decode(self._token_ids[self._window :])[len(before) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    def _deliver(self, new: str) -> None:
        self.text += new
        self._window, self._done = self._done, len(self._token_ids)


def find_stop(text: str, num_old: int, stops: Sequence[str]) -> tuple[int, str] | None:
    """The first stop text that ends in `text[num_old:]`: (where it begins, which), or None."""
    found = []
    for stop in stops:
        at = text.find(stop, max(0, num_old - len(stop) + 1))
        if at >= 0:
            found.append((at, stop))
    return min(found) if found else None
