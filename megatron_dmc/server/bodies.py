"""Bodies of requests: read, parsed and checked, with bounds before work and the work in a thread."""

import asyncio

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from megatron_dmc.server.errors import ApiError, validation_error

_SMALL = 2**16
"""Bytes of a body that is parsed where it arrives: a thread would cost more."""
_MAX_STRUCTURE = 2**19
"""Brackets, braces and colons of a body, at most; in texts they count too."""
_MAX_VALUES = 3 * 2**20
"""Commas of a body, at most: more than 16 MiB of token ids have."""
_HELD_BODIES = 16
"""Bodies of the largest size that may be held at a time before they are parsed."""


class BodyReader:
    """Reads requests' JSON.

    Args:
        max_body_bytes: the largest body; the limit itself is `Gate`'s.
    """

    def __init__(self, max_body_bytes: int):
        self._budget = _HELD_BODIES * max_body_bytes
        self._held = 0
        self._one_at_a_time = asyncio.Lock()

    async def read[Model: BaseModel](self, request: Request, model: type[Model]) -> Model:
        """The body as `model`.

        Raises:
            ApiError: 400: it is wrong; 429: too much is being read at once.
            ClientDisconnect: the client has left.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # also what keeps other sites' forms in a browser out
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
            # C code that holds the interpreter: several at once would hold it for long
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
