"""Conversion between Hugging Face folders and Megatron `torch_dist` checkpoints."""

import errno
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from megatron_dmc.checkpoint import torch_dist
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.hf_llama import LlamaFolder, empty_state, write_folder
from megatron_dmc.checkpoint.tokenizer import (
    TOKENIZER_FOLDER,
    check_vocab,
    copy_tokenizer,
    find_tokenizer,
    load_tokenizer,
)
from megatron_dmc.errors import CheckpointError

Format = Literal["hf", "megatron"]


def detect_format(path: str | Path) -> Format:
    """Which of the two formats is in a folder.

    Raises:
        CheckpointError: neither.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    if torch_dist.is_checkpoint(path):
        return "megatron"
    if (path / "config.json").is_file():
        return "hf"
    raise CheckpointError(
        f"{path}: neither a Hugging Face folder (config.json) nor a Megatron checkpoint "
        f"({torch_dist.TRACKER_FILE})"
    )


def open_checkpoint(
    path: str | Path,
) -> tuple[ModelDescription, LlamaFolder | torch_dist.TorchDistCheckpoint, Path | None]:
    """(description, source of the weights, place of the tokenizer) of a folder of either format.

    Raises:
        CheckpointError, UnsupportedConfig: missing, damaged, or not a Llama.
    """
    if detect_format(path) == "hf":
        description = ModelDescription.from_hf_folder(path)
        folder = LlamaFolder(path, description)
        description.dtype = folder.dtype
        tokenizer = find_tokenizer(path)
        return description, folder, tokenizer
    checkpoint = torch_dist.TorchDistCheckpoint(path)
    args = checkpoint.args
    tokenizer = find_tokenizer(checkpoint.root, args)
    loaded = load_tokenizer(tokenizer) if tokenizer is not None else None
    description = checkpoint.description(vocab_size=loaded.vocab_size if loaded else None)
    if loaded and description.bos_token_id is None:
        description.bos_token_id = loaded.bos_id
    if loaded and description.eos_token_id is None:
        description.eos_token_id = loaded.eos_id
    return description, checkpoint, tokenizer


def read_weights(
    source: LlamaFolder | torch_dist.TorchDistCheckpoint,
    description: ModelDescription,
    state: dict[str, Tensor],
    *,
    progress: bool = False,
) -> None:
    """Fill Megatron's tensors (names of `megatron_shapes`, on the CPU) from either format."""
    if isinstance(source, LlamaFolder):
        source.load_into(state, progress=progress)
    else:
        source.read_into(state, description)


def convert(
    from_format: Format | None,
    to_format: Format,
    path: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    progress: bool = False,
) -> ModelDescription:
    """Convert a checkpoint; weights keep their dtype and, without `dtype`, every bit.

    Args:
        from_format: None: found out.
        path: source folder (for Megatron: the newest iteration, or an iteration's folder).
        out: folder to make. It appears when all is written, or not at all.
        dtype: of the written weights.
        force: replace what is in `out`.
        progress: show progress bars on a terminal.

    Returns:
        what was written.

    Raises:
        CheckpointError: the source is missing or damaged, `out` is in the way, the disk is full.
        UnsupportedConfig: the model is not a Llama of the supported kind.
    """
    path, out = Path(path), Path(out)
    if from_format is not None and detect_format(path) != from_format:
        raise CheckpointError(f"{path}: is a {detect_format(path)} checkpoint, not {from_format}")
    inside = [out.resolve(), *out.resolve().parents]
    if path.resolve() in inside or out.resolve() in path.resolve().parents:
        raise CheckpointError(
            f"{out}: lies in the source {path}, or holds it; choose another folder"
        )
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: is a file; choose another folder")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise CheckpointError(f"{out}: is not empty; choose another folder or pass --force")

    description, source, tokenizer = open_checkpoint(path)
    if tokenizer is not None:
        check_vocab(load_tokenizer(tokenizer), description)
    if dtype is not None:
        description = replace(description, dtype=dtype)
    state = empty_state(description)
    read_weights(source, description, state, progress=progress)

    partial: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        needed = sum(t.numel() * t.element_size() for t in state.values())
        free = shutil.disk_usage(out.parent).free
        if free < needed:
            raise CheckpointError(
                f"{out.parent}: disk full: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
            )
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
        partial.chmod(0o777 & ~_umask())
        if to_format == "hf":
            write_folder(partial, state, description, progress=progress)
        else:
            torch_dist.write(partial, state, description)
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial if to_format == "hf" else partial / TOKENIZER_FOLDER)
        _put_in_place(partial, out)
    except (OSError, SafetensorError, RuntimeError) as e:
        reason = (
            "disk full; free some space or choose another folder"
            if is_disk_full(e)
            else f"cannot be written ({e})"
        )
        raise CheckpointError(f"{out}: {reason}") from e
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return description


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came of, says that the disk (or the quota) is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _put_in_place(partial: Path, out: Path) -> None:
    """Rename; what was there before goes only when the new folder is in its place."""
    if not out.exists():
        partial.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
    out.rename(old / out.name)
    try:
        partial.rename(out)
    except OSError:
        (old / out.name).rename(out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
