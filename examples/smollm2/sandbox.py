"""Runs a program that no one has reviewed, in a process with limits.

It has an empty folder of its own, no environment, little memory, few seconds, no large files and, unless it runs
as root, no further processes. Where the system lets it make namespaces (`unshare`) it has no network either, and
none of its processes outlives it. It is no jail: files that this user may read can be read.
"""

import functools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile

SECONDS = 10
MEMORY_BYTES = 1 << 30
FILE_BYTES = 1 << 20

_LIMITED = """
import resource, sys
for name, most in ((resource.RLIMIT_AS, {memory}), (resource.RLIMIT_CPU, {seconds}),
                   (resource.RLIMIT_FSIZE, {file}), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NPROC, {processes})):
    resource.setrlimit(name, (most, most))
program = sys.stdin.read()
sys.stdin.close()
exec(compile(program, "program", "exec"), {{"__name__": "__main__"}})
"""


@functools.cache
def _namespaces() -> tuple[str, ...]:
    """The command before the program's, where the system allows it."""
    if (unshare := shutil.which("unshare")) is None:
        return ()
    command = (unshare, "--user", "--net", "--ipc", "--pid", "--fork", "--kill-child")
    works = (
        subprocess.run([*command, sys.executable, "-c", ""], capture_output=True).returncode == 0
    )
    return command if works else ()


def passes(program: str, *, seconds: float = SECONDS) -> bool:
    """Whether a program runs to its end without an exception.

    A word that the program cannot know is printed after its last line, so leaving early is no success.
    """
    word = secrets.token_hex(16)
    runner = _LIMITED.format(
        memory=MEMORY_BYTES, seconds=int(seconds) + 1, file=FILE_BYTES, processes=0
    )
    program = f"{program}\n\nimport sys as _sys\n_sys.__stdout__.write('\\n{word}')\n"
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [*_namespaces(), sys.executable, "-I", "-S", "-c", runner],
            stdin=subprocess.PIPE, stdout=output, stderr=subprocess.DEVNULL, cwd=folder,
            env={},
            start_new_session=True,
        )  # fmt: skip
        try:
            process.communicate(program.encode(), timeout=seconds)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            pass
        finally:
            _end(process)
        output.seek(0)
        return process.returncode == 0 and output.read().decode(errors="replace").endswith(word)


def _end(process: subprocess.Popen) -> None:
    """The whole session of the process, which may have started others."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
