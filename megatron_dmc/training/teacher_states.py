"""A teacher's last hidden states on disk: a microbatch that the teacher has seen needs its output layer only."""

import hashlib
import json
import os
from pathlib import Path

import torch
from megatron.core import mpu
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_dmc.checkpoint.integrity import MANIFEST


class HiddenStates:
    """Hidden states by the tokens of a microbatch and of the ranks that computed them.

    Args:
        folder: made if it is missing. Several runs may share it at the same time.
        checkpoint: the teacher's iteration folder; another teacher has other files.
        dtype: of the teacher's weights.
    """

    def __init__(self, folder: Path, checkpoint: Path, dtype: torch.dtype):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._identity = [
            _contents(checkpoint), str(dtype),
            mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size(),
            mpu.get_context_parallel_rank(), mpu.get_context_parallel_world_size(),
        ]  # fmt: skip
        self._group = mpu.get_tensor_and_context_parallel_group()

    def file_of(
        self, tokens_BT: Tensor, position_ids_BT: Tensor, starts: list[list[int]] | None
    ) -> Path:
        """The file that a microbatch has, or would have.

        Args:
            starts: of packed documents; None: a sequence is one.
        """
        name = hashlib.sha256(json.dumps([*self._identity, starts, tokens_BT.shape]).encode())
        for tensor in (tokens_BT, position_ids_BT):
            name.update(tensor.cpu().contiguous().numpy().tobytes())
        return self.folder / f"{name.hexdigest()[:32]}.safetensors"

    def load(self, file: Path, device: torch.device) -> Tensor | None:
        """States that were saved; None where a rank that shares the microbatch lacks its part.

        Collective over tensor- and context-parallel ranks. A damaged file counts as missing.
        """
        try:
            found = load_file(file)["hidden_states"].to(device)
        except (OSError, SafetensorError, KeyError):
            found = None
        if self._group.size() > 1:
            is_there = torch.tensor(float(found is not None), device=device)
            torch.distributed.all_reduce(is_there, torch.distributed.ReduceOp.MIN, self._group)
            if not is_there.item():
                return None
        return found

    def save(self, file: Path, hidden_states: Tensor) -> None:
        """Write a file in one step, so that another run reads all of it or nothing.

        Raises:
            OSError: it cannot be written.
        """
        part = file.with_suffix(f".{os.getpid()}.part")
        save_file({"hidden_states": hidden_states.detach().contiguous().cpu()}, part)
        part.replace(file)


def _contents(checkpoint: Path) -> str:
    """Names what a checkpoint holds: by its checksums, else by its files' sizes and times."""
    manifest = checkpoint / MANIFEST
    if manifest.is_file():
        return hashlib.sha256(manifest.read_bytes()).hexdigest()
    files = sorted(file for file in checkpoint.iterdir() if file.is_file())
    found = [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files]
    return hashlib.sha256(json.dumps([str(checkpoint.resolve()), found]).encode()).hexdigest()
