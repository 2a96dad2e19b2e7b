"""`EngineProcess`: an engine in a process of its own. Imports neither torch nor Megatron, so that the process
starts before the front has imported them.

`python -m megatron_dmc.engine.process FD` is that process. It ends when its socket closes: it does not outlive
the front.
"""

import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from functools import cached_property
from multiprocessing.connection import Connection
from socket import socketpair
from typing import TYPE_CHECKING, Any

from megatron_dmc.errors import DMCError, EngineDead
from megatron_dmc.quiet import silence_optional_packages
from megatron_dmc.startup import without_garbage_collector

if TYPE_CHECKING:
    from megatron_dmc.engine.clients import Receive
    from megatron_dmc.engine.loop import Call, EngineInfo, EngineLoop, Message


def build_engine(*arguments: Any) -> Any:
    """`engine.build.build_engine`, which is imported where this is called."""
    from megatron_dmc.engine import build

    return build.build_engine(*arguments)


class EngineProcess:
    """An engine in a child process, which begins to load at once.

    Args:
        make: called there with `arguments` to make the engine; both can be pickled.

    Attributes:
        pid: of the process.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any):
        ours, theirs = socketpair()
        with theirs:
            path = os.pathsep.join(map(os.path.abspath, sys.path))
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_dmc.engine.process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path},
            )
        self.pid = self._process.pid
        self._pipe, self._sending = Connection(ours.detach()), threading.Lock()
        self._finalizer = weakref.finalize(self, _kill, self._process)
        self._send((make, arguments))

    @cached_property
    def info(self) -> "EngineInfo":
        """The engine's description, once it has loaded.

        Raises:
            DMCError: `make` raised it.
            EngineDead: the process ended while it started.
        """
        try:
            answer = _read_info(self._pipe.recv_bytes())
        except (EOFError, OSError):
            self._process.wait()
            raise EngineDead(
                f"{self._ending()} while it started; its own output says why"
            ) from None
        except BaseException:
            self._finalizer()
            raise
        if isinstance(answer, DMCError):
            self._process.wait()
            raise answer
        return answer

    def start(self, receive: "Receive") -> None:
        assert self.info
        threading.Thread(
            target=self._receive_all, args=(receive,), name="engine's outputs", daemon=True
        ).start()

    def post(self, call: "Call") -> None:
        self._send(call)

    def stop(self, timeout: float | None) -> None:
        self._send(None)
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._finalizer()

    def _send(self, message: Any) -> None:
        data = pickle.dumps(message)
        with self._sending:
            try:
                self._pipe.send_bytes(data)
            except OSError:
                pass  # it has ended; `_receive_all` reports it

    def _receive_all(self, receive: "Receive") -> None:
        from megatron_dmc.engine.loop import Ended

        try:
            while True:
                message = pickle.loads(self._pipe.recv_bytes())
                receive(message)
                if isinstance(message, Ended):
                    return
        except (EOFError, OSError):
            self._process.wait()
            receive(Ended(EngineDead(f"{self._ending()}; restart the server")))

    def _ending(self) -> str:
        from megatron_dmc.engine.parallel.children import ending

        return f"the engine's process {self.pid} {ending(self._process.returncode)}"


def _read_info(data: bytes) -> "EngineInfo | DMCError":
    try:
        return pickle.loads(data)
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("transformers_modules"):
            raise
        # the tokenizer's own code (trust_remote_code), where transformers has copied it
        from transformers.dynamic_module_utils import init_hf_modules

        init_hf_modules()
        return pickle.loads(data)


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()


# In the engine's process.


def main(fd: int) -> int:
    """Make the engine that the front describes and run it.

    Returns:
        exit code: 0 after the front's `stop`.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # the front gets these too, and decides
        signal.signal(number, signal.SIG_IGN)
    silence_optional_packages()
    pipe = Connection(fd)
    make, arguments = pickle.loads(pipe.recv_bytes())
    commands = _Commands(pipe)
    try:
        with without_garbage_collector():
            from megatron_dmc.engine.loop import EngineInfo, EngineLoop

            engine = make(*arguments)
        info = pickle.dumps(EngineInfo.of(engine))
    except DMCError as error:
        pipe.send_bytes(pickle.dumps(error))
        return 2

    def send(message: "Message") -> None:
        try:
            pipe.send_bytes(pickle.dumps(message))
        except OSError:
            pass  # the front has ended, and `_Commands` ends this process

    loop = EngineLoop(engine, send)
    pipe.send_bytes(info)
    commands.go_to(loop)
    if not loop.run():
        return 1
    engine.close()
    return 0


class _Commands:
    """Reads the front's calls, and ends the process when the front has ended."""

    def __init__(self, pipe: Connection):
        self._pipe = pipe
        self._loop: EngineLoop | None = None
        self._ready = threading.Event()
        threading.Thread(target=self._read, name="commands", daemon=True).start()

    def go_to(self, loop: "EngineLoop") -> None:
        """The receiver of the calls."""
        self._loop = loop
        self._ready.set()

    def _read(self) -> None:
        try:
            while True:
                data = self._pipe.recv_bytes()
                self._ready.wait()
                assert self._loop is not None
                call = pickle.loads(data)
                if call is None:
                    self._loop.stop()
                else:
                    self._loop.post(call)
        except (EOFError, OSError):
            os._exit(0)


if __name__ == "__main__":
    code = main(int(sys.argv[1]))
    logging.shutdown()
    sys.stderr.flush()
    # without torch's destructors, which would wait for ranks that are gone
    os._exit(code)
