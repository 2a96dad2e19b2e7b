"""Connections: uvicorn's HTTP/1.1 protocol with client deadlines and a limit on their number."""

import asyncio
import json
import resource
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from megatron_dmc.server.errors import ApiError

_OWN_FILES = 256
"""Open files other than connections: the model's, the engine's, sockets that are being accepted."""


_MAX_HEAD_BYTES = 2**16
"""Most bytes of a request before its body; the parser has no limit."""


class BoundedProtocol(HttpToolsProtocol):
    """A connection. `bounded` sets the limits.

    A request, headers and body, must arrive within `client_timeout_s` of its first byte (the first request:
    of the connection), and the client must continue to read an answer within that time. At
    `max_connections` a new connection replaces the one that has waited longest for its client; if all are
    being answered, the new one gets 503.
    """

    client_timeout_s: float
    max_connections: int

    _request_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _waiting_since: float | None = None
    """Whether the connection waits for its client: there is no request, or an incomplete one."""
    _is_arriving = False
    """Whether a request has begun and is incomplete."""
    _head_bytes: int | None = None
    """Received of its headers, while they are incomplete."""

    def connection_made(self, transport: Any) -> None:
        """Make room for the connection, or refuse it."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            ours = [c for c in self.connections if isinstance(c, BoundedProtocol)]
            oldest = min(ours, key=lambda c: c._waiting_since or float("inf"))
            if oldest._waiting_since is None:
                self._refuse(
                    503, f"all {self.max_connections} connections are in use (--max-connections)"
                )
                return
            oldest._refuse(408, "the connection waited for its client, and others need its place")
            self.connections.discard(oldest)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._stop_request_timer()
        self.resume_writing()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """A request arrives."""
        super().on_message_begin()
        self._is_arriving, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        """The rest is its body."""
        self._head_bytes = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """It has arrived."""
        self._is_arriving = False
        super().on_message_complete()
        self.cycle.more_body = False  # even if its answer has been sent

    def data_received(self, data: bytes) -> None:
        """Receive data, and check whether a request is complete."""
        super().data_received(data)
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES:
                self._refuse(431, f"the headers are longer than {_MAX_HEAD_BYTES} bytes")
        self._watch()

    def on_response_complete(self) -> None:
        """Wait for the next request, which may have started."""
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        """The client reads more slowly than the answer is written."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self.client_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has continued to read."""
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def _watch(self) -> None:
        cycle = self.cycle
        is_answering = cycle is not None and not cycle.response_complete and not cycle.more_body
        if self.transport.is_closing() or is_answering or self.pipeline:
            self._stop_request_timer()
            self._waiting_since = None
            return
        if self._waiting_since is None:
            self._waiting_since = self.loop.time()
        if cycle is not None and not self._is_arriving:
            self._stop_request_timer()  # between requests uvicorn's own deadline applies
            if self.timeout_keep_alive_task is None:
                self.timeout_keep_alive_task = self.loop.call_later(
                    self.timeout_keep_alive, self.timeout_keep_alive_handler
                )
        elif self._request_timer is None:
            self._request_timer = self.loop.call_later(self.client_timeout_s, self._late)

    def _stop_request_timer(self) -> None:
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def _late(self) -> None:
        self._refuse(408, f"the request was not complete after {self.client_timeout_s:g} s")

    def _refuse(self, status: int, message: str) -> None:
        """Answer an incomplete request, unless its answer has started, and close."""
        self._stop_request_timer()
        self._waiting_since = None
        if self.transport.is_closing():
            return
        cycle = self.cycle
        is_open = cycle is not None and not cycle.response_complete
        has_answer = cycle is not None and (cycle.response_started if is_open else cycle.more_body)
        if not has_answer:
            body = json.dumps(ApiError(status, message).body()).encode()
            head = (
                "content-type: application/json\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(STATUS_LINE[status] + head.encode() + body)
        if is_open:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.close()


def bounded(*, client_timeout_s: float, max_connections: int) -> type[BoundedProtocol]:
    """The protocol with these limits."""
    limits = {"client_timeout_s": client_timeout_s, "max_connections": max_connections}
    return type("BoundedProtocol", (BoundedProtocol,), limits)


def connections_within_file_limit(wanted: int) -> int:
    """Raise this process's limit of open files as far as needed and allowed.

    Returns:
        the connections that fit, at most `wanted`.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * wanted + _OWN_FILES  # the same number may be accepted before the first is handled
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, (soft - _OWN_FILES) // 2))
