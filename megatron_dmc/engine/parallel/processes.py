"""Processes of tensor parallelism that the engine starts itself, where no launcher did.

The caller's process is rank 0; ranks 1 to N-1 are its children (`python -m megatron_dmc.engine.parallel.worker`).
A child ends when its standard input does: whatever becomes of the parent, none is left behind.
"""

import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import weakref
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist

from megatron_dmc.errors import EngineDead, UnsupportedConfig

_HOST = "127.0.0.1"
_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_START = timedelta(minutes=10)


class WorkerProcesses:
    """Ranks 1 to `size` - 1.

    Args:
        arguments: of `build_engine`, the same for every rank.
    """

    def __init__(self, size: int, arguments: tuple, *, device: torch.device):
        if device.type == "cuda" and torch.cuda.device_count() < size:
            raise UnsupportedConfig(
                f"tensor_parallel_size={size}: this machine has {torch.cuda.device_count()} GPUs; lower "
                "it, or start one process per GPU on several machines with torchrun"
            )
        self.size = size
        self.processes: list[subprocess.Popen] = []
        self._finalizer = weakref.finalize(self, _end, self.processes, _use_loopback())
        self.store = _local_store(size)
        paths = [os.path.abspath(path) for path in sys.path]
        for rank in range(1, size):
            message = pickle.dumps((rank, size, self.store.port, device.type, arguments))
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join(paths), "LOCAL_RANK": str(rank),
            }  # fmt: skip
            process = subprocess.Popen(
                [sys.executable, "-m", "megatron_dmc.engine.parallel.worker"],
                stdin=subprocess.PIPE, env=environment,
            )  # fmt: skip
            self.processes.append(process)
            assert process.stdin is not None
            try:
                process.stdin.write(message)
                process.stdin.flush()
            except BrokenPipeError:
                pass  # it has ended already: whoever waits for it will be told

    def wait_until_connected(self) -> None:
        """Raises:
        EngineDead: one has ended before it reached the store.
        """
        names = [f"here-{rank}" for rank in range(1, self.size)]
        while not self.store.check(names):
            died = self.died()
            if died is not None:
                self.kill()
                raise EngineDead(
                    f"tensor parallel: {died} while it started; its own output says why"
                )
            time.sleep(0.02)

    def died(self) -> str | None:
        """The first of them that has ended, and how; None while all live."""
        for rank, process in enumerate(self.processes, start=1):
            code = process.poll()
            if code is not None:
                return f"rank {rank} (process {process.pid}) {_how(code)}"
        return None

    def join(self, seconds: float = 10.0) -> None:
        """Wait for their own end, after the engine's `close`; kill what is left then."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
        self.kill()

    def kill(self) -> None:
        """End them now, stopped ones too."""
        self._finalizer()


def _local_store(size: int) -> dist.TCPStore:
    """A store that only this machine reaches; one that binds by itself listens on every interface. The
    system chooses a free port."""
    listener = socket.create_server((_HOST, 0))
    port = listener.getsockname()[1]
    return dist.TCPStore(
        _HOST, port, size, is_master=True, wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )  # fmt: skip


def join_group(rank: int, size: int, store: Any, device: torch.device) -> None:
    """Start torch.distributed over the parent's store. Every rank calls it."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=_START,
    )  # fmt: skip


def connect(rank: int, size: int, port: int) -> Any:
    """A child's end of the store."""
    store = dist.TCPStore(_HOST, port, size, is_master=False, wait_for_workers=False)
    store.set(f"here-{rank}", "1")
    return store


def _use_loopback() -> list[str]:
    """Have gloo and NCCL, which would choose the interface of the host's name, or any, listen on loopback
    only. What the user has set stands.

    Returns:
        the variables that were set, for this process and its children.
    """
    names = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address == _HOST for address in addresses)
    ]
    ours = [v for v in _INTERFACE_VARIABLES if names and v not in os.environ]
    os.environ.update(dict.fromkeys(ours, names[0] if names else ""))
    return ours


def _end(processes: list[subprocess.Popen], variables: list[str]) -> None:
    for variable in variables:
        os.environ.pop(variable, None)
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


def _how(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
