"""Put a report of examples/smollm2 into the documentation.

    python tools/smollm2_page.py smollm2/report

writes docs/smollm2-report.md, docs/pictures/smollm2-overview.svg and smollm2-heads.svg, and docs/results/smollm2.json.
"""

import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs"


def publish(report: Path, docs: Path) -> None:
    text = (report / "README.md").read_text(encoding="utf-8")
    for name in ("overview", "heads"):
        text = text.replace(f"({name}.svg)", f"(pictures/smollm2-{name}.svg)")
        shutil.copyfile(report / f"{name}.svg", docs / "pictures" / f"smollm2-{name}.svg")
    (docs / "smollm2-report.md").write_text(text, encoding="utf-8")
    shutil.copyfile(report / "smollm2.json", docs / "results" / "smollm2.json")


if __name__ == "__main__":
    publish(Path(sys.argv[1]), DOCS)
