"""Checkpoints that changed on their way or were made to harm: flipped bits, and code hidden in pickles."""

import builtins
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.rerun_state_machine import RerunMode
from megatron.core.transformer.enums import AttnBackend
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megatron_dmc import LLM
from megatron_dmc.checkpoint.convert import convert, open_checkpoint
from megatron_dmc.checkpoint.load import load_model
from megatron_dmc.checkpoint.pickles import RefusedPickle
from megatron_dmc.checkpoint.torch_dist import TorchDistCheckpoint, check_whole, read_common
from megatron_dmc.cli import main as cli
from megatron_dmc.errors import CheckpointError

MODEL = Path(__file__).parents[2] / "examples" / "models" / "stdlib-llama-3m"
COMMON = MetadataIndex("common_state/shard_0_1")


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "megatron"
    convert("hf", "megatron", MODEL, folder)
    return folder


@pytest.fixture
def copy(good, tmp_path, monkeypatch) -> Path:
    """A copy of a good checkpoint to change; the working directory is one where `ran` may appear."""
    shutil.copytree(good, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "copy"


def commands(path: Path) -> list[list[str]]:
    """Every command that reads a Megatron checkpoint's weights by itself."""
    return [
        ["convert", "--to", "hf", str(path), "out"],
        ["generate", str(path), "--prompt", "x", "--max-tokens", "1"],
        ["serve", str(path), "--port", "0"],
    ]


def refused(path: Path, capsys, *words: str) -> None:
    for command in commands(path):
        assert cli.main(command) == 2, command
        lines = capsys.readouterr().err.splitlines()
        line = next(x for x in lines if x.startswith("megatron-dmc: error:"))
        assert all(word in line for word in words), line
        assert not Path("out").exists()


# Checksums


def flip_a_weight(path: Path) -> str:
    """Change one bit in the middle of a weight; the file's name."""
    folder = path / "release"
    index = pickle.loads((folder / ".metadata").read_bytes())
    info = max(
        (
            info
            for key, info in index.storage_data.items()
            if isinstance(index.state_dict_metadata[key.fqn], TensorStorageMetadata)
        ),
        key=lambda info: info.length,
    )
    with open(folder / info.relative_path, "r+b") as f:
        f.seek(info.offset + info.length // 2)
        byte = f.read(1)[0]
        f.seek(-1, io.SEEK_CUR)
        f.write(bytes([byte ^ 1]))
    return info.relative_path


def test_a_flipped_bit_of_a_weight_is_refused_by_every_command(copy, capsys):
    file = flip_a_weight(copy)
    refused(copy, capsys, file, "its bytes are not those that were saved")
    with pytest.raises(CheckpointError, match=file):
        load_model(copy)
    with pytest.raises(CheckpointError, match=file):
        LLM(str(copy), num_pages=64)
    changed = load_model(copy, verify_checkpoint=False).model.state_dict()
    whole = load_model(MODEL).model.state_dict()
    different = [n for n, t in whole.items() if t is not None and not torch.equal(t, changed[n])]
    assert len(different) == 1  # without the check nothing else would have noticed
    command = ["convert", "--to", "hf", str(copy), "out"]
    assert cli.main([*command, "--no-verify-checkpoint"]) == 0


def test_checksums_of_a_hugging_face_folder_count_too(tmp_path):
    from megatron_dmc.checkpoint.integrity import write_checksums

    folder = tmp_path / "hf"
    shutil.copytree(MODEL, folder)
    write_checksums(folder)
    open_checkpoint(folder)
    config = folder / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(CheckpointError, match=r"config\.json: its bytes are not those"):
        open_checkpoint(folder)
    open_checkpoint(folder, verify_checkpoint=False)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "/dev/zero"])
def test_a_list_of_checksums_that_names_files_outside_is_refused(copy, name):
    (copy / "release" / "integrity.json").write_text(
        f'{{"algorithm": "sha256", "files": {{"{name}": "0"}}}}'
    )
    with pytest.raises(CheckpointError, match="integrity.json: damaged"):
        open_checkpoint(copy)


# Pickles


class Calls:
    """Unpickles as `function(*arguments)`."""

    def __init__(self, function: Callable, *arguments):
        self.made_of = (function, arguments)

    def __call__(self):
        """pickle wants what it is to call to look callable."""

    def __reduce__(self):
        return self.made_of


