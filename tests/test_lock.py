"""requirements.lock: hashes of everything, at the versions that are tested, from nowhere in particular."""

import re
import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from run_tutorials import ROOT

LOCK = (ROOT / "requirements.lock").read_text()


def pins(text: str) -> dict[str, str]:
    lines = re.findall(r"^([\w.-]+)==([^\s;\\]+)", text, flags=re.MULTILINE)
    return {canonicalize_name(name): version for name, version in lines}


def test_every_locked_package_has_hashes_and_no_address():
    entries = re.split(r"\n(?=\w)", LOCK.split("\n", 2)[2].strip())
    assert len(entries) == len(pins(LOCK)) > 100
    for entry in entries:
        head, *rest = entry.replace("\\\n", "\n").splitlines()
        assert re.match(r"[\w.-]+==", head) and rest, entry
        assert all(re.fullmatch(r" +--hash=sha256:[0-9a-f]{64} *", line) for line in rest), entry
    assert not re.search(r"https?://|file:|--(index|extra|find|trusted)", LOCK)


def test_locked_versions_are_those_of_the_constraints():
    constraints = pins((ROOT / "constraints.txt").read_text())
    assert {name: constraints.get(name) for name in pins(LOCK)} == pins(LOCK)


def test_all_that_the_project_asks_for_is_locked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras, wanted, seen = project["optional-dependencies"], [*project["dependencies"]], {"dev"}
    queue = [*extras["dev"]]
    while queue:
        requirement = Requirement(queue.pop())
        if canonicalize_name(requirement.name) != project["name"]:
            wanted.append(str(requirement))
        else:
            queue += [r for e in requirement.extras - seen for r in extras[e]]
            seen |= requirement.extras
    locked = pins(LOCK)
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(locked[canonicalize_name(requirement.name)]), (
            requirement
        )


def test_the_audit_is_scheduled_and_reads_the_lock():
    text = (ROOT / ".github" / "workflows" / "audit.yml").read_text()
    assert re.search(r"schedule:\n\s+- cron: \"[\d ]+\* \* \d\"", text)
    assert "--require-hashes --requirement requirements.lock" in text
