"""Follows a tutorial word by word: every block of commands in it, in one shell, in a fresh clone.

    python tests/support/run_tutorials.py [retrofit] [serve] [research] [--clone DIR]

Stops at the first command that fails. `make setup` in the clone makes its own environment.
"""

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = ROOT / "docs" / "tutorials"


def blocks(page: Path) -> list[str]:
    """The page's `sh` blocks, in order."""
    return re.findall(r"^```sh\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def script(page: Path) -> str:
    """A bash script of all blocks, which shows each before it runs."""
    shown = []
    for block in blocks(page):
        quoted = block.replace("'", "'\\''")
        shown.append(f"printf '%s' '{quoted}' | sed 's/^/$ /'\n{block}")
    return "set -euo pipefail\n" + "\n".join(shown)


def main() -> None:
    names = sorted(page.stem for page in TUTORIALS.glob("*.md"))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "name", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; default: all"
    )
    parser.add_argument(
        "--clone", type=Path, help="clone the last commit there and run it there; default: run here"
    )
    args = parser.parse_args()
    if unknown := set(args.name) - set(names):
        parser.error(f"no tutorial {' '.join(sorted(unknown))} in {TUTORIALS}")
    place = ROOT
    if args.clone:
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(args.clone)], check=True)
        place = args.clone
    for name in args.name or names:
        began = time.monotonic()
        code = subprocess.run(
            ["bash", "-c", script(TUTORIALS / f"{name}.md")], cwd=place
        ).returncode
        print(
            f"{name}: {'ok' if not code else f'ended with {code}'}, {time.monotonic() - began:.0f} s"
        )
        if code:
            sys.exit(1)


if __name__ == "__main__":
    main()
