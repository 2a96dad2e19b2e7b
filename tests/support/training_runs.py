"""Runs of `pretrain_dmc.py` on a small model: through torchrun, as a user starts them, or forked.

`pretrain` is for what a test says of the command. `Forked` runs the same `main()` in processes forked from
one that has imported Megatron and done nothing else: the imports take longer than the steps.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import connection, forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
HEADS, KV_HEADS, DIM, LAYERS = 4, 2, 16, 2
MODEL = [
    *("--num-layers", str(LAYERS), "--hidden-size", "32", "--ffn-hidden-size", "64"),
    *("--num-attention-heads", str(HEADS), "--group-query-attention"),
    *("--num-query-groups", str(KV_HEADS), "--kv-channels", str(DIM), "--seq-length", "32"),
    *("--max-position-embeddings", "32", "--position-embedding-type", "rope"),
    *("--normalization", "RMSNorm", "--swiglu", "--disable-bias-linear"),
    *("--attention-dropout", "0", "--hidden-dropout", "0"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", "127", "--mock-data"),
    # the same padded vocabulary for one and two tensor-parallel ranks
    *("--make-vocab-size-divisible-by", "64"),
    *("--micro-batch-size", "2", "--global-batch-size", "4", "--lr", "1e-2"),
    *("--eval-iters", "1", "--eval-interval", "100", "--log-interval", "1", "--split", "98,1,1"),
]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["megatron_dmc.training.run", "megatron.core.tokenizers.text"])


def free_port() -> int:
    """A free TCP port of this machine."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def ensure_fork_server() -> None:
    """Start the process from which ranks are forked, if it does not run yet."""
    with mock.patch.dict(os.environ, ENVIRONMENT | {"PYTHONPATH": str(ROOT)}):
        forkserver.ensure_running()


def pretrain(
    *flags: str, processes: int = 1, program=("pretrain_dmc.py",), packages: str = ""
) -> subprocess.CompletedProcess[str]:
    """Through torchrun; `packages` is a folder of Python packages that come before those installed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc-per-node={processes}", *program, *MODEL, *flags]  # fmt: skip
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": f"{packages}:{ROOT}"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False
    )


class Forked:
    """A run whose ranks are forked; `model` stands before the flags."""

    def __init__(self, *flags: str, processes: int = 1, model=MODEL):
        self._folder = tempfile.TemporaryDirectory()
        self.stdout, self.stderr = (Path(self._folder.name, n) for n in ("stdout", "stderr"))
        ensure_fork_server()
        port = free_port()
        self.ranks = [
            _context.Process(
                target=_run_rank,
                args=(rank, processes, port, [*model, *flags], self.stdout, self.stderr),
            )
            for rank in range(processes)
        ]
        for rank in self.ranks:
            rank.start()

    def wait(self, timeout: float = 500) -> subprocess.CompletedProcess[str]:
        """The result that torchrun would give; like it, end the other ranks when one has failed."""
        end, code = time.monotonic() + timeout, 0
        while not code and (alive := [rank for rank in self.ranks if rank.is_alive()]):
            if not connection.wait([rank.sentinel for rank in alive], end - time.monotonic()):
                self.kill()
                raise TimeoutError(f"no end within {timeout} s: {self.stderr.read_text()[-3000:]}")
            code = next((rank.exitcode for rank in self.ranks if rank.exitcode), 0)
        self.kill()
        return subprocess.CompletedProcess(
            [], code, self.stdout.read_text(), self.stderr.read_text()
        )

    def kill(self) -> None:
        """SIGKILL to every rank."""
        for rank in self.ranks:
            rank.kill()
            rank.join()


def _run_rank(rank, processes, port, argv, stdout, stderr) -> None:
    """In a forked process: all ranks write to the same two files, as they do under torchrun."""
    for number, file in ((1, stdout), (2, stderr)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)
    multiprocessing.set_start_method("fork", force=True)  # the default, and not the server's
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    sys.argv[0] = "pretrain_dmc.py"
    from megatron_dmc.training.run import main

    main(argv)


def logged(output: str, name: str) -> list[float]:
    """A figure of Megatron's log, step after step."""
    lines = [line for line in output.splitlines() if " iteration " in line and "consumed" in line]
    return [float(line.split(f"{name}: ")[1].split(" |")[0]) for line in lines]


def tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    """Scalars of the event files in a folder: tag, step, value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
