"""Megatron `torch_dist` checkpoints, read and written by one process without building a model.

A checkpoint folder holds one folder per saved iteration (`iter_0000100`, or `release` for weights
that no run of Megatron has made) and `latest_checkpointed_iteration.txt`, which names the newest.
Weights are stored whole, whatever the tensor and pipeline parallel layout that saved them: layers
stacked into one tensor (`decoder.layers.mlp.linear_fc2.weight`: [layers, ...]), norms under the
names of the Transformer Engine layer spec. The local layer spec maps its names to these.
"""

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.hf_llama import TE_NAMES, megatron_shapes
from megatron_dmc.checkpoint.integrity import verify_checksums, write_checksums
from megatron_dmc.checkpoint.single_process import ensure_single_process
from megatron_dmc.errors import CheckpointError

TRACKER_FILE = "latest_checkpointed_iteration.txt"
RELEASE = "release"
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXTRA_STATE_MODULES = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "self_attention.core_attention",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)
"""Modules of a layer for which a model may ask for a (here empty) `_extra_state`."""


def is_checkpoint(path: str | Path) -> bool:
    """True for a Megatron checkpoint folder, or for one of its iterations."""
    path = Path(path)
    return (path / TRACKER_FILE).is_file() or (path / "metadata.json").is_file()


