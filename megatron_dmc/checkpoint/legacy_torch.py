"""Megatron's older `torch` checkpoint format (`mp_rank_XX[_YYY]/model_optim_rng.pt`), read only.

Every tensor-parallel and pipeline rank saved a pickle of its own; here they are one model again. The
names are those of Megatron-Core's GPTModel, of the local or of the Transformer Engine layer spec.
The released DMC checkpoints have this format (NVIDIA/Megatron-LM, branch dmc: `save_checkpoint`).
"""

import re
from argparse import Namespace
from collections import defaultdict
from pathlib import Path

from torch import Tensor

from megatron_dmc.checkpoint import pickles
from megatron_dmc.checkpoint.description import ModelDescription
from megatron_dmc.checkpoint.megatron_args import from_megatron_args, saved_args
from megatron_dmc.checkpoint.weights import TE_NAMES, join, megatron_shapes
from megatron_dmc.config import DMCConfig
from megatron_dmc.errors import CheckpointError

FILE = "model_optim_rng.pt"
_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?")
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_LOCAL_NAMES = {te: local for local, te in TE_NAMES.items()}
_TIED_COPY = "output_layer.weight"


def is_iteration(folder: Path) -> bool:
    """True for an iteration's folder of this format."""
    return any(folder.glob(f"mp_rank_*/{FILE}"))


