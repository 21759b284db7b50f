#!/usr/bin/env bash
# Compiles the library once, for the wheels of every Python to reuse (DSV4_NATIVE_DIR):
#
#     ci/native.sh OUT        leaves the package's folder in OUT/dsv4_kernels
#
# Needs Python 3.11 or later ($PYTHON or python3), a C++17 compiler, and the Python package index.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ci/environment.sh

out=$(realpath -m "${1:?usage: ci/native.sh OUT}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
make_environment "$work/environment"
"$work/environment/bin/python" ci/pins.py build >"$work/requirements.txt"
"$work/environment/bin/python" -m pip install --quiet -r "$work/requirements.txt"
PATH=$work/environment/bin:$PATH "$work/environment/bin/python" -m pip wheel . --no-build-isolation --no-deps --quiet \
  --wheel-dir "$work" --config-settings "build-dir=$work/build"
rm -rf "$out/dsv4_kernels"
"$work/environment/bin/python" -m zipfile -e "$work"/*.whl "$out"
