"""Tensor parallel engines over gloo: the tokens and entries of one process, and a rank that dies."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_model_in_engine import VOCAB, random_model, retrofitted

from megatron_dmc import LLM, SamplingParams
from megatron_dmc.checkpoint.hf_folder import write_folder
from megatron_dmc.errors import UnsupportedConfig
from megatron_dmc.models import build_model

WORKER = Path(__file__).with_name("engine_tp_worker.py")


def prompts(count=6):
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(0, VOCAB, (n,), generator=generator).tolist()
        for n in range(3, 3 + 4 * count, 4)
    ]


def launch(folder, size, mode):
    """All ranks' processes, without torchrun's own watch over them."""
    out = folder / f"{mode}-{size}.json"
    Path(f"{out}.prompts").write_text(json.dumps(prompts()))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(size):
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, str(WORKER), str(folder), str(size), str(out), mode]
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    texts = [p.communicate(timeout=400)[0].decode() for p in processes]
    codes = [p.returncode for p in processes]
    result = json.loads(out.read_text()) if out.exists() else None
    return result, codes, "\n".join(t[-3000:] for t in texts)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model of four KV heads in a folder, and what one process does with it."""
    folder = tmp_path_factory.mktemp("tp")
    loaded = random_model(4, dmc=retrofitted(), dtype=torch.float32)
    write_folder(folder, loaded.model.state_dict(), loaded.description)
    params = [
        SamplingParams(temperature=0, max_tokens=12)
        if i % 2
        else SamplingParams(max_tokens=12, seed=i)
        for i in range(6)
    ]
    alone = {}
    for kv_cache_dtype in ("auto", "int8"):
        llm = LLM(
            str(folder), dtype="float64", block_size=4, max_model_len=64, max_num_seqs=4,
            kv_cache_dtype=kv_cache_dtype,
        )  # fmt: skip
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts()], params, use_tqdm=False)
        alone[kv_cache_dtype] = ([o.outputs[0].token_ids for o in outputs], llm.stats())
    return folder, alone


@pytest.mark.dist
@pytest.mark.parametrize(
    "size, mode", [(2, "plenty"), (2, "short-int8"), (2, "cached"), (4, "short")]
)
def test_ranks_together_do_what_one_process_does(saved, size, mode):
    folder, alone = saved
    tokens, stats = alone["int8" if "int8" in mode else "auto"]
    result, codes, text = launch(folder, size, mode)
    assert codes == [0] * size, text
    assert result["tokens"] == tokens
    assert result["in_use"] == 0
    if mode == "cached":
        # the same prompts a second time: all ranks keep and drop the same prefixes
        assert result["hits"] > 0 < result["evicted"]
    else:
        assert result["entries"] == stats.entries_LG


@pytest.mark.dist
def test_a_killed_rank_ends_the_engine_at_once(saved):
    result, codes, text = launch(saved[0], 2, "killed")
    assert codes == [0, -9], text
    assert "rank 0 of 2 lost another rank" in result["error"]
    assert result["seconds"] < 30


def test_what_does_not_divide_is_refused():
    loaded = random_model(4)
    with pytest.raises(
        UnsupportedConfig, match="tensor_parallel_size=4 does not divide .*groups=2"
    ):
        build_model(replace(loaded.description, num_query_groups=2), tensor_parallel_size=4)
    with pytest.raises(UnsupportedConfig, match="torchrun --nproc-per-node 2"):
        LLM(loaded, tensor_parallel_size=2)
