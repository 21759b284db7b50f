#!/usr/bin/env bash
# Builds the package from this checkout, installs it into an environment of its own (.venv-demo), and runs the demo.
#
#     ci/demo.sh [ARGUMENT ...]      arguments of `python -m dsv4_kernels demo`, such as --tokens 4096 --json
#
# Needs Python 3.11 or later (python3, or $PYTHON), a C++17 compiler, and the Python package index: no CUDA toolkit, GPU
# or torch. The first run downloads compilers and torch; a later one builds only if the sources have changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ci/environment.sh

environment=.venv-demo
sources=(pyproject.toml CMakeLists.txt README.md LICENSE aot csrc python ci/constraints.txt)

make_environment "$environment"
if ! unchanged "$environment/installed" "${sources[@]}"; then
  echo "demo: building and installing the package; minutes the first time, when pip downloads compilers (1 GB) and torch"
  # -c holds for what is installed; the build environment, which needs no torch, is pip's own.
  "$environment/bin/python" -m pip install -c ci/constraints.txt ".[demo]"
  remember "$environment/installed" "${sources[@]}"
fi
exec "$environment/bin/python" -m dsv4_kernels demo --preset v4-flash "$@"
