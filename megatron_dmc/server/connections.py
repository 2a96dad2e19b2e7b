"""Connections: uvicorn's HTTP/1.1 protocol with client deadlines and a limit on their number."""

import asyncio
import json
import resource
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from megatron_dmc.server.errors import ApiError

_OWN_FILES = 256
"""Open files other than connections: the model's, the engine's, sockets that are being accepted."""


class BoundedProtocol(H11Protocol):
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

    def data_received(self, data: bytes) -> None:
        """Receive data, and check whether a request is complete."""
        super().data_received(data)
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
        state = self.conn.their_state
        if self.transport.is_closing() or state not in (h11.IDLE, h11.SEND_BODY):
            self._stop_request_timer()
            self._waiting_since = None
            return
        if self._waiting_since is None:
            self._waiting_since = self.loop.time()
        if state is h11.IDLE and self.cycle is not None and not self.conn.trailing_data[0]:
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
        answering = self.cycle is not None and not self.cycle.response_complete
        if not (answering and self.cycle.response_started) and self.conn.our_state in (
            h11.IDLE,
            h11.SEND_RESPONSE,
        ):
            body = json.dumps(ApiError(status, message).body()).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            for event in (
                h11.Response(status_code=status, headers=headers),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event))
        if answering:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
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
