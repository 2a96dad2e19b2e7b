"""Sizes that no engine can have are refused at once, before a model is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from megatron_dmc import LLM
from megatron_dmc.checkpoint.convert import open_checkpoint
from megatron_dmc.cli import main as cli
from megatron_dmc.engine.config import EngineConfig
from megatron_dmc.engine.sizes import resolve_sizes, table_bytes
from megatron_dmc.errors import UnsupportedConfig

MODEL = Path(__file__).parents[2] / "examples" / "models" / "stdlib-llama-3m"


@pytest.fixture
def no_loading(monkeypatch):
    def load(*args, **options):
        raise AssertionError("the weights were read")

    monkeypatch.setattr("megatron_dmc.checkpoint.load.read_weights", load)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--num-pages", 10**12),
        ("--num-pages", 10**9),
        ("--num-pages", 0),
        ("--num-pages", 3),  # less than a token needs
        ("--kv-cache-memory-bytes", 10**18),
        ("--kv-cache-memory-bytes", -1),
        ("--kv-cache-memory-bytes", 2**45),
        ("--max-model-len", 10**12),
        ("--max-model-len", 0),
        ("--max-model-len", 513),
        ("--max-num-seqs", 10**9),
        ("--max-num-seqs", 0),
        ("--max-num-batched-tokens", 10**12),
        ("--max-num-batched-tokens", -5),
        ("--block-size", 10**9),
        ("--block-size", 0),
        ("--gpu-memory-utilization", 7),
        ("--gpu-memory-utilization", "nan"),
        ("--gpu-memory-utilization", 0),
        ("--prefix-block-size", 0),
        ("--tensor-parallel-size", 10**9),
        ("--cudagraph-capture-sizes", 0),
    ],
)
def test_serve_refuses_sizes_before_it_loads(flag, value, capsys, no_loading):
    assert cli.main(["serve", str(MODEL), "--port", "0", flag, str(value)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("megatron-dmc: error:")
    name = flag.removeprefix("--").replace("-", "_")
    assert name in error and str(value) in error, error


def test_what_all_sizes_ask_for_together_is_compared_with_the_memory(tmp_path, no_loading):
    shutil.copytree(MODEL, tmp_path / "long")
    config = json.loads((MODEL / "config.json").read_text())
    (tmp_path / "long" / "config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 2**31 - 1})
    )
    with pytest.raises(UnsupportedConfig, match="max_model_len=2147483647 .*lower max_num_seqs or"):
        LLM(str(tmp_path / "long"))
    with pytest.raises(AssertionError, match="the weights were read"):  # this one fits
        LLM(str(tmp_path / "long"), max_model_len=1000)


def test_a_device_that_is_not_there(capsys, no_loading):
    assert cli.main(["generate", str(MODEL), "--prompt", "x", "--device", "cuda:99"]) == 2
    assert "device=cuda:99: this machine has" in capsys.readouterr().err


def test_default_number_of_requests():
    """256; down to 64 by the memory of the tables; no more than the pages hold a token of; at least one."""
    description, _, _ = open_checkpoint(MODEL)
    heads = 4 * 8

    def of(**settings):
        config = EngineConfig(**settings)
        sizes = resolve_sizes(
            config, description, dtype=torch.float32, device=torch.device("cpu"), parallel=None
        )
        return sizes.max_num_seqs, sizes.num_pages

    assert of() == (256, 256 * heads * 32)
    assert of(max_num_seqs=3) == (3, 3 * heads * 32)
    assert of(num_pages=100 * heads + 5) == (100, 100 * heads + 5)
    assert of(num_pages=heads) == (1, heads)
    tables = table_bytes(description, EngineConfig(block_size=1), 512, 1)
    for most, expected in ((7, 64), (90, 90), (300, 256)):
        found, _ = of(block_size=1, kv_cache_memory_bytes=32 * most * tables)
        assert found == expected