def by_name(module: str, name: str, *arguments: str) -> bytes:
    """A pickle, of protocol 4, that calls what a name with dots in it leads to."""
    import struct

    def text(value: str) -> bytes:
        data = value.encode()
        return b"X" + struct.pack("<I", len(data)) + data

    called = b"(" + b"".join(map(text, arguments)) + b"tR"
    return b"\x80\x04" + text(module) + text(name) + b"\x93" + called + b"."


TOUCH = "import os; os.system('touch ran')"
EVIL = {
    "posix.system": lambda: pickle.dumps(Calls(os.system, "touch ran")),
    "builtins.eval": lambda: pickle.dumps(Calls(eval, "__import__('os').system('touch ran')")),
    "builtins.getattr": lambda: pickle.dumps(
        Calls(Calls(getattr, Calls(__import__, "os"), "system"), "touch ran")
    ),
    "builtins.exec": lambda: pickle.dumps(Calls(exec, TOUCH)),
    "torch.serialization.load": lambda: pickle.dumps(Calls(torch.load, "evil.pt")),
    "torch.distributed.checkpoint.metadata.os.system": lambda: by_name(
        "torch.distributed.checkpoint.metadata", "os.system", "touch ran"
    ),
    "torch.serialization.os.system": lambda: by_name(
        "torch.serialization", "os.system", "touch ran"
    ),
    "pathlib.PosixPath.touch": lambda: by_name("pathlib", "PosixPath.touch", "ran"),
}


@pytest.mark.parametrize("name", EVIL)
def test_an_index_that_calls_something_is_refused(copy, capsys, name):
    data = EVIL[name]()
    file = copy / "release" / ".metadata"
    if name == "posix.system":  # a good index with a bad part
        index = pickle.loads(file.read_bytes())
        index.planner_data = Calls(os.system, "touch ran")
        file.write_bytes(pickle.dumps(index))
        refused(copy, capsys, ".metadata", name, "--allow-pickle")
    torch.save(Calls(os.system, "touch ran"), "evil.pt")
    file.write_bytes(data)
    with pytest.raises(RefusedPickle, match=name):
        TorchDistCheckpoint(copy)
    assert not Path("ran").exists()


def put_common(path: Path, data: bytes) -> None:
    """Replace the object of saved arguments, as `torch_dist` stores it."""
    folder = path / "release"
    index = pickle.loads((folder / ".metadata").read_bytes())
    info = index.storage_data[COMMON]
    file = folder / info.relative_path
    index.storage_data[COMMON] = replace(info, offset=file.stat().st_size, length=len(data))
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with open(file, "ab") as f:
        f.write(data)


