"""An engine behind an `EngineLoop`, as `AsyncLLM` uses it: in a thread, or in a process of its own.

`python -m megatron_dmc.engine.clients FD` is that process. It ends when its socket closes: it does not outlive
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
from multiprocessing.connection import Connection
from socket import socketpair
from typing import Any, Protocol

from megatron_dmc.engine.loop import Call, Ended, EngineInfo, EngineLoop, Message
from megatron_dmc.engine.parallel.children import ending
from megatron_dmc.errors import DMCError, EngineDead
from megatron_dmc.quiet import silence_optional_packages

type Receive = Callable[[Message], None]


class EngineClient(Protocol):
    """A running engine.

    Attributes:
        info: its description.
    """

    info: EngineInfo

    def start(self, receive: Receive) -> None:
        """Begin to call `receive` with the loop's messages, in one other thread; `Ended` is the last."""
        ...

    def post(self, call: Call) -> None:
        """Queue a call, from any thread; nothing happens once the engine has ended."""
        ...

    def stop(self, timeout: float | None) -> None:
        """End the engine after its current step.

        Args:
            timeout: seconds to wait for that; None: as long as it takes.
        """
        ...


class EngineThread:
    """An engine in a thread of this process.

    Attributes:
        engine: used by that thread alone.
    """

    def __init__(self, engine: Any):
        self.engine, self.info = engine, EngineInfo.of(engine)

    def start(self, receive: Receive) -> None:
        self._loop = EngineLoop(self.engine, receive)
        self._thread = threading.Thread(target=self._loop.run, name="engine", daemon=True)
        self._thread.start()

    def post(self, call: Call) -> None:
        self._loop.post(call)

    def stop(self, timeout: float | None) -> None:
        self._loop.stop()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            self.engine.close()


class EngineProcess:
    """An engine in a child process.

    Args:
        make: called there with `arguments` to make the engine; both can be pickled.

    Raises:
        DMCError: `make` raised it.
        EngineDead: the process ended while it started.

    Attributes:
        pid: of the process.
    """

    def __init__(self, make: Callable[..., Any], *arguments: Any):
        ours, theirs = socketpair()
        with theirs:
            path = os.pathsep.join(map(os.path.abspath, sys.path))
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_dmc.engine.clients", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"PYTHONPATH": path},
            )
        self.pid = self._process.pid
        self._pipe, self._sending = Connection(ours.detach()), threading.Lock()
        self._finalizer = weakref.finalize(self, _kill, self._process)
        self._send((make, arguments))
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
        self.info: EngineInfo = answer

    def start(self, receive: Receive) -> None:
        threading.Thread(
            target=self._receive_all, args=(receive,), name="engine's outputs", daemon=True
        ).start()

    def post(self, call: Call) -> None:
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

    def _receive_all(self, receive: Receive) -> None:
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
        return f"the engine's process {self.pid} {ending(self._process.returncode)}"


def _read_info(data: bytes) -> EngineInfo | DMCError:
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
        engine = make(*arguments)
        info = pickle.dumps(EngineInfo.of(engine))
    except DMCError as error:
        pipe.send_bytes(pickle.dumps(error))
        return 2

    def send(message: Message) -> None:
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
        self._pipe, self._loop = pipe, None
        self._ready = threading.Event()
        threading.Thread(target=self._read, name="commands", daemon=True).start()

    def go_to(self, loop: EngineLoop) -> None:
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
