"""Hostile Hugging Face folders: one line of error each, soon and without memory; never a traceback."""

import itertools
import json
import os
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_dmc.checkpoint.convert import convert, open_checkpoint
from megatron_dmc.checkpoint.hf_config import from_hf_config
from megatron_dmc.checkpoint.load import build_model
from megatron_dmc.cli import main as cli
from megatron_dmc.errors import CheckpointError, DMCError, UnsupportedConfig

MODEL = Path(__file__).parents[2] / "examples" / "models" / "stdlib-llama-3m"
SIZES = {
    "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 64,
}  # fmt: skip
GOOD = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", **SIZES,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "dtype": "float32",
    "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
    "attention_bias": False, "mlp_bias": False, "rope_scaling": None,
}  # fmt: skip
DMC = {"stage": "finetune", "target_cr": 2.0}
VALUES = [None, "x", "false", [], {}, [1], True, -1, 0, 0.5, 3, 10**5, 10**7, 10**18, 1e39,
          float("nan"), float("inf"), -float("inf")]  # fmt: skip
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    from megatron_dmc.checkpoint.hf_folder import write_folder

    folder = tmp_path_factory.mktemp("good") / "good"
    folder.mkdir()
    description = from_hf_config(GOOD)
    write_folder(folder, build_model(description).state_dict(), description)
    (folder / "config.json").write_text(json.dumps(GOOD))
    return folder


def config_cases() -> Iterator[tuple[str, str]]:
    """(name, text of config.json): each key missing, of every wrong kind and size."""
    for key in GOOD:
        yield f"without {key}", json.dumps({k: v for k, v in GOOD.items() if k != key})
        for value in VALUES:
            yield f"{key}={value!r}", json.dumps(GOOD | {key: value})
    for key in ("dmc", "rope_parameters", "sliding_window", "quantization_config"):
        for value in VALUES:
            yield f"{key}={value!r}", json.dumps(GOOD | {key: value})
    for key, value in itertools.product(
        ("stage", "target_cr", "merge_window", "alpha_offset", "shared_decisions"), VALUES
    ):
        yield f"dmc.{key}={value!r}", json.dumps(GOOD | {"dmc": DMC | {key: value}})
    for key, value in itertools.product(("rope_type", "factor", "rope_theta"), VALUES):
        rope = {"rope_type": "linear", "factor": 2.0} | {key: value}
        yield f"rope.{key}={value!r}", json.dumps(GOOD | {"rope_parameters": rope})
    experts = GOOD | {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
        "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None,
    }  # fmt: skip
    for key, value in itertools.product(
        ("num_local_experts", "num_experts_per_tok", "norm_topk_prob", "num_hidden_layers"), VALUES
    ):
        yield f"experts: {key}={value!r}", json.dumps(experts | {key: value})
    for kind in ("Qwen2", "Qwen3"):
        qwen = GOOD | {"architectures": [f"{kind}ForCausalLM"], "use_sliding_window": True}
        for key, value in itertools.product(("max_window_layers", "layer_types"), VALUES):
            yield f"{kind}: {key}={value!r}", json.dumps(qwen | {key: value})
    for text in ("", "{", "[]", "5", "null", "[" * 10**5, '{"a":' * 10**5, "NaN", "9" * 5000,
                 '{"num_hidden_layers": ' + "9" * 5000 + "}"):  # fmt: skip
        yield f"text {text[:10]!r}", text


