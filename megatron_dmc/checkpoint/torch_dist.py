"""Megatron `torch_dist` checkpoints, read by one process without building a model.

A checkpoint folder holds one folder per saved iteration (`iter_0000100`, or `release` for weights
that no run of Megatron has made) and `latest_checkpointed_iteration.txt`, which names the newest.
Weights are stored whole, whatever the tensor and pipeline parallel layout that saved them: layers
stacked into one tensor (`decoder.layers.mlp.linear_fc2.weight`: [layers, ...]), norms under the
names of the Transformer Engine layer spec. The local layer spec maps its names to these.
"""

import io
import re
from argparse import Namespace
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_dmc.checkpoint import pickles
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.field_checks import read_json_object, shown
from megatron_dmc.checkpoint.integrity import verify_checksums
from megatron_dmc.checkpoint.megatron_args import from_megatron_args, saved_args
from megatron_dmc.checkpoint.torch_dist_places import Place, chunk_of, places_of
from megatron_dmc.checkpoint.weights import megatron_shapes
from megatron_dmc.errors import CheckpointError

TRACKER_FILE = "latest_checkpointed_iteration.txt"
RELEASE = "release"


def is_checkpoint(path: str | Path) -> bool:
    """True for a Megatron checkpoint folder, or for one of its iterations."""
    path = Path(path)
    return (path / TRACKER_FILE).is_file() or (path / "metadata.json").is_file()


def newest_folder(path: Path) -> Path:
    """The iteration's folder that a checkpoint folder's tracker file names, of whatever format.

    Raises:
        CheckpointError: no tracker file, or what it names is missing.
    """
    tracker = path / TRACKER_FILE
    try:
        newest = tracker.read_text().strip()
    except (OSError, UnicodeDecodeError) as e:
        raise CheckpointError(
            f"{tracker}: cannot be read ({e}); every Megatron checkpoint that was saved to its end "
            "has this file"
        ) from e
    if newest != RELEASE and not re.fullmatch("[0-9]{1,12}", newest):
        raise CheckpointError(f"{tracker}: {shown(newest)} is neither an iteration nor {RELEASE!r}")
    folder = path / (RELEASE if newest == RELEASE else f"iter_{int(newest):07d}")
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: is missing, and {TRACKER_FILE} names it; put another iteration into that "
            "file or pass the iteration's folder"
        )
    return folder


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
    folder = newest_folder(path)
    if not (folder / "metadata.json").is_file():
        raise CheckpointError(
            f"{folder}: has no metadata.json, so it is not a finished torch_dist checkpoint; "
            "save with --ckpt-format torch_dist"
        )
    _check_backend(folder / "metadata.json")
    return folder


def _check_backend(file: Path) -> None:
    backend = read_json_object(file).get("sharded_backend")
    if backend != "torch_dist":
        raise CheckpointError(f"{file}: the format is {shown(backend)}; only 'torch_dist' is read")


class StoredTensor(NamedTuple):
    """Shape and dtype of a whole tensor in a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Reader(FileSystemReader):
    """torch's reader of a `torch_dist` folder, with our unpickler in place of its own."""

    def __init__(self, folder: Path, *, allow_pickle: bool = False):
        super().__init__(folder)
        self.folder, self.allow_pickle = folder, allow_pickle

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """See `pickles.load_index`."""
        return pickles.load_index(self.folder / ".metadata", allow_pickle=self.allow_pickle)

    def open(self) -> Metadata:
        """Read the index, after which `read_data` can be called."""
        index = self.read_metadata()
        self.set_up_storage_reader(index, is_coordinator=True)
        return index


def _check_lengths(folder: Path, index: Metadata) -> None:
    """Raises CheckpointError for a file that is missing or shorter than what lies in it."""
    ends: dict[str, int] = {}
    for info in index.storage_data.values():
        end = info.offset + info.length
        ends[info.relative_path] = max(end, ends.get(info.relative_path, 0))
    for name, end in sorted(ends.items()):
        part = folder / name
        if not part.is_file():
            raise CheckpointError(f"{part}: is missing; copy the checkpoint again")
        if part.stat().st_size < end:
            raise CheckpointError(
                f"{part}: truncated, {part.stat().st_size} of at least {end} bytes; copy the "
                "checkpoint again"
            )


