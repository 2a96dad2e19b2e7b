"""The Dockerfile's steps run, and a broken Dockerfile is found out. `tests/support/dockerfile_steps.py` says how, and
builds the CUDA kernels too."""

import stat

import pytest
from dockerfile_steps import ROOT, StepFailed, Steps, tiny_benchmark

DOCKERFILE = (ROOT / "Dockerfile").read_text()
IGNORED = (ROOT / ".dockerignore").read_text()


def test_every_step(tmp_path):
    steps = Steps(tmp_path, DOCKERFILE, IGNORED, MEGATRON_DMC_SKIP_CUDA="1")
    steps.run()
    assert "usage: megatron-dmc" in steps.docker_run()
    rows = {row["cr"]: row for row in tiny_benchmark(steps)["rows"]}
    assert rows[1.0]["measured_cr"] == 1 and rows[4.0]["measured_cr"] > 2.5
    # the installed package ran, not the checkout
    (installed,) = tmp_path.glob("image/lib/python*/site-packages/megatron_dmc")
    assert not (tmp_path / "root/opt/megatron-dmc/megatron_dmc").exists()
    # any user may run it
    assert steps.user not in ("root", "0")
    home = tmp_path / "root/home/megatron-dmc"
    assert stat.S_IMODE(home.stat().st_mode) == 0o1777 and steps.environment["HOME"] == str(home)
    assert all(file.stat().st_mode & stat.S_IROTH for file in installed.rglob("*"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("COPY pyproject.toml", "COPY pyproject.tom", "pyproject.tom"),
        ("constraints.txt tools/", "constraints.txt tools/no/", "not in the build context"),
        ("--extras serve", "--extras no-such-extra", "no-such-extra"),
        ("RUN python container", "RUN python /usr/bin/container", "/usr/bin/container"),
        ("26.02-py3", "latest", "not a release"),
        ("WORKDIR /opt", "HEALTHCHECK /opt", "HEALTHCHECK"),
        (
            "-r requirements-here.txt",
            "-r requirements-elsewhere.txt",
            "requirements-elsewhere.txt",
        ),
    ],
)
def test_a_broken_dockerfile_fails(tmp_path, old, new, message):
    broken = DOCKERFILE.replace(old, new, 1)
    assert broken != DOCKERFILE
    with pytest.raises(StepFailed, match=message):
        Steps(tmp_path, broken, IGNORED, MEGATRON_DMC_SKIP_CUDA="1").run()


def test_sources_that_dockerignore_leaves_out_are_missed(tmp_path):
    steps = Steps(tmp_path, "FROM nvcr.io/nvidia/pytorch:26.02-py3\nCOPY megatron_dmc here\n",
                  IGNORED.replace("!megatron_dmc\n", ""))  # fmt: skip
    with pytest.raises(StepFailed, match=r"\.dockerignore"):
        steps.run()


def test_the_image_gets_sources_and_no_rubbish(tmp_path):
    sources = Steps(tmp_path, "FROM nvcr.io/nvidia/pytorch:26.02-py3\n", IGNORED).sources
    assert {"megatron_dmc/csrc/binding.cpp", "megatron_dmc/cli/main.py", "setup.py"} <= sources
    for file in sources:
        assert not file.startswith((".git", ".venv", "tests", "docs"))
        assert not file.endswith((".so", ".pyc"))
