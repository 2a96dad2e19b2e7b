"""Texts of single tokens, and log-probabilities in OpenAI's two forms."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from megatron_dmc.checkpoint.tokenizer import Tokenizer
from megatron_dmc.engine import Logprob
from megatron_dmc.engine.detokenizer import context_of

_LOWEST = -9999.0
"""Replaces minus infinity, which JSON lacks."""
_INCOMPLETE = "\ufffd"


class TokenTexts:
    """Texts and bytes of single tokens, as they continue a text: with their leading space.

    Args:
        tokenizer: None: every text is empty.
    """

    def __init__(self, tokenizer: Tokenizer | None):
        self.tokenizer = tokenizer
        self.special_ids = frozenset() if tokenizer is None else tokenizer.special_ids
        self.of = lru_cache(maxsize=2**17)(lambda token_id: self.after([], token_id))
        self.bytes_of = lru_cache(maxsize=2**17)(self._bytes_of)
        self._anchor = [] if tokenizer is None else tokenizer.encode("a")[-1:]
        self._num_anchor_chars = len(self._decode(self._anchor))

    def after(self, pending: Sequence[int], token_id: int) -> str:
        """The text that `pending` and the token add together; for a special token its name."""
        return self._decode([*self._anchor, *pending, token_id])[self._num_anchor_chars :]

    def at_the_beginning(self, pending: Sequence[int], token_id: int) -> str:
        """The same without preceding text."""
        return self._decode([*pending, token_id])

    def _decode(self, token_ids: list[int]) -> str:
        if self.tokenizer is None:
            return ""
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)

    def _bytes_of(self, token_id: int) -> bytes:
        return b"" if self.tokenizer is None else self.tokenizer.token_bytes(token_id)


class TokenPieces:
    """Split a growing text by token, as the engine's detokenizer does: a character of several tokens
    belongs to the last one.

    Args:
        skip_special_tokens: special tokens have no text.
        prompt_token_ids: of a completion.
        num_chars: length of the text before the first token.
        known: the whole text of a prompt, which shows the special tokens that have text.

    Attributes:
        num_chars: length of the text so far.
    """

    def __init__(
        self,
        texts: TokenTexts,
        *,
        skip_special_tokens: bool,
        prompt_token_ids: Sequence[int] = (),
        num_chars: int = 0,
        known: str | None = None,
    ):
        self._texts, self._known = texts, known
        self._skipped = texts.special_ids if skip_special_tokens else frozenset()
        self._pending: list[int] = []
        self._begins = not context_of(prompt_token_ids, self._skipped)
        self.num_chars = num_chars

    def name(self, token_id: int) -> str:
        """The text that the token would add next; for a special token its name."""
        if token_id in self._texts.special_ids:
            return self._texts.of(token_id)
        text = self._text(token_id)
        return "" if text.endswith(_INCOMPLETE) else text

    def add(self, token_id: int) -> None:
        """Append the token."""
        if self._known is not None and token_id in self._texts.special_ids:
            name = self._texts.of(token_id)
            self.num_chars += len(name) if self._known.startswith(name, self.num_chars) else 0
            return
        if token_id in self._skipped:
            return
        text = self._text(token_id)
        if text.endswith(_INCOMPLETE):
            self._pending.append(token_id)
        else:
            self._pending, self._begins = [], False
            self.num_chars += len(text)

    def _text(self, token_id: int) -> str:
        if self._begins:
            return self._texts.at_the_beginning(self._pending, token_id)
        if self._pending:
            return self._texts.after(self._pending, token_id)
        return self._texts.of(token_id)


def for_completions(
    pieces: TokenPieces,
    token_ids: Sequence[int],
    rows: Sequence[dict[int, Logprob] | None],
    count: int,
) -> dict[str, Any]:
    """`logprobs` of a text completion.

    Args:
        pieces: state after the preceding text; advanced by the tokens.
        rows: of each token; None for the first one of a prompt.
        count: most likely tokens to list.
    """
    tokens, logprobs, top, offsets = [], [], [], []
    for token_id, row in zip(token_ids, rows, strict=True):
        tokens.append(pieces.name(token_id))
        logprobs.append(None if row is None else _finite(row[token_id].logprob))
        top.append(None if row is None else _top(pieces, row, token_id, count))
        offsets.append(pieces.num_chars)
        pieces.add(token_id)
    return {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": top,
        "text_offset": offsets,
    }


def for_chat(
    texts: TokenTexts,
    pieces: TokenPieces,
    token_ids: Sequence[int],
    rows: Sequence[dict[int, Logprob]],
    count: int,
) -> dict[str, Any]:
    """`logprobs` of a chat completion; see `for_completions`."""

    def entry(token_id: int, logprob: Logprob) -> dict[str, Any]:
        return {
            "token": pieces.name(token_id),
            "logprob": _finite(logprob.logprob),
            "bytes": list(texts.bytes_of(token_id)),
        }

    content = []
    for token_id, row in zip(token_ids, rows, strict=True):
        best = sorted(row.items(), key=lambda item: item[1].rank)
        best = [(i, p) for i, p in best if p.rank <= count]
        content.append(
            {
                **entry(token_id, row[token_id]),
                "top_logprobs": [entry(i, p) for i, p in best],
            }
        )
        pieces.add(token_id)
    return {"content": content, "refusal": None}


def _top(
    pieces: TokenPieces, row: dict[int, Logprob], token_id: int, count: int
) -> dict[str, float]:
    """The most likely tokens and the chosen one; among tokens with equal texts the likeliest."""
    top: dict[str, float] = {}
    for i, p in sorted(row.items(), key=lambda item: item[1].rank):
        if p.rank <= count or i == token_id:
            top.setdefault(pieces.name(i), _finite(p.logprob))
    return top


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
