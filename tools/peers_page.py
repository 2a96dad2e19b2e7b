"""Put the tables of docs/results/peers.json into docs/performance.md, and draw docs/pictures/peers.svg.

    python tools/peers_page.py

`megatron-dmc bench peers --json docs/results/peers.json` measures. tests/docs/test_docs.py fails if the page is out of
date.
"""

import json
from pathlib import Path

from megatron_dmc.bench.peers import report

DOCS = Path(__file__).resolve().parent.parent / "docs"
ROWS = json.loads((DOCS / "results" / "peers.json").read_text())
BEGIN, END = "<!-- table peers -->", "<!-- end -->"


def filled(page: str) -> str:
    """The page with its tables between the marks."""
    before, rest = page.split(BEGIN, 1)
    return f"{before}{BEGIN}\n\n{report.tables(ROWS)}\n\n{END}{rest.split(END, 1)[1]}"


if __name__ == "__main__":
    from megatron_dmc import plotting

    place = DOCS / "performance.md"
    place.write_text(filled(place.read_text()))
    plotting.save_svg(report.figure(ROWS), DOCS / "pictures" / "peers")
