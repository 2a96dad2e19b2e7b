"""A killed run resumes bitwise: kill -9, another layout, damaged files, full disk."""

import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from training_runs import Forked, logged

STEPS = 8
TRAIN = [
    *("--dmc-stage", "retrofit", "--dmc-target-cr", "3", "--train-iters", str(STEPS)),
    *("--save-interval", "2", "--ckpt-format", "torch_dist", "--lr-decay-style", "linear"),
]


def to(folder: Path) -> list[str]:
    return ["--load", str(folder), "--save", str(folder)]


def by_step(output: str) -> dict[int, str]:
    """Everything that the log says of a step, but its time."""
    lines = re.findall(r" iteration +(\d+)/.*?(learning rate:.*?number of nan[^\n]*)", output)
    return {int(step): rest for step, rest in lines}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from megatron_dmc.checkpoint.load import load_model

    return load_model(folder).model.state_dict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, str]:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    done = Forked(*TRAIN, *to(folder)).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    """The folder left by a run that SIGKILL ended during its sixth step."""
    folder = tmp_path_factory.mktemp("killed")
    run = Forked(*TRAIN, *to(folder))
    end = time.monotonic() + 300
    while not re.search(r" iteration +5/", run.stdout.read_text() if run.stdout.exists() else ""):
        assert run.ranks[0].is_alive() and time.monotonic() < end, run.stderr.read_text()[-3000:]
        time.sleep(0.005)
    run.kill()
    assert run.ranks[0].exitcode == -signal.SIGKILL
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "4"
    return folder


@pytest.mark.dist
def test_killed_and_started_again_is_bitwise_the_same(whole, killed, tmp_path):
    reference, log = whole
    folder = tmp_path / "again"
    shutil.copytree(killed, folder)
    done = Forked(*TRAIN, *to(folder)).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    expected, got = by_step(log), by_step(done.stdout)
    # the console averages the first two steps of a process
    assert sorted(got) == [5, 6, 7, 8]
    assert {i: got[i] for i in (7, 8)} == {i: expected[i] for i in (7, 8)}
    ours = weights(folder)
    for name, tensor in weights(reference).items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(ours[name], tensor), name


@pytest.mark.dist
@pytest.mark.parametrize(
    "flags", [["--tensor-model-parallel-size", "2"], ["--pipeline-model-parallel-size", "2"], []],
    ids=["tp2", "pp2", "dp2"],
)  # fmt: skip
def test_goes_on_in_another_layout(whole, killed, tmp_path, flags):
    reference, log = whole
    folder = tmp_path / "again"
    shutil.copytree(killed, folder)
    done = Forked(*TRAIN, *to(folder), *flags, processes=2).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("lm loss", "compression loss", "target cr", "measured cr"):
        assert logged(done.stdout, name)[-2:] == pytest.approx(
            logged(log, name)[-2:], rel=2e-4, abs=1e-5
        )


@pytest.mark.dist
@pytest.mark.parametrize("damage", ["truncated", "missing", "metadata", "flipped bit"])
def test_a_damaged_newest_checkpoint_is_passed_over(whole, killed, tmp_path, damage):
    reference, log = whole
    folder = tmp_path / "again"
    shutil.copytree(killed, folder)
    newest = folder / "iter_0000004"
    part = max(newest.glob("*.distcp"), key=lambda f: f.stat().st_size)
    if damage == "truncated":
        os.truncate(part, part.stat().st_size // 2)
    elif damage == "missing":
        part.unlink()
    elif damage == "flipped bit":
        with open(part, "r+b") as file:
            file.seek(part.stat().st_size // 2)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 4]))
    else:
        (newest / ".metadata").write_bytes(b"not a pickle")
    done = Forked(*TRAIN, *to(folder)).wait()
    assert done.returncode == 0, done.stderr[-3000:]
    warning = next(line for line in done.stderr.splitlines() if "damaged" in line)
    assert "iter_0000004" in warning and "iteration 2" in warning
    expected, got = by_step(log), by_step(done.stdout)
    assert sorted(got) == [3, 4, 5, 6, 7, 8]
    assert {i: got[i] for i in (5, 6, 7, 8)} == {i: expected[i] for i in (5, 6, 7, 8)}


@contextmanager
def small_disk(folder, size):
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=False,
        capture_output=True,
    )  # fmt: skip
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def bytes_in(folder):
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def assert_says_that_the_disk_is_full(done):
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if "error: --save" in line]
    assert len(errors) == 1 and "no space left" in errors[0], done.stderr[-3000:]


@pytest.mark.dist
def test_a_full_disk_leaves_the_older_checkpoint_usable(killed, tmp_path):
    with small_disk(tmp_path / "disk", bytes_in(killed) + 300_000) as disk:
        folder = disk / "run"
        shutil.copytree(killed, folder)
        assert_says_that_the_disk_is_full(Forked(*TRAIN, *to(folder)).wait())
        assert (folder / "latest_checkpointed_iteration.txt").read_text() == "4"
        shutil.copytree(folder, tmp_path / "more room")
    again = Forked(*TRAIN, *to(tmp_path / "more room")).wait()
    assert again.returncode == 0, again.stderr[-3000:]
    assert max(by_step(again.stdout)) == STEPS


@pytest.mark.dist
def test_a_disk_without_room_for_the_first_checkpoint(killed, tmp_path):
    size = bytes_in(killed / "iter_0000004") * 3 // 4
    with small_disk(tmp_path / "disk", size) as disk:
        assert_says_that_the_disk_is_full(Forked(*TRAIN, *to(disk / "run")).wait())
