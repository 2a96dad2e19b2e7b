"""The HTTP/1.1 server under the application: uvicorn with uvloop, httptools and our limits on connections."""

import asyncio
import gc
import socket
from collections.abc import Coroutine
from typing import Any

import uvicorn
import uvloop

from megatron_dmc.server.connections import bounded

BACKLOG = 2048
"""Length of the listening socket's queue."""


def make_server(
    app: Any,
    *,
    client_timeout_s: float,
    max_connections: int,
    shutdown_timeout_s: int | None = None,
    log_level: str = "error",
    access_log: bool = False,
) -> uvicorn.Server:
    """A server to run with `run`, `server.serve(sockets=[...])`.

    Args:
        shutdown_timeout_s: longest time for requests in progress; None: as long as they take.
    """
    config = uvicorn.Config(
        app, log_level=log_level, lifespan="off", access_log=access_log,
        http=bounded(client_timeout_s=client_timeout_s, max_connections=max_connections),
        ws="none", backlog=min(BACKLOG, max_connections),
        timeout_graceful_shutdown=shutdown_timeout_s,
    )  # fmt: skip
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError, OverflowError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


def run[Result](main: Coroutine[Any, Any, Result]) -> Result:
    """`asyncio.run` on uvloop. The garbage collector leaves out the objects that exist now, those of the imported
    libraries."""
    gc.collect()
    gc.freeze()
    return asyncio.run(main, loop_factory=uvloop.new_event_loop)
