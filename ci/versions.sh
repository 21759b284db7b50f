#!/usr/bin/env bash
# Tests another Python or torch on a library that is built already:
#
#     ci/versions.sh BUILT TORCH       for example: PYTHON=python3.13 ci/versions.sh built 'torch==2.10.*'
#
# BUILT holds a wheel of these sources, made with any Python, and ptx/, which its build left in build/<tag>/images.
# Compiles the binding for $PYTHON (python3), installs it with that torch into .venv-version, and runs the representative
# set but for the tests of the build and the wheel.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

built=$(realpath "${1:?usage: ci/versions.sh BUILT TORCH}")
torch=${2:?usage: ci/versions.sh BUILT TORCH}
environment=$PWD/.venv-version
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

rm -rf "$environment"
"${PYTHON:-python3}" -m venv "$environment"
export PATH=$environment/bin:$PATH
python ci/pins.py binding >"$work/requirements.txt"
python -m pip install --quiet -r "$work/requirements.txt"
python -m zipfile -e "$built"/*.whl "$work/built"
python -m pip wheel . --no-build-isolation --no-deps --quiet --wheel-dir "$work" \
  --config-settings "build-dir=$work/cmake" --config-settings "cmake.define.DSV4_NATIVE_DIR=$work/built/dsv4_kernels"
python -m pip install --quiet "$torch" "$(echo "$work"/*.whl)[test]"
python -c 'import platform, torch; print("versions: Python", platform.python_version(), "torch", torch.__version__)'
DSV4_TEST_PTX=$built/ptx pytest --representative -n "$(nproc)" tests --ignore tests/package --ignore tests/cpp
