"""One file with what docs/results.md's tables and figures are made of, and the tables.

    python examples/experiments/results.py --output experiments --to docs/results/metrics.json
    python examples/experiments/results.py --from docs/results/metrics.json --output experiments --to docs/results/metrics.json
    python examples/experiments/results.py --from docs/results/metrics.json [--table quality ...]
    python examples/experiments/results.py --from docs/results/metrics.json --into docs/results.md

The first gathers what run.py and analyse.py left, the second adds it to what a file has, the third prints Markdown,
the fourth puts it into a page.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from result_data import add, collect, load, save
from result_tables import tables


def fill(page: str, found: dict[str, Callable[[], str]]) -> str:
    """The page with each `<!-- table NAME -->` ... `<!-- end -->` holding its new table.

    Raises:
        KeyError: a table of which there are no figures.
    """

    def table(match: re.Match[str]) -> str:
        return f"{match[1]}\n{found[match[2]]()}\n\n{match[4]}"

    return re.sub(
        r"(<!-- table ([\w-]+) -->\n)((?:(?!<!-- end -->).)*)(<!-- end -->)",
        table,
        page,
        flags=re.DOTALL,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="where the runs are")
    parser.add_argument("--analysis", type=Path, help="default: OUTPUT/analysis")
    parser.add_argument("--to", type=Path, help="write the file")
    parser.add_argument(
        "--from", dest="source", type=Path, help="read the file; with --output, add to what it has"
    )
    parser.add_argument("--table", nargs="+", help="only these")
    parser.add_argument("--into", type=Path, help="a page between whose marks the tables go")
    args = parser.parse_args()
    if args.output is None and args.source is None:
        parser.error("give --output DIR to gather, or --from FILE to read")
    data = load(args.source) if args.source else None
    if args.output:
        found_there = collect(args.output, args.analysis or args.output / "analysis")
        if data is None:
            data = found_there
        else:
            add(data, found_there)
    assert data is not None
    if not data["arms"] and not data["measured"]:
        sys.exit(f"{args.output or args.source}: nothing has been measured there")
    if args.to:
        save(data, args.to)
        print(f"{args.to}: {len(data['arms'])} arms, {args.to.stat().st_size / 1024:.0f} KiB")
        if not args.table:
            return
    found = tables(data)
    if args.into:
        page = args.into.read_text(encoding="utf-8")
        args.into.write_text(fill(page, found), encoding="utf-8")
        return
    if unknown := set(args.table or []) - set(found):
        parser.error(f"--table {' '.join(sorted(unknown))}: there is {', '.join(found)}")
    for name in args.table or found:
        print(f"\n### {name}\n\n{found[name]()}")


if __name__ == "__main__":
    main()
