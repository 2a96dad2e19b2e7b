"""No source file of the package, the examples or the tools has more than 400 lines."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = (".py", ".cu", ".cuh", ".h", ".cpp", ".j2")
MOST_LINES = 400


def test_no_file_has_more_than_400_lines():
    files = [
        file
        for folder in ("megatron_dmc", "examples", "tools")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in SUFFIXES
    ]
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert len(lengths) > 200
    long = {str(file.relative_to(ROOT)): n for file, n in lengths.items() if n > MOST_LINES}
    assert not long, f"split along a seam: {long}"
