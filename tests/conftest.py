"""Set-up of all tests: random inputs are the same in every run, so that a test which passes here passes
elsewhere; the named scripts (`tests/support/engine_machine.py`, `tests/soak`) draw new ones. After the tests
pytest prints each parallel layout with its largest deviation."""

import fcntl
import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # the workers share the cores; torch is imported later and reads this
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.hookimpl(wrapper=True, tryfirst=True)  # before pytest-timeout starts its clock
def pytest_runtest_protocol(item):
    """A test marked `alone` runs while no other worker of pytest-xdist runs one."""
    if not hasattr(item.config, "workerinput"):
        return (yield)
    lock = fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH
    folder = Path(item.config.option.basetemp).parent  # all workers' folders lie in it
    with open(folder / "gate.lock", "w") as gate, open(folder / "turn.lock", "w") as turn:
        fcntl.flock(gate, fcntl.LOCK_EX)  # a waiting `alone` test keeps others from starting
        fcntl.flock(turn, lock)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(turn, fcntl.LOCK_UN)  # a forked child holds the file open


@pytest.fixture
def remote_modules(tmp_path, monkeypatch):
    """transformers copies the code of models that it loads; here into the test's own folder."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "modules")])
    yield
    for name in [n for n in sys.modules if n.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


def pytest_terminal_summary(terminalreporter):
    lines = [
        value
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        for name, value in report.user_properties
        if name == "layout"
    ]
    if lines:
        terminalreporter.section("layouts: largest relative difference from one process")
        for line in lines:
            terminalreporter.write_line(line)
