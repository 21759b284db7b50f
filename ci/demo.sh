#!/usr/bin/env bash
# Builds the wheel of this checkout (ci/build.sh), installs it into an environment of its own (.venv-demo), and runs the
# demo.
#
#     ci/demo.sh [ARGUMENT ...]      arguments of `python -m dsv4_kernels demo`, such as --tokens 4096 --json
#
# Needs Python 3.11 or later (python3, or $PYTHON), a C++17 compiler, and the Python package index: no CUDA toolkit, GPU
# or torch. The first run downloads compilers and torch; a later one builds only if the sources have changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ci/environment.sh

environment=.venv-demo

ci/build.sh
wheel=$(echo build/ci/*.whl)
make_environment "$environment"
if ! unchanged "$environment/installed" "$wheel" ci/constraints.txt; then
  echo "demo: installing the wheel and what the demo needs; the first time, pip downloads torch"
  "$environment/bin/python" -m pip install --quiet -c ci/constraints.txt "$wheel[demo]"
  # A wheel of the same version is not installed over the last one unless told to.
  "$environment/bin/python" -m pip install --quiet --force-reinstall --no-deps "$wheel"
  remember "$environment/installed" "$wheel" ci/constraints.txt
fi
exec "$environment/bin/python" -m dsv4_kernels demo --preset v4-flash "$@"
