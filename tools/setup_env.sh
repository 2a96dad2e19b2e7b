#!/usr/bin/env bash
# Makes .venv with the pinned dependencies and this package in it. A call that finds its work done
# returns at once; a call after an interrupted one resumes where that stopped.
#
#   PYTHON=/path/to/python   use this interpreter (3.12 or 3.13) and look for no other
#   REQUIRE_HASHES=1         install the files of requirements.lock and no others (Python 3.12 on Linux x86-64)
set -euo pipefail
cd -P "$(dirname "$0")/.."

readonly venv=.venv
readonly stamp=$venv/.megatron-dmc-setup

# Variables that would make pip see, or install into, another environment than .venv.
unset PYTHONPATH PYTHONHOME PIP_USER PIP_TARGET PIP_PREFIX __PYVENV_LAUNCHER__
export PIP_DISABLE_PIP_VERSION_CHECK=1

# --- what the set-up depends on ------------------------------------------------------------------

inputs_checksum() {
    {
        echo "$PWD ${PYTHON:-}"
        cat "$venv/pyvenv.cfg" pyproject.toml setup.py constraints.txt ${REQUIRE_HASHES:+requirements.lock}
        if [ -d megatron_dmc/csrc ]; then
            find megatron_dmc/csrc -type f | LC_ALL=C sort | while IFS= read -r file; do
                echo "$file"
                cat "$file"
            done
            echo "${CUDA_HOME:-} ${CUDA_PATH:-} $(command -v nvcc || true)"
            echo "${TORCH_CUDA_ARCH_LIST:-} ${MEGATRON_DMC_SKIP_CUDA:-}"
            echo "${CXX:-} $(command -v c++ || true) ${MEGATRON_DMC_SKIP_CPU:-}"
        fi
    } | cksum
}

if [ -x "$venv/bin/python" ] && [ -f "$stamp" ] && [ -f "$venv/pyvenv.cfg" ] &&
    [ "$(cat "$stamp")" = "$(inputs_checksum)" ]; then
    exit 0
fi

# --- find an interpreter -------------------------------------------------------------------------

# Prints the interpreter behind $1 (for one inside a virtual environment, the one that made that)
# if it runs, can make virtual environments, and is a 3.$2, or any supported version without $2.
usable_python() {
    "$1" -c '
import ensurepip, sys, venv
assert (3, 12) <= sys.version_info < (3, 14)
assert sys.argv[1] in ("", str(sys.version_info.minor))
print(getattr(sys, "_base_executable", None) or sys.executable)
' "${2:-}" </dev/null 2>/dev/null
}

# Prints places where a Python 3.$1 may be, one per line, best first.
candidate_pythons() {
    local pyenv_root=${PYENV_ROOT:-$HOME/.pyenv}
    local uv_root=${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/uv/python}
    type -aP "python3.$1" python3 python || true
    ls -d "$pyenv_root"/versions/3."$1"*/bin/python 2>/dev/null || true
    if command -v uv >/dev/null; then
        UV_PYTHON_DOWNLOADS=never uv python find "3.$1" 2>/dev/null || true
    fi
    ls -d "$uv_root"/cpython-3."$1"*/bin/python3 2>/dev/null || true
    local conda
    for conda in "${CONDA_PREFIX:-}" "$HOME"/{miniconda3,anaconda3,miniforge3,mambaforge} \
        /opt/{conda,miniconda3,anaconda3,miniforge3}; do
        if [ -n "$conda" ]; then
            ls -d "$conda"/bin/python "$conda"/envs/*/bin/python 2>/dev/null || true
        fi
    done
    ls -d /opt/homebrew/bin/python3."$1" /usr/local/bin/python3."$1" 2>/dev/null || true
}

find_python() {
    local minor candidate found
    if [ -n "${PYTHON:-}" ]; then
        usable_python "$PYTHON"
        return
    fi
    for minor in 12 13; do
        while IFS= read -r candidate; do
            if found=$(usable_python "$candidate" "$minor"); then
                echo "$found"
                return
            fi
        done < <(candidate_pythons "$minor")
    done
    return 1
}

if ! python=$(find_python); then
    if [ -n "${PYTHON:-}" ]; then
        echo "PYTHON=$PYTHON is not a working Python 3.12 or 3.13 with venv and pip; name another, or unset PYTHON to search for one." >&2
    else
        echo "Python 3.12 or 3.13 with venv is needed and was not found; install one, for example with 'sudo apt install python3.12-venv', 'pyenv install 3.12', 'uv python install 3.12' or 'brew install python@3.12'." >&2
    fi
    exit 1
fi

# --- make .venv ----------------------------------------------------------------------------------

# Keep what an earlier call installed, unless that .venv is broken, copied here from elsewhere, or of
# another Python.
venv_is_good() {
    [ "$("$venv/bin/python" -c 'import pip, sys; print(sys.prefix, *sys.version_info[:2])' \
        2>/dev/null)" = "$PWD/$venv $("$python" -c 'import sys; print(*sys.version_info[:2])')" ]
}

if ! venv_is_good; then
    echo "Making $venv with $("$python" --version) ($python)"
    "$python" -m venv --clear "$venv"
fi
rm -f "$stamp"

# A package whose installation was interrupted has no RECORD yet; pip would take it for installed.
for info in "$venv"/lib/python3.*/site-packages/*.dist-info; do
    if [ -d "$info" ] && [ ! -f "$info/RECORD" ]; then
        rm -rf "$info"
    fi
done

# --- install -------------------------------------------------------------------------------------

pip_install() {
    local quiet=--quiet
    if [ -t 1 ]; then quiet=; fi # a terminal gets pip's progress bars
    # shellcheck disable=SC2086  # an empty $quiet is no argument
    "$venv/bin/python" -m pip install $quiet --no-input -c constraints.txt "$@" </dev/null
}

echo "Installing dependencies (about 5 GB, a few minutes)…"
start=$SECONDS
# setup.py runs without build isolation, in .venv: it looks there for setuptools and torch.
if [ -n "${REQUIRE_HASHES:-}" ]; then
    "$venv/bin/python" -m pip install --quiet --no-input --require-hashes -r requirements.lock </dev/null
    "$venv/bin/python" -m pip install --quiet --no-input --no-deps --no-build-isolation -e . </dev/null
else
    pip_install setuptools
    if [ -d megatron_dmc/csrc ]; then
        pip_install torch ninja
    fi
    pip_install --no-build-isolation -e '.[dev]'
fi
if [ -d megatron_dmc/csrc ]; then
    # pip swallows what setup.py says about the kernels.
    "$venv/bin/python" setup.py --quiet --version >/dev/null
fi
inputs_checksum >"$stamp"
echo "Set-up done in $((SECONDS - start)) s"