def iteration_folder(path: str | Path) -> Path:
    """The newest iteration of a checkpoint folder; an iteration's own folder is returned as is.

    Raises:
        CheckpointError: nothing there, or not a `torch_dist` checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint folder")
    if (path / "metadata.json").is_file():
        _check_backend(path / "metadata.json")
        return path
    tracker = path / TRACKER_FILE
    try:
        newest = tracker.read_text().strip()
    except (OSError, UnicodeDecodeError) as e:
        raise CheckpointError(
            f"{tracker}: cannot be read ({e}); a Megatron checkpoint folder has it, and so does "
            "none that was only begun"
        ) from e
    if newest != RELEASE and not newest.isdigit():
        raise CheckpointError(f"{tracker}: {newest!r} is neither an iteration nor {RELEASE!r}")
    folder = path / (RELEASE if newest == RELEASE else f"iter_{int(newest):07d}")
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: is missing, and {TRACKER_FILE} names it; put another iteration into that "
            "file or pass the iteration's folder"
        )
    if not (folder / "metadata.json").is_file():
        raise CheckpointError(
            f"{folder}: has no metadata.json, so it is not a finished torch_dist checkpoint; "
            "save with --ckpt-format torch_dist"
        )
    _check_backend(folder / "metadata.json")
    return folder


def _check_backend(file: Path) -> None:
    try:
        backend = json.loads(file.read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"{file}: damaged ({e}); copy it again") from e
    if backend != "torch_dist":
        raise CheckpointError(f"{file}: the format is {backend!r}; only 'torch_dist' is read")


class StoredTensor(NamedTuple):
    """Shape and dtype of a whole tensor in a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def read_metadata(folder: Path) -> dict[str, StoredTensor]:
    """What an iteration's folder holds, after a check that its files are there in full length.

    Raises:
        CheckpointError: names the file that is missing, damaged or truncated.
    """
    file = folder / ".metadata"
    try:
        metadata = FileSystemReader(folder).read_metadata()
        ends: dict[str, int] = {}
        for info in (metadata.storage_data or {}).values():
            end = info.offset + info.length
            ends[info.relative_path] = max(end, ends.get(info.relative_path, 0))
    except Exception as e:  # pickle raises anything on a damaged file
        raise CheckpointError(f"{file}: missing or damaged ({e}); copy it again") from e
    for name, end in sorted(ends.items()):
        part = folder / name
        if not part.is_file():
            raise CheckpointError(f"{part}: is missing; copy the checkpoint again")
        if part.stat().st_size < end:
            raise CheckpointError(
                f"{part}: truncated, {part.stat().st_size} of at least {end} bytes; copy the "
                "checkpoint again"
            )
    return {
        name: StoredTensor(tuple(entry.size), entry.properties.dtype)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def read_common(folder: Path) -> dict[str, Any]:
    """What an iteration holds beside its sharded tensors: arguments, step, schedules.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return dist_checkpointing.load_common_state_dict(str(folder))
    except (Exception, CheckpointException) as e:  # the latter is a BaseException
        raise CheckpointError(
            f"{folder}: its common state (saved arguments) cannot be read ({e})"
        ) from e


def check_whole(folder: Path) -> None:
    """Check an iteration's files: format, length, metadata, and checksums where it has them.

    Collective over all ranks, if there are several.

    Raises:
        CheckpointError: names what is missing or damaged.
    """
    _check_backend(folder / "metadata.json")
    read_metadata(folder)
    read_common(folder)
    verify_checksums(folder)


def older_usable_iteration(path: str | Path) -> tuple[int, str] | None:
    """Where the newest iteration of a checkpoint folder is damaged: the one to go on from.

    Collective over all ranks, if there are several.

    Returns:
        None if the newest is whole; else the newest whole iteration before it, and what is wrong
        with the newest.

    Raises:
        CheckpointError: the newest is damaged, and no other is whole.
    """
    try:
        check_whole(iteration_folder(path))
        return None
    except CheckpointError as e:
        complaint = e
    try:
        newest = int((Path(path) / TRACKER_FILE).read_text())
    except (OSError, ValueError):
        raise complaint from None
    iterations = sorted(int(f.name[5:]) for f in Path(path).glob("iter_[0-9]*") if f.is_dir())
    for iteration in reversed([i for i in iterations if i < newest]):
        folder = Path(path) / f"iter_{iteration:07d}"
        try:
            check_whole(folder)
        except CheckpointError:
            continue
        return iteration, str(complaint)
    raise CheckpointError(f"{complaint}; and no earlier iteration in {path} is whole")


class TorchDistCheckpoint:
    """One iteration of a `torch_dist` checkpoint, opened for reading.

    Args:
        path: the checkpoint folder (its newest iteration is taken) or an iteration's folder.

    Raises:
        CheckpointError: missing, truncated or unreadable; names the file.
    """

    def __init__(self, path: str | Path):
        self.folder = iteration_folder(path)
        self.root = self.folder if self.folder == Path(path) else Path(path)
        if self.root == self.folder and (self.folder.parent / TRACKER_FILE).is_file():
            self.root = self.folder.parent
        ensure_single_process()
        self.stored = read_metadata(self.folder)
        self.common: dict[str, Any] = read_common(self.folder)

    @property
    def args(self) -> Namespace:
        """Megatron's arguments of the run that saved it."""
        args = self.common.get("args")
        if args is None:
            raise CheckpointError(
                f"{self.folder}: holds no saved arguments, so the model's sizes are unknown"
            )
        return args

    @property
    def iteration(self) -> int:
        """Training steps done."""
        return int(self.common.get("iteration", 0))

    def description(self, *, vocab_size: int | None = None) -> ModelDescription:
        """The model, from the saved arguments; dtype from the stored weights.

        Args:
            vocab_size: the tokenizer's, used where the run was given no --vocab-size.
        """
        description = ModelDescription.from_megatron_args(self.args, vocab_size=vocab_size)
        embedding = self.stored.get("embedding.word_embeddings.weight")
        if embedding is not None:
            description.dtype = embedding.dtype
        return description

    def read_into(self, state: dict[str, Tensor], description: ModelDescription) -> None:
        """Copy the weights into tensors of the names of `megatron_shapes`.

        Optimizer states and whatever else is stored are left unread.

        Args:
            state: contiguous tensors on the CPU, in any dtype; filled in place.

        Raises:
            CheckpointError: names the tensors that are missing or of another shape, or a damaged
                file.
        """
        d = description
        stacked = any(name.startswith("decoder.layers.mlp.") for name in self.stored)
        sharded: dict[str, ShardedTensor] = {}
        complaints = []
        for name, shape in megatron_shapes(d).items():
            key, offsets, prepended = _stored_name(name, d.num_layers, stacked)
            wanted = (d.num_layers, *shape) if prepended else shape
            found = self.stored.get(key)
            if found is None:
                complaints.append(f"{key} is missing")
            elif found.shape != wanted:
                complaints.append(
                    f"{key} has shape {list(found.shape)}, the saved arguments say {list(wanted)}"
                )
            sharded[name] = ShardedTensor.from_rank_offsets(
                key, state[name].detach(), *offsets, prepend_axis_num=prepended
            )
        complaints += [
            f"{key} is no part of this model"
            for key in self.stored
            if key.startswith(("decoder.", "embedding.", "output_layer."))
            and "_extra_state" not in key
            and key not in {t.key for t in sharded.values()}
        ]
        if complaints:
            complaints = list(dict.fromkeys(complaints))
            raise CheckpointError(f"{self.folder}: {'; '.join(complaints[:20])}")
        try:
            loaded = dist_checkpointing.load(
                sharded, str(self.folder), validate_access_integrity=False
            )
        except (Exception, CheckpointException) as e:  # zip, pickle, I/O of a damaged file
            raise CheckpointError(
                f"{self.folder}: the weights cannot be read ({e}); copy the checkpoint again"
            ) from e
        with torch.no_grad():
            for name, tensor in state.items():
                if name in sharded and loaded[name].data_ptr() != tensor.data_ptr():
                    tensor.copy_(loaded[name])


def _stored_name(
    name: str, num_layers: int, stacked: bool
) -> tuple[str, tuple[tuple[int, int, int], ...], int]:
    """(stored name, offsets, prepended axes) for a name of `megatron_shapes`."""
    match = _LAYER.fullmatch(name)
    if not match:
        return name, (), 0
    layer, inner = int(match[1]), TE_NAMES.get(match[2], match[2])
    if stacked:
        return f"decoder.layers.{inner}", ((0, layer, num_layers),), 1
    return f"decoder.layers.{layer}.{inner}", (), 0


class SynchronousSave(TorchDistSaveShardedStrategy):
    """Megatron's way of saving in the calling thread, and without a GPU to wait for."""

    def save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> None:
        """Write one iteration's files; the format is the same."""
        renamed, *_ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(renamed, False),
            storage_writer=FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(
                dedup_replicated_tensors=False,
                flatten_state_dict=False,
                flatten_sharded_tensors=False,
            ),
        )


