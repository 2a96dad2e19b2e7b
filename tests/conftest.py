"""Set-up of all tests: random inputs are the same in every run, so that a test which passes here passes
elsewhere; the named scripts (`tests/engine_machine.py`, `tests/soak`) draw new ones. After the tests
pytest prints each parallel layout with its largest deviation."""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile("repeatable")


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