def header(entries: dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list, begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def file_cases() -> Iterator[tuple[str, Callable[[Path], Any]]]:
    """(name, what is done to a good folder)."""

    def write(name: str, data: bytes) -> Callable[[Path], Any]:
        return lambda f: (f / name).write_bytes(data)

    yield "config.json: not UTF-8", write("config.json", b"\xff\xfe{}")
    yield "config.json: 5 MB", write("config.json", b" " * 5_000_000 + b"{}")
    yield "config.json: gone", lambda f: (f / "config.json").unlink()
    for name in ("config.json", WEIGHTS):
        yield (
            f"{name}: a directory",
            lambda f, n=name: ((f / n).unlink(), (f / n).mkdir()),
        )
        yield f"{name}: a link to itself", lambda f, n=name: relink(f / n, n)
        yield f"{name}: a link to nothing", lambda f, n=name: relink(f / n, "/no/such/file")
        yield f"{name}: a link to a device", lambda f, n=name: relink(f / n, "/dev/zero")
        yield f"{name}: a pipe", lambda f, n=name: ((f / n).unlink(), os.mkfifo(f / n))
    one = entry([2], 0, 8)
    for name, data in {
        "empty": b"",
        "seven bytes": b"1234567",
        "a header longer than the file": header({}, length=10**6),
        "a header of 2**63 bytes": header({}, length=2**63),
        "a header of 50 MB": header({}, length=50_000_000),
        "no JSON": struct.pack("<Q", 4) + b"abcd",
        "deep JSON": struct.pack("<Q", 10**5) + b"[" * 10**5,
        "a list": struct.pack("<Q", 2) + b"[]",
        "no tensors": header({}),
        "another model's tensor": header({"a": one}, bytes(8)),
        "offsets beyond the end": header({"a": entry([2], 0, 8)}),
        "offsets that fall": header({"a": entry([2], 8, 0)}, bytes(8)),
        "negative offsets": header({"a": entry([2], -8, 0)}, bytes(8)),
        "a shape that the bytes do not hold": header({"a": entry([10**12], 0, 8)}, bytes(8)),
        "a shape that overflows": header({"a": entry([2**40, 2**40], 0, 8)}, bytes(8)),
        "a negative shape": header({"a": entry([-2], 0, 8)}, bytes(8)),
        "an unknown dtype": header({"a": entry([2], 0, 8, "X9")}, bytes(8)),
        "an 8-bit dtype": header({"a": entry([8], 0, 8, "F8_E4M3")}, bytes(8)),
        "whole numbers": header({"a": entry([1], 0, 8, "I64")}, bytes(8)),
        "an entry without offsets": header({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
        "the same name twice": struct.pack("<Q", 123)
        + (f'{{"a":{json.dumps(one)},"a":{json.dumps(one)}}}'.ljust(123)).encode()
        + bytes(8),
        "a GB of nothing": header({"a": entry([2**28], 0, 2**30)}, bytes(8)),
    }.items():
        yield f"weights: {name}", write(WEIGHTS, data)
    yield "weights: cut", lambda f: os.truncate(f / WEIGHTS, (f / WEIGHTS).stat().st_size - 9)
    yield "weights: gone", lambda f: (f / WEIGHTS).unlink()
    yield "weights: pickled", lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin")

    def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], Any]:
        def apply(f: Path) -> None:
            found = load_file(f / WEIGHTS)
            change(found)
            save_file(found, f / WEIGHTS)

        return apply

    norm = "model.norm.weight"
    yield "tensors: one less", tensors(lambda t: t.pop(norm))
    yield "tensors: one more", tensors(lambda t: t.update({"extra": torch.ones(3)}))
    yield "tensors: none", tensors(lambda t: t.clear())
    yield "tensors: a scalar", tensors(lambda t: t.update({norm: torch.tensor(1.0)}))
    yield "tensors: another shape", tensors(lambda t: t.update({norm: torch.ones(2, 16)}))
    yield "tensors: whole numbers", tensors(lambda t: t.update({norm: torch.ones(32).long()}))
    yield (
        "tensors: a third layer",
        tensors(lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(32)})),
    )

    def index(content: Any) -> Callable[[Path], Any]:
        return lambda f: (f / INDEX).write_text(
            content if isinstance(content, str) else json.dumps(content)
        )

    for name, content in {
        "no JSON": "{",
        "deep": "[" * 10**5,
        "a list": [],
        "no map": {},
        "an empty map": {"weight_map": {}},
        "a map that is a list": {"weight_map": ["a"]},
        "a number for a file": {"weight_map": {"a": 5}},
        "no name": {"weight_map": {"a": ""}},
        "a folder": {"weight_map": {"a": "."}},
        "a file that is gone": {"weight_map": {"a": "gone.safetensors"}},
        "a long name": {"weight_map": {"a": "a" * 10**5}},
        "a NUL": {"weight_map": {"a": "a\0b"}},
        "a lone surrogate": {"weight_map": {"a": "\ud800"}},
        "a tensor that is not there": {"weight_map": {"a": WEIGHTS}},
        "out of the folder": {"weight_map": {norm: "../secret/" + WEIGHTS}},
        "out of the folder and back": {"weight_map": {norm: "x/../../good/" + WEIGHTS}},
        "an absolute path": {"weight_map": {norm: "/etc/hostname"}},
    }.items():
        yield f"index: {name}", index(content)

    def twice(f: Path) -> None:
        save_file({norm: torch.zeros(32)}, f / "second.safetensors")
        names = dict.fromkeys(load_file(f / WEIGHTS), WEIGHTS) | {norm: "second.safetensors"}
        (f / INDEX).write_text(json.dumps({"weight_map": names}))

    yield "index: a tensor in two files", twice


def relink(file: Path, target: str) -> None:
    file.unlink()
    file.symlink_to(target)


def outcome(folder: Path) -> str:
    """ "loads", or the one line of the error; any other exception is a failure of the test."""
    try:
        open_checkpoint(folder)
    except DMCError as e:
        assert isinstance(e, ValueError)
        text = " ".join(str(e).split())
        assert text and len(text) < 4000, text[:200]
        text.encode("utf-8", errors="backslashreplace")
        return text
    return "loads"


