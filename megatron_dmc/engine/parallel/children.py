"""Spawn tensor-parallel ranks 1 to N-1 as children of rank 0 (`parallel.child`), where no launcher started them."""

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

HOST = "127.0.0.1"
_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_START = timedelta(minutes=10)


class ChildRanks:
    """Ranks 1 to `size` - 1.

    Args:
        arguments: of `build_engine`, the same for every rank.

    Attributes:
        processes: in order of rank.
    """

    def __init__(self, size: int, arguments: tuple, *, device: torch.device):
        if device.type == "cuda" and torch.cuda.device_count() < size:
            raise UnsupportedConfig(
                f"tensor_parallel_size={size}: this machine has {torch.cuda.device_count()} GPUs; lower "
                "it, or start one process per GPU on several machines with torchrun"
            )
        self._size = size
        self.processes: list[subprocess.Popen] = []
        self._finalizer = weakref.finalize(self, _kill, self.processes, _use_loopback())
        self._store = _local_store(size)
        path = os.pathsep.join(map(os.path.abspath, sys.path))
        for rank in range(1, size):
            process = subprocess.Popen(
                [sys.executable, "-m", "megatron_dmc.engine.parallel.child"],
                stdin=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path, "LOCAL_RANK": str(rank)},
            )
            self.processes.append(process)
            assert process.stdin is not None
            try:
                message = (rank, size, self._store.port, device.type, arguments)
                process.stdin.write(pickle.dumps(message))
                process.stdin.flush()
            except BrokenPipeError:
                pass  # it has ended already; `exited` reports it

    def join_group(self, device: torch.device) -> None:
        """Wait for the children and form the process group with them.

        Raises:
            EngineDead: a child ended before it reached the store.
        """
        names = [f"here-{rank}" for rank in range(1, self._size)]
        while not self._store.check(names):
            exited = self.exited()
            if exited is not None:
                self.kill()
                raise EngineDead(
                    f"tensor parallel: {exited} while it started; its own output says why"
                )
            time.sleep(0.02)
        join_group(0, self._size, self._store, device)

    def exited(self) -> str | None:
        """The first child that has ended, in words; None while all run."""
        for rank, process in enumerate(self.processes, start=1):
            code = process.poll()
            if code is not None:
                return f"rank {rank} (process {process.pid}) {ending(code)}"
        return None

    def join(self, seconds: float = 10.0) -> None:
        """Wait for the children to end by themselves; kill those that do not in time."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
        self.kill()

    def kill(self) -> None:
        """Kill the children, stopped ones too."""
        self._finalizer()


def _kill(processes: list[subprocess.Popen], variables: list[str]) -> None:
    for variable in variables:
        os.environ.pop(variable, None)
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()
        if process.stdin is not None:
            process.stdin.close()


def ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"


def _use_loopback() -> list[str]:
    """Bind gloo and NCCL to the loopback interface, unless the user has chosen one. By default they use the
    interface of the host's name.

    Returns:
        the environment variables that were set, for this process and its children.
    """
    interfaces = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(address.address == HOST for address in addresses)
    ]
    unset = [v for v in _INTERFACE_VARIABLES if interfaces and v not in os.environ]
    os.environ.update(dict.fromkeys(unset, interfaces[0] if interfaces else ""))
    return unset


def _local_store(size: int) -> dist.TCPStore:
    """A store on the loopback interface and a free port; TCPStore itself would bind every interface."""
    listener = socket.create_server((HOST, 0))
    return dist.TCPStore(
        HOST, listener.getsockname()[1], size, is_master=True, wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )  # fmt: skip


def join_group(rank: int, size: int, store: Any, device: torch.device) -> None:
    """Form the process group of all ranks, on the store of rank 0."""
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store), rank=rank, world_size=size, timeout=_START,
    )  # fmt: skip
