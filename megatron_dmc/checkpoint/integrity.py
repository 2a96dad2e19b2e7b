"""Checksums stored with a checkpoint, so that a flipped bit is detected before training or serving.

The file is Megatron's own (`integrity.json`, what `--verify-integrity` writes and reads): SHA-256 of
every file of an iteration. Megatron has rank 0 read a whole checkpoint for it; here every rank reads
the files that it wrote, several at a time.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath

import torch
from tqdm import tqdm

from megatron_dmc.errors import CheckpointError

MANIFEST = "integrity.json"
ALGORITHM = "sha256"
THREADS = min(8, os.cpu_count() or 1)
"""Files that a rank reads at a time; hashing runs outside of the interpreter's lock."""
_PART = re.compile(r"__(\d+)_\d+\.distcp")
"""A file of torch's distributed checkpoints, and the rank that wrote it."""


def _rank_and_size() -> tuple[int, int]:
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _own_files(names: list[str]) -> list[str]:
    """This rank's share: what it wrote itself is likely to be in its node's memory."""
    rank, size = _rank_and_size()
    return [n for n in names if (int(m[1]) if (m := _PART.fullmatch(n)) else 0) % size == rank]


def _joined(own: dict[str, str]) -> dict[str, str]:
    """All ranks' entries, on every rank."""
    _, size = _rank_and_size()
    if size == 1:
        return own
    parts: list[dict[str, str]] = [{}] * size
    torch.distributed.all_gather_object(parts, own)
    return {name: value for part in parts for name, value in part.items()}


def _digest(file: Path) -> str:
    """In blocks, whatever its size."""
    if not file.is_file():
        raise FileNotFoundError("it is missing")
    with open(file, "rb") as f:
        return hashlib.file_digest(f, ALGORITHM).hexdigest()


def _for_each(
    names: Iterable[str], what: Callable[[str], str], *, progress: bool
) -> dict[str, str]:
    """name -> result; of this rank's share of the names, and then of all ranks'."""
    own = _own_files(sorted(names))
    with ThreadPoolExecutor(THREADS) as pool, tqdm(
        total=len(own), desc="verifying checksums", unit="file", disable=None if progress else True
    ) as bar:  # fmt: skip
        results = {}
        for name, result in zip(own, pool.map(what, own), strict=True):
            results[name] = result
            bar.update()
    return _joined(results)


def write_checksums(folder: Path) -> None:
    """Write the checksums of a finished iteration into its folder. Collective over all ranks."""
    names = [f.name for f in folder.iterdir() if f.is_file() and f.name != MANIFEST]
    digests = _for_each(names, lambda name: _digest(folder / name), progress=False)
    if _rank_and_size()[0] == 0:
        partial = folder / f"{MANIFEST}.part"
        partial.write_text(json.dumps({"algorithm": ALGORITHM, "files": digests}, indent=2))
        os.replace(partial, folder / MANIFEST)


def forget_checksums(folder: Path) -> None:
    """Delete stale checksums before an iteration is overwritten."""
    if _rank_and_size()[0] == 0:
        (folder / MANIFEST).unlink(missing_ok=True)


def verify_checksums(folder: Path, *, progress: bool = False) -> None:
    """Compare an iteration's files with their checksums. Collective over all ranks.

    Reads every file once. A checkpoint without checksums passes.

    Args:
        progress: show a progress bar on a terminal.

    Raises:
        CheckpointError: on every rank; names the files that differ or cannot be read.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return
    try:
        document = json.loads(manifest.read_text())
        algorithm, files = document["algorithm"], dict(document["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
        raise CheckpointError(f"{manifest}: damaged ({e})") from e
    if algorithm != ALGORITHM:
        raise CheckpointError(f"{manifest}: the algorithm is {algorithm!r}, not {ALGORITHM!r}")
    outside = [n for n in files if PurePath(n).is_absolute() or ".." in PurePath(n).parts]
    if outside:
        raise CheckpointError(f"{manifest}: damaged (it names {outside[0]!r}, outside of {folder})")

    def complaint(name: str) -> str:
        try:
            same = _digest(folder / name) == files[name]
        except (OSError, ValueError) as e:
            return str(e)
        return "" if same else "its bytes are not those that were saved"

    found = _for_each(files, complaint, progress=progress)
    wrong = [f"{folder / name}: {why}" for name, why in sorted(found.items()) if why]
    if wrong:
        raise CheckpointError("; ".join(wrong))
