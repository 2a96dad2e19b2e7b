"""README and tutorials: links resolve, badges match pyproject.toml, command blocks are shell that names existing files.

`run_tutorials.py` runs the commands of the tutorials."""

import json
import os
import re
import runpy
import subprocess
import sys
import tomllib

import pytest
from run_tutorials import ROOT, TUTORIALS, blocks, script

README = (ROOT / "README.md").read_text()
PAGES = sorted(page.stem for page in TUTORIALS.glob("*.md"))


def test_links_of_the_readme():
    targets = re.findall(r"\]\(([^)#]+)", README)
    local = [target for target in targets if not target.startswith("https://")]
    assert len(local) > 10
    assert not [target for target in local if not (ROOT / target).exists()]


def test_links_of_the_site(tmp_path):
    """mkdocs refuses links and anchors that its pages lack; its anchors are not quite GitHub's."""
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "site" / "index.html").is_file()


def test_files_that_pages_name():
    """Paths in backticks are relative to the repository, the package or tests/."""
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    named = [
        (page.name, path)
        for page in pages
        for path in re.findall(r"`([a-z_]+/[\w/]+\.(?:py|h|cu|cpp|sh|toml|md))`", page.read_text())
    ]
    homes = (ROOT, ROOT / "megatron_dmc", ROOT / "tests", ROOT / "megatron_dmc" / "csrc")
    assert len(named) > 50
    assert not [item for item in named if not any((home / item[1]).is_file() for home in homes)]


def test_badges():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    said = dict(
        re.findall(r"badge/([\w-]+?)-((?:[^-)]|--)+)-\w+\)", README.replace("megatron--", ""))
    )
    assert said["license"].replace("--", "-") == project["license"]
    requires = dict(re.findall(r"^(torch|megatron-core)==([\d.]+?)(?:\.\*)?$",
                               "\n".join(project["dependencies"]), flags=re.MULTILINE))  # fmt: skip
    assert said["torch"] == requires["torch"] and said["core"] == requires["megatron-core"]
    pythons = [c.rsplit(" ", 1)[1] for c in project["classifiers"] if ":: Python :: " in c]
    assert said["python"] == "%20%7C%20".join(pythons)
    status = next(c for c in project["classifiers"] if c.startswith("Development Status"))
    assert said["status"] == status.rsplit(" ", 1)[1].lower()


@pytest.mark.parametrize("page", PAGES)
def test_tutorial_is_shell(page):
    assert len(blocks(TUTORIALS / f"{page}.md")) >= 5
    text = script(TUTORIALS / f"{page}.md")
    checked = subprocess.run(["bash", "-n", "-c", text], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    named = set(re.findall(r"\b(?:tools|examples|tests|megatron_dmc)/[\w/.-]+", text))
    assert named and not [name for name in named if not (ROOT / name).exists()]


def test_pages_of_settings_are_up_to_date():
    """`python tools/settings_pages.py` writes them."""
    pages = runpy.run_path(str(ROOT / "tools/settings_pages.py"))["PAGES"]
    assert [
        name for name, page in pages.items() if (ROOT / "docs" / name).read_text() != page()
    ] == []


def test_tables_of_the_performance_page():
    """They are those of docs/results/peers.json: `python tools/peers_page.py` writes them."""
    filled = runpy.run_path(str(ROOT / "tools/peers_page.py"))["filled"]
    page = (ROOT / "docs/performance.md").read_text()
    assert filled(page) == page and page.count("(float32)") > 5


def test_figures_of_smollm2():
    """Those of the page, the results and the README are docs/results/smollm2.json's, as `tools/smollm2_page.py` brought
    them."""
    found = json.loads((ROOT / "docs/results/smollm2.json").read_text())
    page, results, readme = (
        (ROOT / name).read_text() for name in ("docs/smollm2.md", "docs/results.md", "README.md")
    )
    lengths = (("perplexity", "control_perplexity"), ("long_perplexity", "control_long_perplexity"))
    for target in found["targets"].values():
        for name, control in lengths:
            loss = f"{100 * (target[name] / found[control] - 1):.1f} %"
            assert loss in readme and loss in results
            assert f"{target[name]:.2f}" in page and f"+{loss}" in page
        assert f"CR {target['measured_cr']:.2f}" in readme
        assert f"| {target['measured_cr']:.2f} | {target['cache_cr']:.2f} |" in page
    assert (ROOT / "docs/smollm2-report.md").stat().st_size < 2_000_000


def test_tables_of_the_results_page(tmp_path):
    """They are those of docs/results/metrics.json, and say so of every measured group."""
    page = ROOT / "docs/results.md"
    again = tmp_path / "results.md"
    again.write_text(page.read_text())
    command = [sys.executable, "examples/experiments/results.py", "--from", "docs/results/metrics.json",
               "--into", str(again)]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True)
    assert again.read_text() == page.read_text()
    arms = json.loads((ROOT / "docs/results/metrics.json").read_text())["arms"].values()
    on_page = set(re.findall("<!-- table (.*) -->", page.read_text()))
    assert {entry["arm"]["group"] for entry in arms} <= on_page
