"""Conversion between Hugging Face folders and Megatron checkpoints, one tensor at a time."""

import errno
import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_dmc.checkpoint import legacy_torch, torch_dist, torch_dist_write
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.field_checks import shown
from megatron_dmc.checkpoint.generation_config import (
    copy_generation_config,
    find_generation_config,
)
from megatron_dmc.checkpoint.gguf import GGUFFile, find_gguf
from megatron_dmc.checkpoint.hf_config import from_hf_folder
from megatron_dmc.checkpoint.hf_folder import HFFolder, write_folder
from megatron_dmc.checkpoint.hub import local_path
from megatron_dmc.checkpoint.integrity import verify_checksums
from megatron_dmc.checkpoint.legacy_torch import LegacyCheckpoint
from megatron_dmc.checkpoint.megatron_args import megatron_flags
from megatron_dmc.checkpoint.model_card import training_facts
from megatron_dmc.checkpoint.remote_code import write_remote_code
from megatron_dmc.checkpoint.tokenizer import (
    TOKENIZER_FOLDER,
    check_vocab,
    copy_tokenizer,
    find_tokenizer,
    load_tokenizer,
    megatron_tokenizer,
)
from megatron_dmc.checkpoint.weights import WeightSource, weight_bytes
from megatron_dmc.errors import CheckpointError

Format = Literal["hf", "megatron"]
StoredFormat = Literal["hf", "megatron", "gguf"]
SourceFormat = Literal["hf", "megatron", "gguf", "dmc-release"]
FLAGS_FILE = "megatron_flags.txt"
"""In a converted Megatron checkpoint: the model's flags, as a shell reads them."""

type Transform = Callable[[ModelDescription, WeightSource], tuple[ModelDescription, WeightSource]]
"""Makes another model of a model while it is converted (`checkpoint.gqa.pool_kv_heads`)."""


def _legacy_folder(path: Path) -> Path | None:
    """The iteration's folder, where a path leads to Megatron's older `torch` format."""
    if legacy_torch.is_iteration(path):
        return path
    if not (path / torch_dist.TRACKER_FILE).is_file():
        return None
    folder = torch_dist.newest_folder(path)
    return folder if legacy_torch.is_iteration(folder) else None


def detect_format(path: str | Path) -> StoredFormat:
    """The format of a file or folder.

    Raises:
        CheckpointError: none of the known ones.
    """
    path = Path(path)
    if find_gguf(path) is not None:
        return "gguf"
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    if torch_dist.is_checkpoint(path) or legacy_torch.is_iteration(path):
        return "megatron"
    if (path / "config.json").is_file():
        return "hf"
    raise CheckpointError(
        f"{path}: neither a Hugging Face folder (config.json), nor a Megatron checkpoint "
        f"({torch_dist.TRACKER_FILE}), nor a GGUF file"
    )


