"""Pickles in Megatron's checkpoints, unpickled without running anything of the file's.

`torch_dist` keeps its index (`.metadata`) and its saved arguments (an object among the tensors, or
`common.pt`) as pickles, and `torch` whole ranks. Here they may name a short list of classes, which hold
values and do nothing; a pickle that names anything else is refused, and nothing of it is called.
"""

import io
import pickle
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np
import torch
from megatron.core.safe_globals import SAFE_GLOBALS
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_dmc.errors import CheckpointError

_DTYPES = [v for v in vars(torch).values() if isinstance(v, torch.dtype)]
_LAYOUTS = {str(v): v for v in vars(torch).values() if isinstance(v, torch.layout)}
_NUMPY_DTYPES = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}


class RefusedPickle(CheckpointError):
    """A pickle that names what is not on the list; the message lists the names."""


def _refuse(where: Path, names: list[str]) -> NoReturn:
    raise RefusedPickle(
        f"{where}: its pickle calls {', '.join(names)}, which loading values safely does not allow; if "
        "you trust who made this checkpoint, pass --allow-pickle (LLM: allow_pickle=True), which lets it "
        "run code"
    )


def _harmless() -> list[Any]:
    """Classes that torch's `weights_only` unpickler may construct besides tensors and plain values.

    Megatron's own list (arguments, enums, the states of random generators and of the rerun state
    machine), and numpy's numbers and arrays.
    """
    reconstruct: Any = np.ndarray.__reduce__(np.empty(0))[0]
    scalar: Any = np.float64(0).__reduce__()[0]
    return [
        *SAFE_GLOBALS,
        *_NUMPY_DTYPES,
        *((f, f"numpy.{core}.multiarray.{f.__name__}")  # as numpy 1 and 2 name them
          for f in (reconstruct, scalar) for core in ("core", "_core")),
    ]  # fmt: skip


def load(source: Path | io.BytesIO, where: Path, *, allow_pickle: bool) -> Any:
    """The contents of a `torch.save` file; the tensors of a file are mapped into memory and read when used.

    Args:
        where: the file that errors name.
        allow_pickle: unpickle without a guard, which lets the file run code.

    Raises:
        RefusedPickle: it names what is not on the list.
        CheckpointError: damaged.
    """
    options: dict[str, Any] = {"map_location": "cpu", "mmap": isinstance(source, Path) or None}
    try:
        if allow_pickle:
            return torch.load(source, weights_only=False, **options)
        with torch.serialization.safe_globals(_harmless()):
            try:
                return torch.load(source, weights_only=True, **options)
            except Exception:
                if isinstance(source, io.BytesIO):
                    source.seek(0)
                unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(source)
                if not unsafe:
                    raise
    except Exception as e:  # zip, pickle, I/O
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise CheckpointError(f"{where}: damaged or not a torch checkpoint ({first})") from e
    _refuse(where, sorted(unsafe))


def _makers() -> dict[tuple[str, str], Any]:
    """Names in an index -> what is made for them: new at every call, since a pickle can set attributes
    of a class or function that it names."""
    found: dict[tuple[str, str], Any] = {
        (cls.__module__, cls.__name__): type(cls.__name__, (cls,), {})
        for cls in (
            metadata.Metadata,
            metadata.BytesStorageMetadata,
            metadata.TensorStorageMetadata,
            metadata.TensorProperties,
            metadata.ChunkStorageMetadata,
            metadata.MetadataIndex,
            metadata.StorageMeta,
            filesystem._StorageInfo,
        )
    }
    encoding = metadata._MEM_FORMAT_ENCODING
    functions: dict[tuple[str, str], Callable] = {
        (encoding.__module__, encoding.__name__): lambda value: encoding(value),
        ("torch.serialization", "_get_layout"): lambda name: _LAYOUTS[name],
        # the folder that it was saved into: of no use here
        ("pathlib", "PosixPath"): lambda *parts: str(PurePosixPath(*parts)),
        ("pathlib._local", "PosixPath"): lambda *parts: str(PurePosixPath(*parts)),
    }
    values = {("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _DTYPES}
    return {**found, **functions, **values, ("torch", "Size"): torch.Size}


class _IndexUnpickler(pickle.Unpickler):
    def __init__(self, file: Any):
        super().__init__(file)
        self._makers = _makers()
        self.refused: list[str] = []

    def find_class(self, module: str, name: str) -> Any:
        maker = self._makers.get((module, name))
        if maker is None:
            self.refused.append(f"{module}.{name}")
            raise pickle.UnpicklingError(f"{module}.{name} is not on the list")
        return maker


def load_index(file: Path, *, allow_pickle: bool) -> Metadata:
    """A `torch_dist` folder's `.metadata`: what is stored, and where in its files.

    Raises:
        RefusedPickle: it names what is not on the list.
        CheckpointError: missing or damaged, or it names files outside of its folder.
    """
    refused: list[str] = []
    try:
        with open(file, "rb") as f:
            if allow_pickle:
                index = pickle.load(f)
            else:
                unpickler = _IndexUnpickler(f)
                refused = unpickler.refused
                index = unpickler.load()
        _check_index(index)
        # keys are equal to those of their own class only
        index.storage_data = {
            MetadataIndex(key.fqn, key.offset, key.index): info
            for key, info in index.storage_data.items()
        }
    except Exception as e:  # pickle raises anything on a damaged file
        if refused:
            _refuse(file, refused)
        raise CheckpointError(f"{file}: missing or damaged ({e}); copy it again") from e
    if getattr(index, "storage_meta", None) is None:
        index.storage_meta = metadata.StorageMeta()
    return index


def _check_index(index: Any) -> None:
    """Raises ValueError where something is of another type than reading relies on."""

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(what)

    require(isinstance(index, Metadata), "it holds no Metadata")
    for name, entry in index.state_dict_metadata.items():
        if isinstance(entry, metadata.TensorStorageMetadata):
            sizes = isinstance(entry.size, torch.Size) and all(n >= 0 for n in entry.size)
            require(isinstance(name, str) and sizes, f"the size of {name!r} is {entry.size!r}")
            require(isinstance(entry.properties.dtype, torch.dtype), f"{name!r} has no dtype")
        else:
            require(isinstance(entry, metadata.BytesStorageMetadata), f"{name!r} is no entry")
    for key, info in index.storage_data.items():
        path = PurePosixPath(info.relative_path)
        require(not path.is_absolute() and ".." not in path.parts,
                f"it says that {key.fqn!r} is in {info.relative_path!r}, outside of its folder")  # fmt: skip
        require(min(int(info.offset), int(info.length)) >= 0, f"{key.fqn!r} has a negative place")
