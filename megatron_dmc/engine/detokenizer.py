"""Text of a growing completion."""

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """What a tokenizer must offer for text to come out."""

    bos_id: int | None
    eos_id: int | None

    def decode(self, ids: list[int]) -> str: ...


_CONTEXT = 5
"""Prompt tokens that are decoded along, so that a leading space is not lost."""
_INCOMPLETE = "\ufffd"


class IncrementalDetokenizer:
    """Adds tokens one at a time; text that may still change (an unfinished UTF-8 character) is held
    back until it is complete or `flush` is called.

    Attributes:
        text: the completion so far.
    """

    def __init__(
        self,
        tokenizer: Decoder,
        prompt_token_ids: Sequence[int],
        *,
        skip_special_tokens: bool = True,
    ):
        self._tokenizer = tokenizer
        self._special = (
            {tokenizer.bos_id, tokenizer.eos_id} - {None} if skip_special_tokens else set()
        )
        kept = [i for i in prompt_token_ids[-2 * _CONTEXT :] if i not in self._special]
        self._token_ids = kept[-_CONTEXT:]
        # text of [window, done) has been given out; [done, end) has not
        self._window, self._done = 0, len(self._token_ids)
        self.text = ""

    def add(self, token_id: int) -> None:
        """Take in a token and append what is certain by now to `text`."""
        if token_id in self._special:
            return
        self._token_ids.append(token_id)
        new = self._undelivered()
        if new and not new.endswith(_INCOMPLETE):
            self._deliver(new)

    def flush(self) -> None:
        """No more tokens: append what was held back."""
        new = self._undelivered()
        if new:
            self._deliver(new)

    def _undelivered(self) -> str:
        decode = self._tokenizer.decode
        before = decode(self._token_ids[self._window : self._done])
        return decode(self._token_ids[self._window :])[len(before) :]

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
