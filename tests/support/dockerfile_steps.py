"""Runs what the Dockerfile runs, step by step, without Docker, a GPU or NVIDIA's image.

A virtual environment that sees the packages of this interpreter stands for the image. COPY takes what
.dockerignore leaves of the checkout; RUN runs in a shell with the image's paths mapped into a scratch folder; at
the end the ENTRYPOINT is called. Anything that this runner does not know, or that would touch other paths, is
an error.

    python tests/support/dockerfile_steps.py [FOLDER]     # with the CUDA kernels, where nvcc is: minutes
"""

import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[2]
IMAGE = re.compile(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3")
INSIDE = ("/opt/megatron-dmc", "/home/megatron-dmc")
"""Absolute paths that the image's steps may name."""


class StepFailed(Exception):
    """A step and what it said."""


class Steps:
    """A Dockerfile's steps, run in a folder.

    Args:
        folder: empty; becomes the image's root and its Python.
        dockerfile, ignored: the contents of Dockerfile and .dockerignore.
        environment: added to every step's.

    Attributes:
        environment: as ENV, ARG and the steps before have made it.
        entrypoint, command: the image's.
    """

    def __init__(self, folder: Path, dockerfile: str, ignored: str, **environment: str):
        self.root, self.context = folder / "root", ROOT
        self.cwd = self._inside("/")
        self.entrypoint: list[str] = []
        self.command: list[str] = []
        self.user = "root"
        patterns = [line for line in ignored.splitlines() if line and not line.startswith("#")]
        self.sources = set(exclude_paths(str(ROOT), patterns))
        (folder / "Dockerfile").write_text(dockerfile)
        # a file object would be read twice
        self.structure = DockerfileParser(str(folder)).structure
        self.environment = self._image(folder / "image") | environment

    def _image(self, folder: Path) -> dict[str, str]:
        """Stands for NVIDIA's: `python` and `pip` that see this interpreter's packages."""
        venv.create(folder, with_pip=False, symlinks=True)
        (place,) = (folder / "lib").glob("python*/site-packages")
        (place / "image.pth").write_text("\n".join(site.getsitepackages()) + "\n")
        pip = folder / "bin" / "pip"
        pip.write_text('#!/bin/sh\nexec python -m pip "$@"\n')
        pip.chmod(0o755)
        dropped = ("PYTHON", "PIP_", "MEGATRON_DMC", "TORCH_CUDA_ARCH_LIST")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
        kept |= {k: v for k, v in os.environ.items() if k in ("PIP_INDEX_URL", "PIP_CONFIG_FILE")}
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return kept | {
            "PATH": path, "VIRTUAL_ENV": str(folder), "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PYTHONWARNINGS": "ignore",
        }  # fmt: skip

    def _inside(self, path: str) -> Path:
        """A path of the image, in the scratch folder."""
        place = self.root / path.lstrip("/") if path.startswith("/") else self.cwd / path
        place = Path(os.path.normpath(place))
        if not place.is_relative_to(self.root):
            raise StepFailed(f"{path} is outside of the image")
        return place

    def _mapped(self, text: str) -> str:
        """A command with the image's absolute paths mapped."""
        for path in re.findall(r"""(?<![\w.}/:"'$-])/[\w./-]+""", text):
            if not path.startswith(INSIDE):
                raise StepFailed(f"this runner may not touch {path}; paths are below {INSIDE}")
        return re.sub("|".join(INSIDE), lambda m: str(self.root) + m[0], text)

    def run(self, progress=lambda line: None) -> None:
        """All steps.

        Raises:
            StepFailed: by the first that fails.
        """
        for step in self.structure:
            name, value = step["instruction"], step["value"]
            if name == "COMMENT":
                continue
            progress(f"{name} {value}")
            try:
                method = getattr(self, f"_{name.lower()}")
            except AttributeError:
                raise StepFailed(f"{name}: this runner does not know the instruction") from None
            began = time.monotonic()
            said = method(value)
            if said:
                progress(f"    {said.splitlines()[-1]}")
            progress(f"    {time.monotonic() - began:.0f} s")

    def _from(self, value: str) -> None:
        if not IMAGE.fullmatch(value):
            raise StepFailed(f"FROM {value}: not a release of NVIDIA's PyTorch image")

    def _workdir(self, value: str) -> None:
        self.cwd = self._inside(value)
        self.cwd.mkdir(parents=True, exist_ok=True)

    def _env(self, value: str) -> None:
        for word in shlex.split(value):
            name, _, content = word.partition("=")
            self.environment[name] = self._mapped(content) if content.startswith("/") else content

    def _arg(self, value: str) -> None:
        name, _, content = shlex.split(value)[0].partition("=")
        # what the image sets as a variable an ARG does not replace
        self.environment.setdefault(name, content)

    def _copy(self, value: str) -> None:
        *sources, target = value.split()
        place = self._inside(target)
        if len(sources) > 1 and not target.endswith("/"):
            raise StepFailed(f"COPY {value}: several sources need a folder, with / at the end")
        for source in sources:
            name = source.rstrip("/")
            files = [s for s in self.sources if s == name or s.startswith(f"{name}/")]
            files = [s for s in files if (self.context / s).is_file()]
            if not files:
                raise StepFailed(f"COPY {source}: not in the build context (.dockerignore?)")
            for file in files:
                into = place / Path(file).relative_to(name) if file != name else place
                if file == name and (target.endswith("/") or place.is_dir()):
                    into = place / Path(file).name
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.context / file, into)

    def _run(self, value: str) -> str:
        return self.call(["/bin/sh", "-c", self._mapped(value)], "RUN " + value)

    def _user(self, value: str) -> None:
        self.user = value

    def _entrypoint(self, value: str) -> None:
        self.entrypoint = json.loads(value)

    def _cmd(self, value: str) -> None:
        self.command = json.loads(value)

    def call(self, command: list[str], what: str, timeout: float = 1800) -> str:
        """Run a command in the image as it is now; what it printed.

        Raises:
            StepFailed: if its status is not 0.
        """
        result = subprocess.run(
            command, cwd=self.cwd, env=self.environment, text=True, timeout=timeout,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        if result.returncode:
            raise StepFailed(f"{what}\nstatus {result.returncode}: {result.stdout[-3000:]}")
        return result.stdout

    def docker_run(self, *arguments: str) -> str:
        """`docker run IMAGE arguments`."""
        return self.call([*self.entrypoint, *(arguments or self.command)], str(arguments))


def tiny_benchmark(steps: Steps) -> dict:
    """`docker run IMAGE bench throughput ...` on a CPU, its last line."""
    model = steps._inside("/opt/megatron-dmc/examples/models/stdlib-llama-3m")
    printed = steps.docker_run(
        "bench", "throughput", "--model", str(model), "--device", "cpu", "--simulate-cr", "1,4",
        "--max-num-seqs", "2", "--input-len", "24", "--output-len", "8",
    )  # fmt: skip
    return json.loads(printed.splitlines()[-1])


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else scratch).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        skip = {} if shutil.which("nvcc") else {"MEGATRON_DMC_SKIP_CUDA": "1"}
        steps = Steps(
            folder, (ROOT / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text(), **skip
        )
        steps.run(print)
        print(steps.docker_run().splitlines()[0])
        for row in tiny_benchmark(steps)["rows"]:
            print(f"CR {row['cr']:g}: measured {row['measured_cr']:.2f}")


if __name__ == "__main__":
    main()