class LegacyCheckpoint:
    """One iteration of a `torch` checkpoint, opened for reading: a `WeightSource`.

    Args:
        folder: an iteration's.
        allow_pickle: unpickle without a guard, which lets the files run code.

    Raises:
        CheckpointError: ranks are missing, a file is damaged, or it is not a GPT of Megatron-Core.
    """

    def __init__(self, folder: str | Path, *, allow_pickle: bool = False):
        self.folder = Path(folder)
        files: dict[tuple[int, int], Path] = {}
        for file in sorted(self.folder.glob(f"mp_rank_*/{FILE}")):
            match = _RANK.fullmatch(file.parent.name)
            if not match:
                raise CheckpointError(
                    f"{file.parent}: a rank of expert parallelism; save the model again with "
                    "--ckpt-format torch_dist"
                )
            files[int(match[1]), int(match[2] or 0)] = file
        self._tp = 1 + max(tp for tp, _ in files)
        self._pp = 1 + max(pp for _, pp in files)
        states = {
            rank: pickles.load(file, file, allow_pickle=allow_pickle)
            for rank, file in files.items()
        }
        first = next(iter(states.values()))
        if not all(isinstance(state, dict) for state in states.values()):
            raise CheckpointError(f"{self.folder}: a rank's file holds no dict")
        self.args: Namespace = saved_args(first.get("args"), self.folder)
        self._check_ranks(states)
        self._shards: dict[str, list[Tensor]] = defaultdict(list)
        for tp in range(self._tp):
            self._add_rank(tp, states)

    def _check_ranks(self, states: dict[tuple[int, int], dict]) -> None:
        for what, found in (
            ("tensor_model_parallel_size", self._tp),
            ("pipeline_model_parallel_size", self._pp),
        ):
            saved = getattr(self.args, what, found)
            if saved != found:
                raise CheckpointError(
                    f"{self.folder}: saved with {what}={saved}, but there are {found} ranks; copy "
                    "the missing mp_rank_* folders"
                )
        missing = [
            f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if self._pp > 1 else "")
            for tp in range(self._tp)
            for pp in range(self._pp)
            if (tp, pp) not in states
        ]
        if missing:
            raise CheckpointError(f"{self.folder}: {', '.join(missing)}: missing; copy them")

    def _chunks(self, tp: int, states: dict[tuple[int, int], dict]) -> list[dict[str, Tensor]]:
        """A tensor-parallel rank's parts of the model in the order of the layers."""
        ranks = [states[tp, pp] for pp in range(self._pp)]
        if "model" in ranks[0]:
            return self._parts(ranks, ["model"])
        count = sum(re.fullmatch(r"model\d+", str(key)) is not None for key in ranks[0])
        if not count:
            raise CheckpointError(f"{self.folder}: mp_rank_{tp:02d} holds no model")
        # interleaved: the first chunks of all pipeline ranks, then the second ones
        return self._parts(ranks, [f"model{i}" for i in range(count)])

    def _parts(self, ranks: list[dict], keys: list[str]) -> list[dict[str, Tensor]]:
        parts = [rank.get(key) for key in keys for rank in ranks]
        if not all(isinstance(part, dict) for part in parts):
            raise CheckpointError(f"{self.folder}: a rank's file has no {' or no '.join(keys)}")
        return parts  # type: ignore[return-value]

    def _add_rank(self, tp: int, states: dict[tuple[int, int], dict]) -> None:
        offset = 0
        for chunk in self._chunks(tp, states):
            if "language_model" in chunk:
                raise CheckpointError(
                    f"{self.folder}: a model of Megatron's code before Megatron-Core "
                    "(--use-legacy-models); save it with Megatron-Core's GPTModel first"
                )
            layers = 0
            for key, tensor in chunk.items():
                if not isinstance(tensor, Tensor) or "_extra_state" in key:
                    continue
                name = key
                if match := _LAYER.fullmatch(key):
                    layers = max(layers, int(match[1]) + 1)
                    inner = _LOCAL_NAMES.get(match[2], match[2])
                    name = f"decoder.layers.{offset + int(match[1])}.{inner}"
                if not name.endswith("rotary_pos_emb.inv_freq"):
                    self._shards[name].append(tensor)
            offset += layers

    def description(self, *, vocab_size: int | None = None) -> ModelDescription:
        """The model, from the saved arguments; dtype from the stored weights."""
        description = from_megatron_args(self.args, vocab_size=vocab_size)
        embedding = self._shards.get("embedding.word_embeddings.weight")
        if embedding:
            description.dtype = embedding[0].dtype
        return description

    def check(self, description: ModelDescription) -> None:
        """Compare the names with the model's.

        Raises:
            CheckpointError: names the tensors that are missing or no part of it.
        """
        wanted, found = set(megatron_shapes(description)), set(self._shards)
        if description.share_embeddings_and_output_weights:
            found.discard(_TIED_COPY)  # the last pipeline rank's copy of the embedding
        complaints = [f"{name} is missing" for name in sorted(wanted - found)]
        complaints += [f"{name} is no part of this model" for name in sorted(found - wanted)]
        if complaints:
            raise CheckpointError(f"{self.folder}: {'; '.join(complaints[:20])}")

    def fill(self, name: str, out: Tensor) -> None:
        """See `WeightSource`."""
        try:
            join(name, self._shards[name], out)
        except ValueError as e:
            raise CheckpointError(f"{self.folder}: {name}: {e}") from e


def released_dmc_config(args: Namespace, *, target_cr: float | None = None) -> DMCConfig:
    """DMC's settings of a checkpoint that the released DMC code saved.

    That code reads the decision from the last channel with offset 5 (`--dmc-init-val`) and merges the
    latest 12 tokens (`--dmc-window-size`); these hold where the arguments do not say.

    Args:
        args: saved with the checkpoint.
        target_cr: where they do not hold `dmc_cr`.

    Raises:
        CheckpointError: the target CR is unknown.
    """
    cr = target_cr if target_cr is not None else getattr(args, "dmc_cr", None)
    if cr is None:
        raise CheckpointError(
            "the saved arguments hold no dmc_cr; pass --dmc-target-cr (8 for the 8x checkpoints)"
        )
    stage = "finetune" if getattr(args, "dmc_finetune", True) else "retrofit"
    if getattr(args, "dmc_is_stage_one", False):
        stage = "zero-out"
    return DMCConfig.from_dict({
        "stage": stage,
        "target_cr": cr,
        "alpha_offset": getattr(args, "dmc_init_val", 5.0),
        "temperature": getattr(args, "dmc_temp", 0.1),
        "merge_window": getattr(args, "dmc_window_size", 12),
    })  # fmt: skip
