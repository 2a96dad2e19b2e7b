"""Read, parse and check request bodies: limits are checked first, large bodies are parsed in a thread."""

import asyncio

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from megatron_dmc.server.errors import ApiError, validation_error

_SMALL = 2**16
"""Largest body, in bytes, that is parsed in the event loop: a thread would cost more."""
_MAX_STRUCTURE = 2**19
"""Most brackets, braces and colons of a body, those in texts included."""
_MAX_VALUES = 3 * 2**20
"""Most commas of a body: more than in 16 MiB of token ids."""
_HELD_BODIES = 16
"""Number of bodies of the largest size that may be held unparsed at a time."""


class BodyReader:
    """Reads the JSON of requests.

    Args:
        max_body_bytes: the largest body; `Gate` enforces the limit.
    """

    def __init__(self, max_body_bytes: int):
        self._budget = _HELD_BODIES * max_body_bytes
        self._held = 0
        self._one_at_a_time = asyncio.Lock()

    async def read[Model: BaseModel](self, request: Request, model: type[Model]) -> Model:
        """The body as `model`.

        Raises:
            ApiError: 400: the body is invalid; 429: too much is being read at once.
            ClientDisconnect: the client has left.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # this also blocks forms of other sites in a browser
            raise ApiError(400, f"Content-Type: {kind or 'none'}: use application/json")
        body = bytearray()
        try:
            async for chunk in request.stream():
                self._held += len(chunk)
                body += chunk
                if self._held > self._budget:
                    raise ApiError(
                        429, "too many large bodies are being read; try again later",
                        code="server_busy",
                    )  # fmt: skip
            if len(body) <= _SMALL:
                return _parse(body, model)
            # C code that holds the GIL: several at once would hold it for a long time
            async with self._one_at_a_time:
                return await asyncio.to_thread(_parse, body, model)
        finally:
            self._held -= len(body)


def _parse[Model: BaseModel](body: bytearray, model: type[Model]) -> Model:
    if sum(map(body.count, (b"[", b"{", b":"))) > _MAX_STRUCTURE:
        raise ApiError(
            400, f"the body has more than {_MAX_STRUCTURE} brackets, braces and colons; split it"
        )
    if body.count(b",") > _MAX_VALUES:
        raise ApiError(400, f"the body has more than {_MAX_VALUES} commas; split it")
    try:
        document = from_json(body)
    except ValueError as e:
        hint = ""
        if "hex escape" in str(e) or "surrogate" in str(e):
            hint = " (half of a surrogate pair is not Unicode text; leave it out)"
        raise ApiError(400, f"the body is not JSON: {e}{hint}") from e
    if not isinstance(document, dict):
        raise ApiError(400, "the body is not a JSON object")
    try:
        return model.model_validate(document)
    except ValidationError as e:
        raise validation_error(e) from e