def write(path: str | Path, state: dict[str, Tensor], description: ModelDescription) -> None:
    """Write a `release` checkpoint that Megatron's training loads with `--load`.

    It has no optimizer and no random states; its saved arguments say so, and Megatron then starts
    at iteration 0.

    Args:
        path: an existing, empty folder.
        state: tensors of the names and shapes of `megatron_shapes`, on the CPU.

    Raises:
        OSError, RuntimeError: the files cannot be written.
    """
    ensure_single_process()
    d = description
    sharded: dict[str, Any] = {}
    for name, shape in megatron_shapes(d).items():
        key, offsets, prepended = _stored_name(name, d.num_layers, stacked=True)
        tensor = state[name].detach()
        assert tuple(tensor.shape) == shape, (name, tensor.shape, shape)
        sharded[name] = ShardedTensor.from_rank_offsets(
            key, tensor, *offsets, prepend_axis_num=prepended, replica_id=0
        )
    for i in range(d.num_layers):
        for module in _EXTRA_STATE_MODULES:
            sharded[f"decoder.layers.{i}.{module}._extra_state"] = ShardedObject(
                f"decoder.layers.{module}._extra_state", None, (d.num_layers,), (i,)
            )
    key = "decoder.final_layernorm._extra_state"
    sharded[key] = ShardedObject(key, None, (1,), (0,))
    folder = Path(path) / RELEASE
    folder.mkdir()
    common = {
        "args": d.to_megatron_args(),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
    }
    try:
        dist_checkpointing.save(
            {"model": sharded, **common},
            str(folder),
            SynchronousSave(),
            content_metadata={"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
        )
    except CheckpointException as e:  # a BaseException, with the reason in its text
        raise RuntimeError(str(e)) from e
    write_checksums(folder)
    (Path(path) / TRACKER_FILE).write_text(RELEASE)
