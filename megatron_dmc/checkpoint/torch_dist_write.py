"""Writing Megatron `torch_dist` checkpoints, one tensor at a time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from tqdm import tqdm

from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.integrity import write_checksums
from megatron_dmc.checkpoint.megatron_args import to_megatron_args
from megatron_dmc.checkpoint.single_process import ensure_single_process
from megatron_dmc.checkpoint.torch_dist import RELEASE, TRACKER_FILE
from megatron_dmc.checkpoint.torch_dist_places import Place, chunk_of, places_of
from megatron_dmc.checkpoint.weights import WeightSource, megatron_shapes, read_tensor
from megatron_dmc.errors import CheckpointError


class SynchronousSave(TorchDistSaveShardedStrategy):
    """Megatron's way of saving in the calling thread, and without a GPU to wait for."""

    def save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> None:
        """Write one iteration's files; the format is the same."""
        renamed, *_ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(renamed, False),
            storage_writer=FileSystemWriter(checkpoint_dir),
            planner=self.planner(),
        )

    def planner(self) -> MCoreSavePlanner:
        """The planner that determines the contents of the files."""
        return MCoreSavePlanner(**_PLANNER_OPTIONS)


_PLANNER_OPTIONS = {
    "dedup_replicated_tensors": False,
    "flatten_state_dict": False,
    "flatten_sharded_tensors": False,
}


class _StreamedSave(SynchronousSave):
    """Saves the state dict, and tensors that are created only when they are written."""

    def __init__(self, places: list[Place], dtype: torch.dtype, make: Callable[[Place], Tensor]):
        super().__init__()
        self._places, self._dtype, self._make = places, dtype, make

    def planner(self) -> MCoreSavePlanner:
        """See `SynchronousSave`."""
        return _StreamingPlanner(self._places, self._dtype, self._make)


class _StreamingPlanner(MCoreSavePlanner):
    def __init__(self, places: list[Place], dtype: torch.dtype, make: Callable[[Place], Tensor]):
        super().__init__(**_PLANNER_OPTIONS)
        self._make = make
        self._items = {}
        for place in places:
            chunk = chunk_of(place)
            index = MetadataIndex(place.key, chunk.offsets)
            data = TensorWriteData(
                chunk, TensorProperties(dtype=dtype), size=torch.Size(place.shape)
            )
            self._items[place.key, tuple(chunk.offsets)] = (
                place,
                WriteItem(index, WriteItemType.SHARD, tensor_data=data),
            )

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = [*plan.items, *(item for _, item in self._items.values())]
        self.plan = replace(plan, items=items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        entry = self._items.get((index.fqn, tuple(index.offset or ())))
        if entry is None:
            return super().lookup_object(index)
        place, item = entry
        assert item.tensor_data is not None and item.tensor_data.chunk is not None
        return self._make(place).view(item.tensor_data.chunk.sizes)


def _written_places(d: ModelDescription) -> dict[Place, str]:
    """All places that `write` fills, and the tensors that go there.

    With experts, the norm before them goes under both layer specs' names: each looks for its own.
    """
    places = {}
    for name, shape in megatron_shapes(d).items():
        candidates = places_of(name, shape, d)
        places[candidates[0]] = name
        if d.num_experts is not None and name.endswith("pre_mlp_layernorm.weight"):
            places[candidates[2]] = name
    return places


def _extra_states(d: ModelDescription) -> dict[str, ShardedObject]:
    """Extra states that Transformer Engine modules expect besides their weights; empty here."""
    modules = ["self_attention.linear_qkv", "self_attention.linear_proj",
               "self_attention.core_attention"]  # fmt: skip
    fc = ("linear_fc1", "linear_fc2")
    if d.num_experts is None:
        modules += [f"mlp.{name}" for name in fc]
    if d.qk_layernorm:
        modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    states = {}
    for i in range(d.num_layers):
        for module in modules:
            key = f"decoder.layers.{module}._extra_state"
            states[f"{i}.{key}"] = ShardedObject(key, None, (d.num_layers,), (i,))
        for e in range(d.num_experts or 0):
            for name in fc:
                key = f"decoder.layers.mlp.experts.experts.{name}._extra_state"
                states[f"{i}.{e}.{key}"] = ShardedObject(
                    key, None, (d.num_layers, d.num_experts), (i, e)
                )
    key = "decoder.final_layernorm._extra_state"
    states[key] = ShardedObject(key, None, (1,), (0,))
    return states


def write(
    path: str | Path, source: WeightSource, description: ModelDescription, *, progress: bool = False
) -> None:
    """Write a `release` checkpoint that Megatron's training loads with `--load`, tensor by tensor.

    It has no optimizer and no random states; its saved arguments say so, and Megatron then starts
    at iteration 0.

    Args:
        path: an existing, empty folder.
        source: of the weights, which are written in `description.dtype`.

    Raises:
        OSError, RuntimeError: the files cannot be written.
        CheckpointError: the source cannot be read.
    """
    ensure_single_process()
    d = description
    shapes, places = megatron_shapes(d), _written_places(d)
    bar = tqdm(
        total=len(places), desc="converting weights", unit="tensor",
        disable=None if progress else True,
    )  # fmt: skip

    def make(place: Place) -> Tensor:
        bar.update()
        return read_tensor(source, places[place], shapes[places[place]], d.dtype)

    folder = Path(path) / RELEASE
    folder.mkdir()
    common = {
        "args": to_megatron_args(d),
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
    }
    try:
        with bar:
            dist_checkpointing.save(
                {"model": _extra_states(d), **common},
                str(folder),
                _StreamedSave(list(places), d.dtype, make),
                content_metadata={
                    "singleton_local_shards": False,
                    "chained_optim_avoid_prefix": True,
                },
            )
    except CheckpointException as e:  # a BaseException, with the reason in its text
        causes = [error for error, _ in e.failures.values()]
        cause = next((c for c in causes if isinstance(c, CheckpointError)), None)
        raise cause or RuntimeError(str(e)) from e
    write_checksums(folder)
    (Path(path) / TRACKER_FILE).write_text(RELEASE)
