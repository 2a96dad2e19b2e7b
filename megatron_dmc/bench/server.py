"""`megatron-dmc bench server`: CPU time of the server for each streamed token, with an engine without a model.

Regime: a server process and its engine's process, as `megatron-dmc serve` runs them, on a stub that gives every
request a token in each step, and this process as the client: `--streams` connections, each with one streamed
completion after the other. A step begins when the client has the tokens of the one before, so that every token is
a chunk. Metric: CPU time (user and system) of each process over the chunks; other load makes it longer, through
the caches, but much less than it makes tokens per second fewer. The server's capacity is that of its busier
process, on a core of its own. The last line printed is one JSON document.
"""

import argparse
import json
import multiprocessing
import os
import selectors
import signal
import socket
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

import psutil

from megatron_dmc import __version__
from megatron_dmc.bench.output import Result
from megatron_dmc.bench.stub_engine import Progress
from megatron_dmc.errors import DMCError

_NEEDED = 6
"""Bytes of `data: ` and of `[DONE]`."""


def run(args: argparse.Namespace) -> Result:
    """Run the benchmark.

    Raises:
        DMCError: a flag is wrong, or a package is missing.
    """
    try:
        import fastapi  # noqa: F401
        import uvloop  # noqa: F401
    except ModuleNotFoundError as e:
        raise DMCError(f"{e.name} is not installed: pip install 'megatron-dmc[serve]'") from e
    for name in ("streams", "requests", "output_len"):
        if getattr(args, name) < 1:
            raise DMCError(f"--{name.replace('_', '-')} {getattr(args, name)}: use 1 or more")
    with tempfile.NamedTemporaryFile() as file:
        file.write(bytes(8))
        file.flush()
        return _run(args, file.name)


def _run(args: argparse.Namespace, progress: str) -> Result:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(
        target=_serve, args=(theirs, args.tokenizer, args.step_ms / 1e3, progress)
    )
    server.start()
    theirs.close()
    client = _Client(Progress(progress), args.streams)
    try:
        port, engine_pid = _port(ours)
        processes = [psutil.Process(pid) for pid in (server.pid, engine_pid)]
        client.load(port, 1, min(args.output_len, 16))  # warm up
        before = [_cpu_seconds(process) for process in processes]
        chunks, seconds = client.load(port, args.requests, args.output_len)
        used = [_cpu_seconds(process) - b for process, b in zip(processes, before, strict=True)]
    finally:
        server.terminate()
        server.join()
    document = _document(args, chunks, seconds, *used)
    _print_table(document)
    return Result(document)


def _document(
    args: argparse.Namespace, chunks: int, seconds: float, front_s: float, engine_s: float
) -> dict[str, Any]:
    return {
        "benchmark": "server",
        "version": __version__,
        "arguments": sys.argv[1:],
        "note": "an engine without a model",
        "streams": args.streams,
        "step_ms": args.step_ms,
        "num_cores": os.cpu_count(),
        "tokens": args.streams * args.requests * args.output_len,
        "chunks": chunks,
        "seconds": seconds,
        "chunks_per_second": chunks / seconds,
        "front_us_per_chunk": 1e6 * front_s / chunks,
        "engine_us_per_chunk": 1e6 * engine_s / chunks,
        "chunks_per_second_of_two_cores": chunks / max(front_s, engine_s),
    }


def _print_table(document: dict[str, Any]) -> None:
    print(
        f"{document['chunks']} chunks of {document['tokens']} tokens in {document['seconds']:.1f} s: "
        f"{document['chunks_per_second']:,.0f} a second"
    )
    print(
        f"CPU time for each: HTTP front {document['front_us_per_chunk']:.1f} us, engine's process "
        f"{document['engine_us_per_chunk']:.1f} us; on a core each: "
        f"{document['chunks_per_second_of_two_cores']:,.0f} a second"
    )


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _port(pipe: Connection) -> tuple[int, int]:
    """The server's port and its engine's process."""
    try:
        answer = pipe.recv()
    except EOFError as error:
        raise DMCError("the server did not start; its own output says why") from error
    if isinstance(answer, DMCError):
        raise answer
    return answer


# The server's process.


def _serve(pipe: Connection, tokenizer: str, step_s: float, progress: str) -> None:
    from megatron_dmc.bench.stub_engine import StubEngine
    from megatron_dmc.engine import AsyncLLM, EngineProcess
    from megatron_dmc.quiet import silence_optional_packages
    from megatron_dmc.server.app import build_app
    from megatron_dmc.server.http import listen, make_server, run
    from megatron_dmc.server.limits import Concurrency
    from megatron_dmc.server.metrics import Metrics
    from megatron_dmc.server.service import Service

    silence_optional_packages()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # uvicorn handles it, and raises it again
    metrics = Metrics("stub")
    try:
        engine = EngineProcess(StubEngine, tokenizer, step_s, progress)
    except DMCError as error:
        pipe.send(error)
        return
    llm = AsyncLLM(engine, observer=metrics.observe)
    app = build_app(Service(llm, ["stub"], Concurrency(2**20)), metrics, max_body_bytes=2**20)
    server = make_server(app, client_timeout_s=60, max_connections=2**14, shutdown_timeout_s=1)
    with listen("127.0.0.1", 0) as listener:

        async def main() -> None:
            pipe.send((listener.getsockname()[1], engine.pid))
            await server.serve(sockets=[listener])

        try:
            run(main())
        finally:
            llm.shutdown(timeout=10)


# The client.


class _Stream:
    """A connection and the completions that it still asks for."""

    def __init__(self, port: int, request: bytes, count: int):
        self._request, self._left = request, count
        self.socket = socket.create_connection(("127.0.0.1", port))
        self._end = b""

    def ask(self) -> bool:
        """Send the next request; False if there is none."""
        if self._left == 0:
            return False
        self._left -= 1
        self._end = b""
        self.socket.sendall(self._request)
        return True

    def read(self) -> tuple[int, bool]:
        """(chunks that have come, whether the completion has ended)"""
        data = self.socket.recv(2**18)
        if not data:
            raise DMCError("the server closed a connection; its own output says why")
        found = self._end + data
        self._end = found[-_NEEDED + 1 :]
        ended = b"[DONE]" in found
        return found.count(b"data: ") - ended, ended


class _Client:
    """A load of streamed completions.

    Args:
        progress: counts the chunks.
    """

    def __init__(self, progress: Progress, num_streams: int):
        self._progress, self._num_streams = progress, num_streams

    def load(self, port: int, num_requests: int, num_tokens: int) -> tuple[int, float]:
        """(chunks, seconds) of `num_requests` on each of the connections, one after the other."""
        request = _request(num_tokens)
        before, began = self._progress.count, time.perf_counter()
        with selectors.DefaultSelector() as selector:
            for _ in range(self._num_streams):
                stream = _Stream(port, request, num_requests)
                stream.ask()
                selector.register(stream.socket, selectors.EVENT_READ, stream)
            while selector.get_map():
                for key, _ in selector.select():
                    count, ended = key.data.read()
                    self._progress.count += count
                    if ended and not key.data.ask():
                        selector.unregister(key.fileobj)
                        key.data.socket.close()
        return self._progress.count - before, time.perf_counter() - began


def _request(num_tokens: int) -> bytes:
    body = json.dumps(
        {"prompt": "import os\n", "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
    )
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return (head + body).encode()
