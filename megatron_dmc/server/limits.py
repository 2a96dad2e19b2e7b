"""Early rejection: missing API key, oversized body, too many concurrent requests."""

import hmac
from collections.abc import Awaitable, Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

from megatron_dmc.server.errors import ApiError

type Message = MutableMapping[str, Any]
type Receive = Callable[[], Awaitable[Message]]
type Send = Callable[[Message], Awaitable[None]]
type App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]


_DRAINED_BODIES = 16
"""A rejected body is read and dropped up to this multiple of the limit, since a client that is still
sending would miss the answer. Beyond it the connection is closed."""


DIRECT_SEND = "megatron_dmc.send"
"""Key of a scope: the server's own `send`, for the middle of a long body, which no middleware looks at."""


class _BodyTooLarge(Exception):
    """Raised when the application continues to read."""


class Gate:
    """ASGI middleware: API keys for paths below /v1, and the size of bodies.

    Args:
        api_keys: each of them grants access; empty: no key is required.
        max_body_bytes: longer bodies are rejected with 413, before or while they are read.
    """

    def __init__(self, app: App, *, api_keys: Sequence[str], max_body_bytes: int):
        self._app = app
        self._keys = [key.encode() for key in api_keys]
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[DIRECT_SEND] = send
        headers = dict(scope["headers"])
        size, ended = 0, not (self._declared_size(headers) or b"transfer-encoding" in headers)

        async def counted() -> Message:
            nonlocal size, ended
            message = await receive()
            size += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            return message

        async def limited() -> Message:
            message = await counted()
            if size > self._max_body_bytes:
                raise _BodyTooLarge
            return message

        async def answered(message: Message) -> None:
            """Finish an early answer only after the body's end."""
            last = message["type"] == "http.response.body" and not message.get("more_body", False)
            # a client that waits for "100 Continue" sends nothing
            if last and not ended and (size > 0 or b"expect" not in headers):
                await send({**message, "more_body": True})
                while not ended and size <= _DRAINED_BODIES * self._max_body_bytes:
                    await counted()
                message = {"type": "http.response.body", "body": b""}
            await send(message)

        refusal = self._key_refusal(scope["path"], headers)
        if refusal is None and self._declared_size(headers) > self._max_body_bytes:
            refusal = self._too_large()
        if refusal is None:
            try:
                await self._app(scope, limited, answered)
                return
            except _BodyTooLarge:
                refusal = self._too_large()
        await refusal.response()(scope, counted, answered)

    def _key_refusal(self, path: str, headers: dict[bytes, bytes]) -> ApiError | None:
        if not self._keys or not (path == "/v1" or path.startswith("/v1/")):
            return None
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        given = key.strip()
        # compare with every key: the time must not reveal a near match
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if scheme.lower() == b"bearer" and any(matches):
            return None
        message = "no valid API key; send 'Authorization: Bearer KEY'"
        return ApiError(401, message, code="invalid_api_key")

    @staticmethod
    def _declared_size(headers: dict[bytes, bytes]) -> int:
        declared = headers.get(b"content-length", b"0")
        return int(declared[:20]) if declared.isdigit() else 0

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is larger than {self._max_body_bytes} bytes (--max-request-bytes); shorten it",
            code="request_too_large",
        )


class Concurrency:
    """Counts completions in progress and rejects those above a limit.

    Attributes:
        limit: completions at a time; a request for n of each of m prompts is n x m.
        current: in progress now.
    """

    def __init__(self, limit: int):
        self.limit, self.current = limit, 0

    @contextmanager
    def admit(self, count: int) -> Iterator[None]:
        """Hold `count` places.

        Raises:
            ApiError: 400 if `count` exceeds the limit, 429 if too few places are free now.
        """
        if count > self.limit:
            raise ApiError(
                400,
                f"{count} completions in one request; this server takes {self.limit} at a time "
                "(--max-concurrent-requests)",
            )
        if self.current + count > self.limit:
            raise ApiError(
                429,
                f"{self.current} completions are in progress and this server takes {self.limit} "
                "(--max-concurrent-requests); try again later",
                code="server_busy",
            )
        self.current += count
        try:
            yield
        finally:
            self.current -= count
