"""Tensor parallel engines over gloo: the tokens and entries of one process, and a rank that dies."""

import functools
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from engine_tp_worker import TIMEOUT_S
from random_models import random_model, retrofitted
from server_process import MODEL
from tensor_parallel import launch, prompts

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.checkpoint.hf_folder import write_folder
from megatron_dmc.checkpoint.load import build_model
from megatron_dmc.cli.main import main
from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.ops.cpu import absence

DMC = {
    "": retrofitted(),
    "delay": retrofitted(merge_delay=4),
    "dms": retrofitted(policy="evict", eviction_delay=3),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of four KV heads in a folder, and what one process does with it, by the key of `DMC`."""

    @functools.cache
    def of(variant):
        folder = tmp_path_factory.mktemp("tp")
        loaded = random_model(4, dmc=DMC[variant], dtype=torch.float32)
        write_folder(folder, loaded.model.state_dict(), loaded.description)
        done = {name: alone(folder, name) for name in ("auto", "int8")}
        if not variant:
            done["float32"] = alone(folder, "auto", "float32")
        return folder, done

    return of


def alone(folder, kv_cache_dtype, dtype="float64"):
    params = [
        SamplingParams(temperature=0, max_tokens=12)
        if i % 2
        else SamplingParams(max_tokens=12, seed=i)
        for i in range(6)
    ]
    llm = LLM(
        str(folder), dtype=dtype, block_size=4, max_model_len=64, max_num_seqs=4,
        kv_cache_dtype=kv_cache_dtype, device="cpu",
    )  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts()], params, use_tqdm=False)
    return [o.outputs[0].token_ids for o in outputs], llm.stats()


def check(saved, size, mode, **kwargs):
    folder, of_one_process = saved(next((name for name in DMC if name and name in mode), ""))
    named = [name for name in ("int8", "float32") if name in mode]
    tokens, stats = of_one_process[named[0] if named else "auto"]
    result, codes, text = launch(folder, size, mode, **kwargs)
    assert set(codes) == {0}, text
    assert result["tokens"] == tokens
    assert result["in_use"] == 0 and result["alive"] == []
    if not absence():
        assert result["has_own_block"] == ("float32" in mode), (
            "the sums over ranks are in the norms"
        )
    if "cached" in mode:
        # the same prompts a second time: all ranks keep and drop the same prefixes
        assert result["hits"] > 0 < result["reclaimed"]
    else:
        assert result["entries"] == stats.entries_LG
    if "short" in mode and "int8" not in mode or mode == "own":
        assert result["preemptions"] > 0


@pytest.mark.dist
@pytest.mark.parametrize(
    "size, mode",
    [
        pytest.param(2, "plenty", marks=pytest.mark.exhaustive),
        (2, "short-int8"),
        (2, "short-float32"),
        (2, "cached"),
        (2, "cached-delay"),
        (2, "short-delay"),
        (2, "short-dms"),
        (4, "short"),
    ],
)
def test_ranks_together_do_what_one_process_does(saved, size, mode):
    """With few pages: requests are preempted on every rank alike, and computed again. float32: with the block of
    few operators, whose norms add the sums over ranks."""
    check(saved, size, mode)


@pytest.mark.dist
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_processes_of_its_own_do_the_same(saved, size):
    check(saved, size, "own", launcher=False)


@pytest.mark.dist
def test_a_request_that_fails_on_rank_0_ends_on_all(saved):
    """The other rank does not see the failure; both continue with one schedule."""
    result, codes, text = launch(saved("")[0], 2, "failed")
    assert set(codes) == {0}, text
    tokens, _ = saved("")[1]["auto"]
    assert result["errors"].pop(2).endswith("KeyError: 'injected'") and not any(result["errors"])
    assert result["tokens"].pop(2) == tokens[2][:3]
    assert result["tokens"] == tokens[:2] + tokens[3:] and result["in_use"] == 0


@pytest.mark.dist
def test_a_killed_rank_ends_the_engine_at_once(saved):
    result, codes, text = launch(saved("")[0], 2, "killed")
    assert codes == [0, -9], text
    assert "rank 1 does not respond" in result["error"], text
    assert result["seconds"] < 30


@pytest.mark.dist
def test_a_stopped_rank_is_noticed_after_the_timeout(saved):
    result, codes, text = launch(saved("")[0], 2, "stopped", launcher=False)
    assert codes == [0], text
    assert "rank 1 does not respond" in result["error"], text
    assert TIMEOUT_S < result["seconds"] < TIMEOUT_S + 15
    assert result["alive"] == [], "the stopped process is still there"


@pytest.mark.dist
def test_torchrun_runs_the_same_command(tmp_path):
    prompt = "def main():\n"
    llm = LLM(MODEL, dtype="float32", device="cpu", num_pages=512)
    want = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "megatron_dmc.cli.main",
        "generate", str(MODEL), "--prompt", prompt, "--max-tokens", "20", "--dtype", "float32",
        "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(
        [*command, "--tensor-parallel-size", "2"], capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == prompt + want[0].outputs[0].text + "\n"


def test_torchrun_without_the_flag_is_an_error(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in (["serve"], ["generate", "--prompt", "x"]):
        assert main([*command, str(MODEL)]) == 2
        assert "add --tensor-parallel-size 2" in capsys.readouterr().err


def test_what_cannot_be_is_refused_before_there_are_processes(monkeypatch):
    loaded = random_model(4)
    with pytest.raises(
        UnsupportedConfig, match="tensor_parallel_size=4 does not divide .*groups=2"
    ):
        build_model(replace(loaded.description, num_query_groups=2), tensor_parallel_size=4)
    with pytest.raises(UnsupportedConfig, match="a process that has not loaded another model"):
        LLM(MODEL, device="cpu", tensor_parallel_size=2)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    with pytest.raises(UnsupportedConfig, match="a model that is loaded already"):
        LLM(loaded, device="cpu", tensor_parallel_size=2)
    for options, message in (
        ({"tensor_parallel_size": 3}, "tensor_parallel_size=3 does not divide the model's"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0: use a positive whole number"),
        (
            {"tensor_parallel_size": 2, "distributed_timeout_seconds": 0},
            "distributed_timeout_seconds=0",
        ),
        ({"tensor_parallel_size": 2, "tokenizer": lambda: 0}, "give the tokenizer as a path"),
        (
            {"tensor_parallel_size": 2, "device": "cuda:1"},
            "device=cuda:1 with tensor_parallel_size=2",
        ),
    ):
        with pytest.raises(UnsupportedConfig, match=message):
            LLM(MODEL, **{"device": "cpu"} | options)
    if torch.cuda.device_count() < 2:
        with pytest.raises(UnsupportedConfig, match="this machine has . GPUs"):
            LLM(MODEL, device="cuda", tensor_parallel_size=2)
