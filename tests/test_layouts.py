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
    """Per variant of the model: its weights, and the results of one process."""
    made: dict[tuple, tuple[Path, list[str], dict]] = {}

    def get(variant: list[str]):
        key = tuple(variant)
        if key not in made:
            tmp = tmp_path_factory.mktemp("variant")
            (tmp / "weights").mkdir()
            flags = ["--weights", str(tmp / "weights"), *variant]
            made[key] = (tmp, flags, run(tmp, "single", 1, "--make-weights", *flags))
        return made[key]

    return get


MHA_WINDOW = ["--kv-heads=4", "--merge-window=3"]
TIED = ["--tied"]

# name: processes, flags of the layout, flags of the model
LAYOUTS: dict[str, tuple[int, list[str], list[str]]] = {
    "recompute-full": (1, ["--recompute=full"], []),
    "recompute-selective": (1, ["--recompute=selective"], []),
    "tp2": (2, ["--tp=2"], []),
    "tp2-sp-mha-window": (2, ["--tp=2", "--sp"], MHA_WINDOW),
    "pp2-recompute": (2, ["--pp=2", "--recompute=full"], []),
    "pp2-vp2-tied": (2, ["--pp=2", "--vp=2"], TIED),
    "dp2-distributed-optimizer-overlap": (
        2, ["--distributed-optimizer", "--overlap-grad-reduce"], []),
    "cp2": (2, ["--cp=2"], []),
    "cp2-mha-window-recompute": (2, ["--cp=2", "--recompute=selective"], MHA_WINDOW),
    "cp2-zero-out": (2, ["--cp=2"], ["--stage=zero-out"]),
    "cp2-per-token-loss": (2, ["--cp=2", "--per-token-loss"], []),
    "cp2-packed": (2, ["--cp=2"], ["--packed"]),
    "pp2-packed-window": (2, ["--pp=2"], ["--packed", *MHA_WINDOW]),
    "tp2-sp-moe": (2, ["--tp=2", "--sp"], ["--moe"]),
    "tp2-sp-qk-norm-partial-rotary": (
        2, ["--tp=2", "--sp"], ["--qk-norm", "--rotary-percent=0.5"]),
    "pp2-rope-scaling-one-kv-head": (2, ["--pp=2"], ["--rope-scaling", "--kv-heads=1"]),
    "tp2-shared-decisions": (2, ["--tp=2"], ["--shared-decisions"]),
    "tp2-pp2": (4, ["--tp=2", "--pp=2"], []),
    "tp2-pp2-vp2-dp2-sp-tied": (
        8, ["--tp=2", "--pp=2", "--vp=2", "--sp", "--distributed-optimizer",
            "--overlap-grad-reduce"], TIED),
    "tp2-pp2-cp2-sp-recompute": (
        8, ["--tp=2", "--pp=2", "--cp=2", "--sp", "--recompute=full"], []),
}  # fmt: skip


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_one_process(single, layout, record_property):
    processes, flags, variant = LAYOUTS[layout]
    tmp, base_flags, expected = single(variant)
    got = run(tmp, layout, processes, *base_flags, *flags)
    compresses = "--stage=zero-out" not in variant
    if compresses:
        assert expected["reports"]["compression loss"] > 0, "the hinge must be active"
        assert expected["reports"]["measured cr"] > 1
    assert ("compression loss" in got["reports"]) == compresses
    assert got["reports"] == pytest.approx(expected["reports"], rel=1e-6, abs=0)
    assert set(got["gradients"]) == set(expected["gradients"])
    worst = 0.0
    for name, gradient in expected["gradients"].items():
        scale = gradient.abs().max().item()
        assert scale > 0, name
        worst = max(worst, (got["gradients"][name] - gradient).abs().max().item() / scale)
    print(f"{layout}: largest relative gradient difference {worst:.1e}")
    record_property("largest_difference", worst)
    assert worst < BOUND
