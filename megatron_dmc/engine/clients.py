"""An engine behind an `EngineLoop`, as `AsyncLLM` uses it: in a thread, or in a process (`engine.process`)."""

import threading
from collections.abc import Callable
from typing import Any, Protocol

from megatron_dmc.engine.loop import Call, EngineInfo, EngineLoop, Message

type Receive = Callable[[Message], None]


class EngineClient(Protocol):
    """A running engine."""

    @property
    def info(self) -> EngineInfo:
        """Its description."""
        ...

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
