"""Installing into a container that brings its own PyTorch: its packages keep their versions, the rest get ours.

    container_constraints.py constraints.txt pyproject.toml --extras serve,report \
        --write constraints-here.txt --requirements requirements-here.txt
    container_constraints.py --check constraints-here.txt

The first writes the requirements that are not installed yet, and a constraints file: what NVIDIA builds or
builds against (a local version, torch, triton, numpy, CUDA's libraries) stays as it is; other packages that are
installed get no older; the rest get the versions of constraints.txt. The second fails if that was not kept, or
if the package has no CUDA kernels (unless MEGATRON_DMC_SKIP_CUDA is set). Standard library and `packaging`
only: it runs before anything is installed.
"""

import argparse
import os
import sys
import tomllib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OURS = "megatron-dmc"
KEPT = ("torch", "triton", "numpy", "nvidia-", "cuda-")
"""Beginnings of names whose installed versions stay."""


def installed() -> dict[str, str]:
    """Canonical names and versions of what this interpreter can import."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        if distribution.metadata["Name"]:
            # the first on the path is the one that is imported
            name = canonicalize_name(distribution.metadata["Name"])
            found.setdefault(name, distribution.version)
    return found


def pins(path: Path) -> list[Requirement]:
    """The lines of a constraints file."""
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def requirements(pyproject: Path, extras: list[str]) -> list[Requirement]:
    """Requirements of the package and some of its extras.

    Raises:
        SystemExit: for an extra that does not exist.
    """
    project = tomllib.loads(pyproject.read_text())["project"]
    known = project["optional-dependencies"]
    if unknown := set(extras) - known.keys():
        sys.exit(f"--extras {','.join(sorted(unknown))}: use some of {', '.join(known)}")
    lines = [*project["dependencies"], *(line for extra in extras for line in known[extra])]
    return [r for r in map(Requirement, lines) if not r.marker or r.marker.evaluate()]


def write(args: argparse.Namespace) -> None:
    """Both files."""
    here = installed()
    wanted = requirements(Path(args.pyproject), [e for e in args.extras.split(",") if e])
    missing = [r for r in wanted if canonicalize_name(r.name) not in here]
    wrong = [
        f"{r.name} {here[canonicalize_name(r.name)]}, {r} is wanted"
        for r in wanted
        if canonicalize_name(r.name) in here
        and not r.specifier.contains(here[canonicalize_name(r.name)], prereleases=True)
        and canonicalize_name(r.name) != "setuptools"  # torch's wish, for its own compiler
    ]
    if wrong:
        sys.exit("this image does not fit: " + "; ".join(wrong))
    names = {canonicalize_name(r.name) for r in pins(Path(args.constraints))}
    kept = {
        name: f"{name}{'==' if '+' in version or name.startswith(KEPT) else '>='}{version}"
        for name, version in here.items()
        if name != OURS
    }
    ours = {
        canonicalize_name(r.name): str(r)
        for r in pins(Path(args.constraints))
        if canonicalize_name(r.name) not in here
    }
    Path(args.write).write_text("\n".join(sorted({**ours, **kept}.values())) + "\n")
    Path(args.requirements).write_text("".join(f"{r}\n" for r in missing))
    print(
        f"{len(names & kept.keys())} of {len(names)} pinned packages are in the image, among them torch "
        f"{here.get('torch')}; {len(missing)} requirements to install"
    )


def check(path: Path) -> None:
    """Every version of the file that is installed is the one of the file.

    Raises:
        SystemExit: with those that differ.
    """
    here = installed()
    changed = []
    for pin in pins(path):
        name = canonicalize_name(pin.name)
        if name in here and not pin.specifier.contains(here[name], prereleases=True):
            changed.append(f"{name} {here[name]} instead of {pin.specifier}")
    if OURS not in here:
        changed.append(f"{OURS} is not installed")
    elif not os.environ.get("MEGATRON_DMC_SKIP_CUDA") and not find_spec("megatron_dmc._C"):
        changed.append(f"{OURS} has no CUDA kernels")
    if changed:
        sys.exit("not as it was before: " + "; ".join(changed))
    print(f"torch {here.get('torch')} and the image's other packages are as they were")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("constraints", nargs="?")
    parser.add_argument("pyproject", nargs="?")
    parser.add_argument("--extras", default="")
    parser.add_argument("--write", metavar="FILE")
    parser.add_argument("--requirements", metavar="FILE")
    parser.add_argument("--check", metavar="FILE")
    args = parser.parse_args()
    if args.check:
        check(Path(args.check))
    elif args.constraints and args.pyproject and args.write and args.requirements:
        write(args)
    else:
        parser.error("give --check FILE, or both files to read and both to write")


if __name__ == "__main__":
    main()
