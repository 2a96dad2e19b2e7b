"""What pytest prints after the tests: each parallel layout with its largest deviation."""


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