def read_metadata(folder: Path, *, allow_pickle: bool = False) -> dict[str, StoredTensor]:
    """Contents of an iteration's folder, after a check that its files exist in full length.

    Raises:
        CheckpointError: names the file that is missing, damaged, truncated or a refused pickle.
    """
    index = Reader(folder, allow_pickle=allow_pickle).read_metadata()
    _check_lengths(folder, index)
    return {
        name: StoredTensor(tuple(entry.size), entry.properties.dtype)
        for name, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


_COMMON_KEY = "common_state/shard_0_1"
"""Megatron's name of the object that holds what is no tensor; earlier versions have a file instead."""
_COMMON_FILE = "common.pt"


class _CollectBytes(DefaultLoadPlanner):
    """Keeps an object's bytes; torch's own planner unpickles them."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.value = value


def read_common(folder: Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Contents of an iteration besides its sharded tensors: arguments, step, schedules.

    Raises:
        CheckpointError: it cannot be read, or is a refused pickle.
    """
    try:
        place = folder / _COMMON_FILE
        if place.is_file():
            common = pickles.load(place, place, allow_pickle=allow_pickle)
        else:
            reader = Reader(folder, allow_pickle=allow_pickle)
            key, zero = MetadataIndex(_COMMON_KEY), torch.Size((0,))
            info = reader.open().storage_data.get(key)
            if info is None:
                raise CheckpointError(f"has neither {_COMMON_FILE} nor {_COMMON_KEY}")
            item = ReadItem(LoadItemType.BYTE_IO, key, zero, key, zero, torch.Size((info.length,)))
            planner = _CollectBytes()
            reader.read_data(LoadPlan([item]), planner).wait()
            place = folder / info.relative_path
            common = pickles.load(planner.value, place, allow_pickle=allow_pickle)
            if isinstance(common, io.BytesIO):  # a torch file within a torch file
                common = pickles.load(common, place, allow_pickle=allow_pickle)
            common = common[0]
        if not isinstance(common, dict):
            raise CheckpointError(f"it is a {type(common).__name__}, not a dict")
        return common
    except (Exception, CheckpointException) as e:  # the latter is a BaseException
        if isinstance(e, pickles.RefusedPickle):
            raise
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
    try:
        read_metadata(folder)
        read_common(folder)
    except pickles.RefusedPickle:
        pass  # not damaged: Megatron unpickles what it loads without a guard
    verify_checksums(folder)


def older_usable_iteration(path: str | Path) -> tuple[int, str] | None:
    """The iteration to resume from if the newest one of a checkpoint folder is damaged.

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
        allow_pickle: unpickle without a guard, which lets the files run code.

    Raises:
        CheckpointError: missing, truncated or unreadable; names the file.
    """

    def __init__(self, path: str | Path, *, allow_pickle: bool = False):
        self.folder = iteration_folder(path)
        self.root = self.folder if self.folder == Path(path) else Path(path)
        if self.root == self.folder and (self.folder.parent / TRACKER_FILE).is_file():
            self.root = self.folder.parent
        self.allow_pickle = allow_pickle
        self.stored = read_metadata(self.folder, allow_pickle=allow_pickle)
        self.common: dict[str, Any] = read_common(self.folder, allow_pickle=allow_pickle)

    @property
    def args(self) -> Namespace:
        """Megatron's arguments of the run that saved it, the plain ones."""
        return saved_args(self.common.get("args"), self.folder)

    @property
    def iteration(self) -> int:
        """Training steps done."""
        return int(self.common.get("iteration", 0))

    def description(self, *, vocab_size: int | None = None) -> ModelDescription:
        """The model, from the saved arguments; dtype from the stored weights.

        Args:
            vocab_size: the tokenizer's, used where the run was given no --vocab-size.
        """
        description = from_megatron_args(self.args, vocab_size=vocab_size)
        embedding = self.stored.get("embedding.word_embeddings.weight")
        if embedding is not None:
            description.dtype = embedding.dtype
        return description

    def weights(self, description: ModelDescription) -> "TorchDistWeights":
        """The weights as a `WeightSource`; optimizer states and whatever else stay unread.

        Raises:
            CheckpointError: names the tensors that are missing, of another shape, or no part of the
                model.
        """
        places: dict[str, Place] = {}
        complaints: list[str] = []
        known = set()
        for name, shape in megatron_shapes(description).items():
            if len(complaints) >= 20:
                raise CheckpointError(f"{self.folder}: {'; '.join(dict.fromkeys(complaints))}")
            candidates = places_of(name, shape, description)
            known |= {place.key for place in candidates}
            place = next((p for p in candidates if p.key in self.stored), None)
            if place is None:
                complaints.append(f"{candidates[0].key} is missing")
                continue
            found = self.stored[place.key].shape
            if found != place.shape:
                complaints.append(
                    f"{place.key} has shape {list(found)}, the saved arguments say "
                    f"{list(place.shape)}"
                )
            places[name] = place
        complaints += [
            f"{key} is no part of this model"
            for key in self.stored
            if key.startswith(("decoder.", "embedding.", "output_layer."))
            and "_extra_state" not in key
            and key not in known
        ]
        if complaints:
            complaints = list(dict.fromkeys(complaints))
            raise CheckpointError(f"{self.folder}: {'; '.join(complaints[:20])}")
        return TorchDistWeights(Reader(self.folder, allow_pickle=self.allow_pickle), places)


class _ReadOne(DefaultLoadPlanner):
    """Hands the storage reader parts of one tensor to write into."""

    def __init__(self, out: Tensor, chunk: ChunkStorageMetadata):
        super().__init__()
        self._out, self._offsets = out.view(chunk.sizes), chunk.offsets

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        spans = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._out[tuple(slice(begin, begin + length) for begin, length in spans)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class TorchDistWeights:
    """The weights of a checkpoint, read one tensor at a time: a `WeightSource`."""

    def __init__(self, reader: Reader, places: dict[str, Place]):
        self._folder, self._places = reader.folder, places
        self._reader, self._metadata = reader, reader.open()
        self._chunks: dict[str, dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}

    def _chunks_at(self, place: Place) -> TensorStorageMetadata:
        """The stored tensor with those of its chunks alone that can lie at `place`."""
        stored = self._metadata.state_dict_metadata[place.key]
        assert isinstance(stored, TensorStorageMetadata)
        depth = len(place.at)
        if place.key not in self._chunks:
            chunks = defaultdict(list)
            for chunk in stored.chunks:
                thin = all(size == 1 for size in chunk.sizes[:depth])
                chunks[tuple(chunk.offsets[:depth]) if thin else ()].append(chunk)
            self._chunks[place.key] = chunks
        near = self._chunks[place.key]
        if () in near:  # chunks of several layers
            return stored
        return replace(stored, chunks=near.get(place.at, []))

    def fill(self, name: str, out: Tensor) -> None:
        """See `WeightSource`."""
        place = self._places[name]
        chunk = chunk_of(place)
        stored = self._chunks_at(place)
        target = out.detach()
        if not target.is_contiguous():
            target = torch.empty(target.shape, dtype=target.dtype)
        try:
            items = create_read_items_for_chunk_list(place.key, stored, [chunk])
            if sum(item.lengths.numel() for item in items) != target.numel():
                raise ValueError("its stored chunks do not make it up")
            self._reader.read_data(LoadPlan(items), _ReadOne(target, chunk)).wait()
        except (Exception, CheckpointException) as e:  # zip, pickle, I/O of a damaged file
            raise CheckpointError(
                f"{self._folder}: {place.key} cannot be read ({e}); copy the checkpoint again"
            ) from e
        if target.data_ptr() != out.data_ptr():
            out.copy_(target)
