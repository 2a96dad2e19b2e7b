"""`megatron-dmc serve`: flags, start-up and shutdown."""

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

from megatron_dmc.engine.flags import (
    add_engine_arguments,
    engine_settings,
    is_follower,
    make_llm,
    model_path,
    tokenizer_path,
)
from megatron_dmc.errors import DMCError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from megatron_dmc.server.service import Service

API_KEY_VARIABLE = "MEGATRON_DMC_API_KEY"
CLOSING_S = 5.0
"""Time after --shutdown-timeout for the last error responses and for connections to close."""
FAILURE_NOTICE_S = 2.0
"""Time after a failure of the engine in which requests and /health get 503; then the process ends."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the command, named as vLLM's where it has them."""
    add_engine_arguments(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="0.0.0.0: all interfaces")
    group.add_argument("--port", type=int, default=8000, help="0: any free one")
    group.add_argument(
        "--api-key", nargs="+", default=[], metavar="KEY",
        help=f"clients must send one of these (also: environment variable {API_KEY_VARIABLE})",
    )  # fmt: skip
    group.add_argument(
        "--served-model-name", nargs="+", metavar="NAME",
        help="names that clients use; answers carry the first (default: the path as given)",
    )  # fmt: skip
    group.add_argument(
        "--chat-template", metavar="FILE",
        help="Jinja file or text, or the name of one of the tokenizer's; default: the tokenizer's",
    )  # fmt: skip
    group.add_argument(
        "--max-concurrent-requests", type=int, default=1024,
        help="completions in progress, waiting ones included; more are refused with 429",
    )  # fmt: skip
    group.add_argument(
        "--max-request-bytes", type=int, default=16 * 2**20,
        help="longer bodies are refused with 413",
    )  # fmt: skip
    group.add_argument(
        "--max-connections", type=int, default=4096,
        help="open connections; a new one replaces the one that has waited longest for its client, "
        "or gets 503",
    )  # fmt: skip
    group.add_argument(
        "--client-timeout", type=float, default=60, metavar="SECONDS",
        help="within which a request, headers and body, must arrive (else 408), and within which a "
        "client must read on while its answer waits",
    )  # fmt: skip
    group.add_argument(
        "--shutdown-timeout", type=int, default=60, metavar="SECONDS",
        help="on SIGTERM: time for requests in progress to end; then they get 503",
    )  # fmt: skip
    group.add_argument(
        "--uvicorn-log-level", default="info",
        choices=["critical", "error", "warning", "info", "debug", "trace"],
    )  # fmt: skip
    group.add_argument("--disable-uvicorn-access-log", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT.

    Returns:
        0 after a clean end. A failure of the engine ends the process, with exit code 1.

    Raises:
        DMCError: a flag has an invalid value.
    """
    check_arguments(args)
    if is_follower(args):
        make_llm(args).follow()
        return 0
    from megatron_dmc.server.connections import connections_within_file_limit
    from megatron_dmc.server.http import make_server
    from megatron_dmc.server.http import run as run_loop

    max_connections = connections_within_file_limit(args.max_connections)
    if max_connections < args.max_connections:
        print(
            f"--max-connections {max_connections}: more do not fit into this process's limit of open "
            "files; raise it (ulimit -Hn)",
            file=sys.stderr,
        )
    listener = _listen(args.host, args.port)
    with listener:
        print(f"loading {model_path(args)}", file=sys.stderr, flush=True)
        app, service = make_app(args)
        llm, info = service.llm, service.llm.info
        server = make_server(
            app, client_timeout_s=args.client_timeout, max_connections=max_connections,
            shutdown_timeout_s=int(args.shutdown_timeout + CLOSING_S),
            log_level=args.uvicorn_log_level, access_log=not args.disable_uvicorn_access_log,
        )  # fmt: skip
        config = info.config
        assert config.num_pages is not None
        print(
            f"serving {', '.join(service.model_names)} at {_address(listener)}: {config.num_pages} pages "
            f"of {config.block_size} slots ({config.num_pages * info.page_bytes:,} bytes), at most "
            f"{config.max_num_seqs} requests of {info.max_model_len} tokens at a time",
            file=sys.stderr,
            flush=True,
        )
        # uvicorn re-raises the signals that ended it; they have been handled by then
        before = {s: signal.signal(s, _ignore) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            engine_failed = run_loop(_serve(server, listener, service, args.shutdown_timeout))
        finally:
            llm.shutdown(timeout=10)
            for number, handler in before.items():
                signal.signal(number, handler)
    if engine_failed:
        # without destructors, which would wait for ranks that are gone
        logging.shutdown()
        sys.stderr.flush()
        os._exit(1)
    return 0


def check_arguments(args: argparse.Namespace) -> None:
    """Raises:
    DMCError: a flag has an invalid value, or a package is missing.
    """
    try:
        import fastapi  # noqa: F401
        import httptools  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
        import uvloop  # noqa: F401
    except ModuleNotFoundError as e:
        raise DMCError(f"{e.name} is not installed: pip install 'megatron-dmc[serve]'") from e
    for name in ("max_concurrent_requests", "max_request_bytes", "max_connections"):
        if getattr(args, name) < 1:
            raise DMCError(f"--{name.replace('_', '-')} {getattr(args, name)}: use 1 or more")
    if not 0 < args.client_timeout < float("inf"):
        raise DMCError(f"--client-timeout {args.client_timeout}: use a positive number of seconds")
    if args.shutdown_timeout < 0:
        raise DMCError(f"--shutdown-timeout {args.shutdown_timeout}: use 0 or more seconds")
    model_path(args)


def make_app(args: argparse.Namespace) -> "tuple[FastAPI, Service]":
    """Load the model in a process of its own; the application over it, and what it serves. For servers that
    bring their own HTTP front (examples/replicas).

    Raises:
        DMCError: a flag has an invalid value.
    """
    from megatron_dmc.engine.config import EngineConfig
    from megatron_dmc.engine.process import EngineProcess, build_engine

    path = model_path(args)
    config = EngineConfig.from_settings(engine_settings(args))
    engine = EngineProcess(build_engine, path, tokenizer_path(args), config)

    from megatron_dmc.checkpoint.chat_template import load_chat_template
    from megatron_dmc.engine import AsyncLLM
    from megatron_dmc.server.app import build_app
    from megatron_dmc.server.limits import Concurrency
    from megatron_dmc.server.metrics import Metrics
    from megatron_dmc.server.service import Service

    names = args.served_model_name or [path]
    metrics = Metrics(names[0])
    llm = AsyncLLM(engine, observer=metrics.observe)
    try:
        template = load_chat_template(llm.info.tokenizer, args.chat_template)
    except BaseException:
        llm.shutdown(timeout=10)
        raise
    service = Service(llm, names, Concurrency(args.max_concurrent_requests), template)
    api_keys = [*args.api_key, *filter(None, [os.environ.get(API_KEY_VARIABLE)])]
    app = build_app(service, metrics, api_keys=api_keys, max_body_bytes=args.max_request_bytes)
    return app, service


async def _serve(
    server: Any, listener: socket.socket, service: "Service", shutdown_timeout: float
) -> bool:
    """Serve until a signal, or until the engine fails: then a supervisor restarts this process.

    Returns:
        True after a failure.
    """
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    llm, deadline = service.llm, float("inf")
    while not serving.done():
        await asyncio.wait({serving}, timeout=0.1)
        if llm.failure is not None and not server.should_exit:
            # clients and the health checks of a proxy get 503 meanwhile
            await asyncio.wait({serving}, timeout=FAILURE_NOTICE_S)
            server.should_exit = True
        if server.should_exit:
            deadline = min(deadline, time.monotonic() + shutdown_timeout)
            if time.monotonic() >= deadline:
                service.close()
    await serving
    return llm.failure is not None


def _ignore(*_: Any) -> None:
    pass


def _listen(host: str, port: int) -> socket.socket:
    """Bind before the model is loaded, so that a port in use is reported at once."""
    from megatron_dmc.server.http import listen

    try:
        return listen(host, port)
    except (OSError, OverflowError) as e:
        raise DMCError(f"--host {host} --port {port}: {e}; choose another") from e


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
