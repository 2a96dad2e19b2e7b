"""Processes of a tensor-parallel engine, each running `engine_tp_worker.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from random_models import VOCAB
from training_runs import free_port

WORKER = Path(__file__).with_name("engine_tp_worker.py")


def prompts(count=6):
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(0, VOCAB, (n,), generator=generator).tolist()
        for n in range(3, 3 + 4 * count, 4)
    ]


def launch(folder, size, mode, *, launcher=True):
    """All ranks' processes, without torchrun's own watch over them; or one, which makes the others."""
    out = folder / f"{mode}-{size}.json"
    Path(f"{out}.prompts").write_text(json.dumps(prompts()))
    port = free_port()
    processes = []
    for rank in range(size if launcher else 1):
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        if launcher:
            env |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        command = [sys.executable, str(WORKER), str(folder), str(size), str(out), mode]
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        )
    texts = [p.communicate(timeout=400)[0].decode() for p in processes]
    codes = [p.returncode for p in processes]
    result = json.loads(out.read_text()) if out.exists() else None
    return result, codes, "\n".join(t[-3000:] for t in texts)
