#!/usr/bin/env bash
# Write requirements.lock: every package that `make setup` installs, at the versions of constraints.txt, with the
# SHA-256 of its files, for CPython 3.12 on Linux x86-64. Run it after constraints.txt has changed; it needs uv
# (pip install uv) and reads the package index that is configured, whose address the file does not name.
set -euo pipefail
cd -P "$(dirname "$0")/.."

{
    echo "# CPython 3.12 on Linux x86-64: pip install --require-hashes -r requirements.lock"
    echo "# Made by tools/lock_requirements.sh from pyproject.toml and constraints.txt; do not edit."
    echo ninja | "${UV:-uv}" pip compile --quiet pyproject.toml - --extra dev --constraint constraints.txt \
        --python-version 3.12 --python-platform x86_64-manylinux_2_28 --generate-hashes \
        --no-header --no-annotate --no-emit-index-url --no-emit-find-links
} >requirements.lock.part
mv requirements.lock.part requirements.lock
