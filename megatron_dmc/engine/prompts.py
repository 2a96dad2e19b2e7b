"""Parse and validate prompts."""

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any

from megatron_dmc.checkpoint.tokenizer import Tokenizer
from megatron_dmc.errors import InvalidRequest


def read_prompt(
    request_id: str,
    prompt: str | Sequence[int] | dict,
    tokenizer: Tokenizer | None,
    vocab_size: int,
) -> tuple[str | None, list[int]]:
    """Text, if any, and token ids of a prompt.

    Args:
        prompt: a text, token ids, `{"prompt": text}` or `{"prompt_token_ids": [...]}` (there a `"prompt"`
            is kept for the output). A text is encoded with the tokens that the tokenizer puts around one,
            as transformers does; `"add_special_tokens": False` in the dictionary leaves them out.

    Raises:
        InvalidRequest: it cannot be read, or a token is not in the vocabulary.
    """
    text, add_special_tokens = None, True
    if isinstance(prompt, dict):
        add_special_tokens = bool(prompt.get("add_special_tokens", True))
        if "prompt_token_ids" not in prompt:
            if not isinstance(prompt.get("prompt"), str):
                raise InvalidRequest(
                    f"request {request_id}: a prompt needs 'prompt_token_ids' or 'prompt'"
                )
            prompt = prompt["prompt"]
        else:
            text, prompt = prompt.get("prompt"), prompt["prompt_token_ids"]
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InvalidRequest(
                f"request {request_id}: a text prompt needs a tokenizer; pass prompt_token_ids"
            )
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"request {request_id}: the prompt is not valid Unicode: {error.reason} at character "
                f"{error.start}"
            ) from error
        text = prompt
        token_ids = tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
        if tokenizer.bos_id is not None and not token_ids:
            token_ids = [tokenizer.bos_id]
    else:
        token_ids = _whole_numbers(request_id, prompt)
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"request {request_id}: token id {token_id}{_named(token_id, tokenizer)} is not in the "
                f"model's vocabulary of {vocab_size}; was the prompt encoded with its tokenizer?"
            )
    return text, token_ids


def read_cache_salt(request_id: str, prompt: Any) -> str | None:
    """`"cache_salt"` of a prompt that is a dict, as vLLM's.

    Raises:
        InvalidRequest: it is not a string, or empty.
    """
    salt = prompt.get("cache_salt") if isinstance(prompt, dict) else None
    if salt is not None and not (isinstance(salt, str) and salt):
        raise InvalidRequest(f"request {request_id}: cache_salt={salt!r}: use a non-empty text")
    return salt


def _whole_numbers(request_id: str, prompt: Any) -> list[int]:
    """Token ids of any integer type, numpy's and torch's included; nothing is rounded."""
    if isinstance(prompt, Iterable):
        token_ids = list(prompt)
        try:
            if not any(isinstance(i, bool) for i in token_ids):
                return [index(i) for i in token_ids]
        except TypeError:
            pass
    raise InvalidRequest(
        f"request {request_id}: a prompt of type {type(prompt).__name__} that is neither a text nor token "
        "ids; token ids are whole numbers"
    )


def _named(token_id: int, tokenizer: Tokenizer | None) -> str:
    """The name of a token that the tokenizer has, in parentheses."""
    if tokenizer is None or not 0 <= token_id < tokenizer.vocab_size:
        return ""
    return f" ({tokenizer.decode([token_id], skip_special_tokens=False)!r})"