def saved(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def with_arguments(path: Path, **more) -> dict:
    common = read_common(path / "release")
    return common | {"args": Namespace(**vars(common["args"]) | more)}


@pytest.mark.parametrize("place", ["object", "object within an object", "common.pt"])
def test_saved_arguments_that_call_something_are_refused(copy, capsys, place):
    common = with_arguments(copy, note=Calls(os.system, "touch ran"))
    if place == "common.pt":
        (copy / "release" / "common.pt").write_bytes(saved(common))
    else:
        data = saved([common])
        put_common(copy, saved(io.BytesIO(data)) if "within" in place else data)
    refused(copy, capsys, "posix.system", "--allow-pickle")
    assert not Path("ran").exists()
    if place == "common.pt":  # its checksum is not looked at: the list does not have it
        check_whole(copy / "release")  # Megatron's training may load it: refused is not damaged
        assert not Path("ran").exists()
    allowed = ["convert", "--to", "hf", str(copy), "out", "--allow-pickle"]
    assert cli.main([*allowed, "--no-verify-checkpoint"]) == 0
    assert Path("ran").exists()


@pytest.mark.parametrize(
    "function", [eval, exec, getattr, torch.load, builtins.open, shutil.rmtree]
)
def test_other_calls_among_the_saved_arguments(copy, function):
    put_common(copy, saved([with_arguments(copy, note=Calls(function, "ran", "w"))]))
    with pytest.raises(RefusedPickle, match=function.__name__):
        TorchDistCheckpoint(copy)
    assert not Path("ran").exists()


def test_what_the_model_does_not_need_is_not_unpickled(copy):
    folder = copy / "release"
    index = pickle.loads((folder / ".metadata").read_bytes())
    key = next(k for k in index.storage_data if "linear_qkv._extra_state" in k.fqn)
    data = saved(Calls(os.system, "touch ran"))
    file = folder / index.storage_data[key].relative_path
    index.storage_data[key] = replace(
        index.storage_data[key], offset=file.stat().st_size, length=len(data)
    )
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with open(file, "ab") as f:
        f.write(data)
    load_model(copy, verify_checkpoint=False)
    assert not Path("ran").exists()


def test_a_weight_that_calls_something_is_refused(copy):
    folder = copy / "release"
    index = pickle.loads((folder / ".metadata").read_bytes())
    key = next(k for k in index.storage_data if k.fqn == "decoder.final_layernorm.weight")
    data = saved(Calls(os.system, "touch ran"))
    file = folder / index.storage_data[key].relative_path
    index.storage_data[key] = replace(
        index.storage_data[key], offset=file.stat().st_size, length=len(data)
    )
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    with open(file, "ab") as f:
        f.write(data)
    with pytest.raises(CheckpointError, match="final_layernorm.weight cannot be read"):
        load_model(copy, verify_checkpoint=False)
    assert not Path("ran").exists()


def test_an_index_cannot_change_the_classes_that_it_names(copy):
    # protocol 2: push the class, then a state with attributes to set on it
    changes = pickle.dumps((None, {"storage_data": {}, "changed": 1}), protocol=2)[2:-1]
    name = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    (copy / "release" / ".metadata").write_bytes(b"\x80\x02" + name + changes + b"b.")
    with pytest.raises(CheckpointError, match="holds no Metadata"):
        TorchDistCheckpoint(copy)
    assert not hasattr(Metadata, "changed")


@pytest.mark.parametrize("outside", ["../secret", "/etc/hostname"])
def test_an_index_that_leads_out_of_its_folder_is_refused(copy, outside):
    file = copy / "release" / ".metadata"
    index = pickle.loads(file.read_bytes())
    index.storage_data = {
        k: replace(info, relative_path=outside) for k, info in index.storage_data.items()
    }
    file.write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        TorchDistCheckpoint(copy)


def test_an_index_whose_chunks_leave_a_hole_is_refused(copy):
    file = copy / "release" / ".metadata"
    index = pickle.loads(file.read_bytes())
    index.state_dict_metadata["decoder.final_layernorm.weight"].chunks.clear()
    file.write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError, match="final_layernorm.*do not make it up"):
        load_model(copy, verify_checkpoint=False)


@pytest.mark.parametrize("place", ["object", "object within an object", "common.pt"])
def test_what_real_runs_save_beside_tensors_is_read(copy, place):
    more = {
        "attention_backend": AttnBackend.auto, "exit_signal": signal.SIGTERM, "dtype": torch.bfloat16,
        "save": Path("somewhere"), "seed": np.int64(3), "scale": np.float32(0.5),
        "rerun_mode": RerunMode.DISABLED, "order": OrderedDict(a=1), "state": np.arange(4, dtype="u4"),
        "device": torch.device("cpu"), "shape": torch.Size((1, 2)), "step": torch.tensor(3.0),
    }  # fmt: skip
    common = with_arguments(copy, **more)
    if place == "common.pt":
        (copy / "release" / "common.pt").write_bytes(saved(common))
    else:
        data = saved([common])
        put_common(copy, saved(io.BytesIO(data)) if "within" in place else data)
    args = TorchDistCheckpoint(copy).common["args"]
    state = more.pop("state")
    assert {name: getattr(args, name) for name in more} == more
    assert np.array_equal(args.state, state)
    loaded = load_model(copy, verify_checkpoint=False).model.state_dict()
    for name, tensor in load_model(MODEL).model.state_dict().items():
        assert tensor is None or torch.equal(tensor, loaded[name])


@pytest.mark.dist
def test_ranks_verify_and_read_a_megatron_checkpoint_together(copy, capsys):
    command = ["generate", str(copy), "--prompt", "def f(", "--max-tokens", "4", "--device", "cpu"]
    assert cli.main(command) == 0
    alone = capsys.readouterr().out

    def two_ranks() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "megatron_dmc.cli.main", *command, "--tensor-parallel-size", "2"],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    together = two_ranks()
    assert (together.returncode, together.stdout) == (0, alone), together.stderr[-2000:]
    flip_a_weight(copy)
    refused_by_all = two_ranks()
    assert refused_by_all.returncode == 2
    assert "its bytes are not those that were saved" in refused_by_all.stderr