def open_checkpoint(
    path: str | Path,
    *,
    released_dmc: bool = False,
    target_cr: float | None = None,
    tokenizer: str | Path | None = None,
    allow_pickle: bool = False,
    verify_checkpoint: bool = True,
    progress: bool = False,
    check: Callable[[ModelDescription], None] | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> tuple[ModelDescription, WeightSource, Path | None]:
    """(description, source of the weights, place of the tokenizer) of a checkpoint of any format.

    Args:
        path, revision: see `hub.local_path`.
        released_dmc: Megatron's `torch` format as the released DMC code saves it; also found out by
            that code's arguments in the checkpoint.
        target_cr: of a released checkpoint whose arguments do not hold it.
        tokenizer: where the checkpoint has none.
        allow_pickle: unpickle a Megatron checkpoint without a guard, which lets it run code.
        verify_checkpoint: compare the checksums next to the weights, if any, which reads every
            file once. Collective over all ranks, if there are several. False: for a look at the
            description or the tokenizer.
        progress: show a progress bar for it on a terminal.
        check: called with the description before whole files are read; may raise.
        trust_remote_code: see `load_tokenizer`.

    Raises:
        CheckpointError, UnsupportedConfig: missing, damaged, or of an unsupported architecture.
    """
    path = local_path(path, revision=revision)
    if tokenizer is not None:
        tokenizer = local_path(tokenizer, with_weights=False)
        if not tokenizer.exists():
            raise CheckpointError(f"{tokenizer}: no such tokenizer")
    stored_as = detect_format(path)
    if stored_as == "gguf":
        return _open_gguf(path, tokenizer, check)
    if stored_as == "hf":
        description = from_hf_folder(path)
        folder = HFFolder(path, description)
        description.dtype = folder.dtype
        if check is not None:
            check(description)
        if verify_checkpoint:
            verify_checksums(path, progress=progress)
        return description, folder, Path(tokenizer) if tokenizer else find_tokenizer(path)
    legacy = _legacy_folder(path)
    checkpoint: LegacyCheckpoint | torch_dist.TorchDistCheckpoint
    if legacy is not None:
        checkpoint = LegacyCheckpoint(legacy, allow_pickle=allow_pickle)
        root = path
    elif released_dmc:
        raise CheckpointError(
            f"{path}: not in the format of the released DMC checkpoints "
            f"(mp_rank_00/{legacy_torch.FILE}); use --from megatron"
        )
    else:
        checkpoint = torch_dist.TorchDistCheckpoint(path, allow_pickle=allow_pickle)
        root = checkpoint.root
    args = checkpoint.args
    if not isinstance(getattr(args, "tokenizer_model", None), str | Path | None):
        raise CheckpointError(f"{path}: the saved tokenizer_model is {shown(args.tokenizer_model)}")
    place = Path(tokenizer) if tokenizer else find_tokenizer(root, args)
    loaded = None
    if place is not None:
        loaded = load_tokenizer(place, trust_remote_code=trust_remote_code)
    description = checkpoint.description(vocab_size=loaded.vocab_size if loaded else None)
    if loaded and description.bos_token_id is None:
        description.bos_token_id = loaded.bos_id
    if loaded and description.eos_token_id is None:
        description.eos_token_id = loaded.eos_id
    source: WeightSource
    if isinstance(checkpoint, torch_dist.TorchDistCheckpoint):
        source = checkpoint.weights(description)
    else:
        if released_dmc or hasattr(args, "dmc_init_val"):
            dmc = legacy_torch.released_dmc_config(args, target_cr=target_cr)
            description = replace(description, dmc=dmc)
        checkpoint.check(description)
        source = checkpoint
    if check is not None:
        check(description)
    if verify_checkpoint:
        verify_checksums(checkpoint.folder, progress=progress)
    return description, source, place


def _open_gguf(
    path: Path, tokenizer: str | Path | None, check: Callable[[ModelDescription], None] | None
) -> tuple[ModelDescription, WeightSource, Path | None]:
    file = find_gguf(path)
    assert file is not None
    source = GGUFFile(file)
    if check is not None:
        check(source.description)
    return source.description, source, Path(tokenizer) if tokenizer else source.tokenizer_folder()


def read_weights(source: WeightSource, state: dict[str, Tensor], *, progress: bool = False) -> None:
    """Fill Megatron's tensors (names of `megatron_shapes`, on the CPU) from any format."""
    names = tqdm(state, desc="reading weights", unit="tensor", disable=None if progress else True)
    with torch.no_grad():
        for name in names:
            source.fill(name, state[name])


def convert(
    from_format: SourceFormat | None,
    to_format: Format,
    path: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype | None = None,
    force: bool = False,
    progress: bool = False,
    transform: Transform | None = None,
    target_cr: float | None = None,
    tokenizer: str | Path | None = None,
    allow_pickle: bool = False,
    verify_checkpoint: bool = True,
    trust_remote_code: bool = False,
    revision: str | None = None,
    facts: Mapping[str, str] | None = None,
) -> ModelDescription:
    """Convert a checkpoint; weights keep their dtype and, without `dtype`, every bit.

    Memory: about twice the largest tensor, however large the model.

    Args:
        from_format: None: found out.
        path, revision: source folder (for Megatron: the newest iteration, or an iteration's folder), GGUF
            file, or id of a model of the Hub (see `hub.local_path`).
        out: folder to make. It appears when all is written, or not at all.
        dtype: of the written weights.
        force: replace what is in `out`.
        progress: show progress bars on a terminal.
        transform: makes another model of it on the way.
        target_cr, tokenizer, allow_pickle, verify_checkpoint, trust_remote_code: see `open_checkpoint`.

        facts: of a DMC model's card, besides what the checkpoint says; see `model_card`.

    Returns:
        what was written.

    Raises:
        CheckpointError: the source is missing or damaged, `out` is in the way, the disk is full.
        UnsupportedConfig: the model is not of a supported family.
    """
    path, out = local_path(path, revision=revision), Path(out)
    released = from_format == "dmc-release"
    expected = "megatron" if released else from_format
    if expected is not None and detect_format(path) != expected:
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

    description, source, place = open_checkpoint(
        path, released_dmc=released, target_cr=target_cr, tokenizer=tokenizer,
        allow_pickle=allow_pickle, verify_checkpoint=verify_checkpoint, progress=progress,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    if place is not None:
        check_vocab(load_tokenizer(place, trust_remote_code=trust_remote_code), description)
    if transform is not None:
        description, source = transform(description, source)
    if dtype is not None:
        description = replace(description, dtype=dtype)

    partial: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        needed = weight_bytes(description)
        free = shutil.disk_usage(out.parent).free
        if free < needed:
            raise CheckpointError(
                f"{out.parent}: disk full: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
            )
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.parent))
        partial.chmod(0o777 & ~_umask())
        if to_format == "hf":
            write_folder(partial, source, description, progress=progress)
            write_remote_code(
                partial, description, facts={**_facts(path, allow_pickle), **(facts or {})}
            )
        else:
            torch_dist_write.write(partial, source, description, progress=progress)
        copy = Path() if to_format == "hf" else Path(TOKENIZER_FOLDER)
        if place is not None:
            copy_tokenizer(place, partial / copy)
        copy_generation_config(
            find_generation_config(path, path / TOKENIZER_FOLDER, place), partial
        )
        if to_format == "megatron":
            _write_flags(partial, description, out if place is not None else None)
        _put_in_place(partial, out)
    except (OSError, RuntimeError) as e:
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


def _facts(path: Path, allow_pickle: bool) -> dict[str, str]:
    """Training facts in a Megatron checkpoint."""
    if not torch_dist.is_checkpoint(path) or _legacy_folder(path) is not None:
        return {}
    checkpoint = torch_dist.TorchDistCheckpoint(path, allow_pickle=allow_pickle)
    return training_facts(checkpoint.args, checkpoint.iteration)


def _write_flags(folder: Path, description: ModelDescription, final: Path | None) -> None:
    """Flags for `pretrain_dmc.py`; --use-checkpoint-args alone would read neither the norm's
    epsilon nor QK-norm nor RoPE scaling from the checkpoint.

    Args:
        final: where `folder` will be, if it has a tokenizer.
    """
    lines = [shlex.join(megatron_flags(description))]
    if final is not None:
        kind, file = megatron_tokenizer(folder / TOKENIZER_FOLDER)
        place = final / file.relative_to(folder)
        lines.append(shlex.join(["--tokenizer-type", kind, "--tokenizer-model", str(place)]))
    (folder / FLAGS_FILE).write_text("\n".join(lines) + "\n")


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
