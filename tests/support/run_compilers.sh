#!/usr/bin/env bash
# The CPU kernels with the compilers of other machines: the oldest GCC, Clang, and GCC for ARM.
#
#     tests/support/run_compilers.sh
#
# Wants Debian or Ubuntu, root for apt-get (unless the compilers are installed), and the environment of
# `make setup` or PYTHON=...; two minutes. Not part of the pytest run.
set -euo pipefail

cd -P "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}

if ! type -P g++-11 clang++ aarch64-linux-gnu-g++ >/dev/null; then
    echo "installing compilers"
    apt-get update -q >/dev/null
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends \
        g++-11 clang g++-aarch64-linux-gnu >/dev/null
fi
"$python" -m pytest -q -rs -m "exhaustive or not exhaustive" tests/ops/test_cpu_compilers.py
