"""Texts of single tokens, and log-probabilities in OpenAI's two forms."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from megatron_dmc.engine import Logprob

_LOWEST = -9999.0
"""In place of minus infinity, which JSON lacks."""


class TokenTexts:
    """Text of single tokens, as they continue a text: with their leading space. Special tokens have
    none.

    Args:
        tokenizer: `encode, decode`; None: every text is empty.
    """

    def __init__(self, tokenizer: Any | None):
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode("a")[-1:] if tokenizer is not None else []
        self._anchor_text = tokenizer.decode(self._anchor) if tokenizer is not None else ""
        self.of = lru_cache(maxsize=2**17)(self._of)

    def _of(self, token_id: int) -> str:
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode([*self._anchor, token_id])[len(self._anchor_text) :]


def for_completions(
    texts: TokenTexts,
    token_ids: Sequence[int],
    rows: Sequence[dict[int, Logprob] | None],
    count: int,
    offset: int,
) -> dict[str, Any]:
    """`logprobs` of a text completion.

    Args:
        rows: of each token; None for the first one of a prompt.
        count: most likely tokens to list.
        offset: where the first token's text begins.
    """
    tokens = [texts.of(token_id) for token_id in token_ids]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [
            None if row is None else _finite(row[token_id].logprob)
            for token_id, row in zip(token_ids, rows, strict=True)
        ],
        "top_logprobs": [
            None if row is None else _top(texts, row, token_id, count)
            for token_id, row in zip(token_ids, rows, strict=True)
        ],
        "text_offset": offsets,
    }


def for_chat(
    texts: TokenTexts, token_ids: Sequence[int], rows: Sequence[dict[int, Logprob]], count: int
) -> dict[str, Any]:
    """`logprobs` of a chat completion."""
    content = []
    for token_id, row in zip(token_ids, rows, strict=True):
        best = sorted(row.items(), key=lambda item: item[1].rank)
        best = [(i, p) for i, p in best if p.rank <= count]
        content.append(
            {
                **_chat_token(texts, token_id, row[token_id]),
                "top_logprobs": [_chat_token(texts, i, p) for i, p in best],
            }
        )
    return {"content": content, "refusal": None}


def _top(texts: TokenTexts, row: dict[int, Logprob], token_id: int, count: int) -> dict[str, float]:
    """The most likely tokens, and the chosen one; of tokens with equal texts the likeliest."""
    top: dict[str, float] = {}
    for i, p in sorted(row.items(), key=lambda item: item[1].rank):
        if p.rank <= count or i == token_id:
            top.setdefault(texts.of(i), _finite(p.logprob))
    return top


def _chat_token(texts: TokenTexts, token_id: int, logprob: Logprob) -> dict[str, Any]:
    text = texts.of(token_id)
    encoded = list(text.encode(errors="replace"))
    return {"token": text, "logprob": _finite(logprob.logprob), "bytes": encoded}


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)
