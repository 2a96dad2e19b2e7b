"""Set-up of all tests: random inputs are the same in every run, so that a test which passes here passes
elsewhere; the named scripts (`tests/support/engine_machine.py`, `tests/soak`) draw new ones. After the tests
pytest prints each parallel layout with its largest deviation."""

import sys

import pytest
from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile("repeatable")


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
