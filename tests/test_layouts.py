"""Any layout, recompute on or off: the loss, measured CR and every gradient of one process.

Real processes over gloo, Megatron's real schedules, float64 (but for Megatron's cross entropy, which
is computed in float32); the bound is on the largest difference of any gradient element, relative to
the largest element of that gradient.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BOUND = 1e-6
WORKER = Path(__file__).with_name("layout_worker.py")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def run(tmp: Path, name: str, processes: int, *flags: str) -> dict:
    out = tmp / f"{name}.pt"
    root = Path(__file__).parents[1]
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_DEVICE_MAX_CONNECTIONS="1",
                       CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(root))  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}",
         f"--master-port={free_port()}", str(WORKER), "--out", str(out), *flags],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out, weights_only=False)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Per (kv heads, window): weights and the results of one process."""
    made = {}

    def get(kv_heads: int, window: int):
        key = (kv_heads, window)
        if key not in made:
            tmp = tmp_path_factory.mktemp(f"kv{kv_heads}w{window}")
            (tmp / "weights").mkdir()
            flags = ["--weights", str(tmp / "weights"), "--kv-heads", str(kv_heads),
                     "--merge-window", str(window)]  # fmt: skip
            made[key] = (tmp, flags, run(tmp, "single", 1, "--make-weights", *flags))
        return made[key]

    return get


# name: KV heads, processes, merge window, flags of the worker
LAYOUTS = {
    "tp2": (2, 2, 0, ["--tp=2"]),
    "tp2-mha-window": (4, 2, 3, ["--tp=2"]),
    "pp2": (2, 2, 0, ["--pp=2"]),
    "pp2-recompute": (2, 2, 0, ["--pp=2", "--recompute=full"]),
    "tp2-pp2": (2, 4, 0, ["--tp=2", "--pp=2"]),
    "recompute-full": (2, 1, 0, ["--recompute=full"]),
    "recompute-selective": (2, 1, 0, ["--recompute=selective"]),
}


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(single, layout, record_property):
    kv_heads, processes, window, flags = LAYOUTS[layout]
    tmp, base_flags, expected = single(kv_heads, window)
    got = run(tmp, layout, processes, *base_flags, *flags)
    assert len(got["reports"]) == len(expected["reports"]) == 4
    for ours, theirs in zip(got["reports"], expected["reports"], strict=True):
        assert set(ours) == {"lm loss", "compression loss", "target cr", "measured cr"}
        for key in ours:
            torch.testing.assert_close(ours[key], theirs[key], rtol=1e-6, atol=0)
    assert all(r["compression loss"][0] > 0 for r in expected["reports"]), "hinge must be active"
    assert all(r["measured cr"][0] > r["measured cr"][1] for r in expected["reports"])
    assert set(got["gradients"]) == set(expected["gradients"])
    worst = 0.0
    for name, gradient in expected["gradients"].items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        worst = max(worst, (got["gradients"][name] - gradient).abs().max().item() / scale)
    print(f"{layout}: largest relative gradient difference {worst:.1e}")
    record_property("largest_difference", worst)
    assert worst < BOUND