def test_every_hostile_folder_is_one_line_or_loads(good, tmp_path):
    cases: list[tuple[str, Callable[[Path], Any]]] = [
        (name, lambda f, text=text: (f / "config.json").write_text(text))
        for name, text in config_cases()
    ]
    cases += file_cases()
    assert outcome(good) == "loads"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loads, wrong = [], []
    for name, change in cases:
        folder = tmp_path / "folder"
        shutil.copytree(good, folder)
        change(folder)
        began = time.monotonic()
        try:
            result = outcome(folder)
        except Exception as e:  # noqa: BLE001 -- collected: the list of all of them says more than the first
            wrong.append(f"{name}: {type(e).__name__}: {str(e)[:100]}")
            result = "?"
        if time.monotonic() - began > 1:
            wrong.append(f"{name}: {time.monotonic() - began:.1f} s")
        loads += [name] if result == "loads" else []
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)
    assert len(cases) > 156
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 200, f"{grown:.0f} MB"
    assert sorted(loads) == sorted(HARMLESS)  # and means what it says


_ABSENT = ["architectures", "model_type", "hidden_act", "head_dim", "max_position_embeddings",
           "rope_theta", "dtype", "bos_token_id", "eos_token_id", "pad_token_id",
           "attention_bias", "mlp_bias", "rope_scaling"]  # fmt: skip
_TOKENS = [-1, 0, 3, 10**5, 10**7]  # an id that the model does not have ends nothing
_VALUES: dict[str, list] = {
    "architectures": [[]], "model_type": ["x", "false"], "rope_scaling": [{}],
    "max_position_embeddings": [3, 10**5, 10**7], "rms_norm_eps": [0, 0.5],
    "rope_theta": [3, 10**5, 10**7], "initializer_range": [0, 0.5, 3], "bos_token_id": _TOKENS,
    "eos_token_id": [[], [1], *_TOKENS], "pad_token_id": _TOKENS, "attention_bias": [0], "mlp_bias": [0],
    "dmc": [None, {}], "rope_parameters": [None, {}], "quantization_config": [None],
    "sliding_window": [None, 10**5, 10**7, 10**18], "dmc.target_cr": [3, 10**5, 10**7],
    "dmc.merge_window": [0, 3, 10**5, 10**7], "dmc.alpha_offset": [0.5, 3, 10**5, 10**7],
    "dmc.shared_decisions": [True], "rope.factor": [3, 10**5], "rope.rope_theta": [None, 3, 10**5, 10**7],
}  # fmt: skip
HARMLESS = [
    *(
        f"without {key}"
        for key in (*_ABSENT, "rms_norm_eps", "tie_word_embeddings", "initializer_range")
    ),
    *(f"{key}=None" for key in _ABSENT),
    *(f"{key}={value!r}" for key, values in _VALUES.items() for value in values),
]


def test_one_error_names_every_problem(good, tmp_path):
    folder = tmp_path / "folder"
    shutil.copytree(good, folder)
    wrong = {"rope_theta": float("inf"), "rms_norm_eps": float("nan"), "tie_word_embeddings": "false",
             "num_hidden_layers": 10**7, "hidden_size": "wide", "hidden_act": "gelu", "bos_token_id": "x",
             "dtype": "float8", "rope_scaling": {"rope_type": "yarn"}, "vocab_size": None}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(GOOD | wrong))
    with pytest.raises(UnsupportedConfig) as caught:
        open_checkpoint(folder)
    assert all(name in str(caught.value) for name in wrong)
    assert cli.main(["plan", "--model", str(folder), "--gpus", "8"]) == 2  # reads config.json only


@pytest.mark.alone
def test_10_000_000_experts_or_layers_take_no_time(good, tmp_path):
    for key, value in (("num_hidden_layers", 4096), ("num_hidden_layers", 10**7)):
        (tmp_path / "config.json").write_text(json.dumps(GOOD | {key: value}))
        shutil.copy(good / WEIGHTS, tmp_path / WEIGHTS)
        began = time.monotonic()
        with pytest.raises(ValueError, match=str(value)):
            open_checkpoint(tmp_path)
        assert time.monotonic() - began < 0.5


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_links_out_of_the_folder_are_not_copied(tmp_path, name):
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(MODEL, folder)
    (folder / name).unlink(missing_ok=True)
    (tmp_path / "secret").write_text('{"secret": 1}')
    (folder / name).symlink_to("../secret")
    for to_format in ("megatron", "hf"):
        with pytest.raises(CheckpointError, match=rf"{name}: is a link to .*secret"):
            convert("hf", to_format, folder, out)
        assert not out.exists()


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "a1b2"
    snapshot.mkdir(parents=True)
    shutil.copytree(MODEL, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    convert("hf", "hf", snapshot, tmp_path / "out")
    copied = tmp_path / "out" / "tokenizer_config.json"
    assert copied.read_bytes() == (blobs / copied.name).read_bytes() and not copied.is_symlink()
