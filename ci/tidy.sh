#!/usr/bin/env bash
# clang-tidy over the library's host code, with the checks of .clang-tidy. Fails if there is a finding.
#
# What it reads of generated files and options it takes from the build folder of ci/build.sh, which builds first if need be.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ci/environment.sh

ci/build.sh
make_environment .venv-tidy
.venv-tidy/bin/python ci/pins.py extra tidy >.venv-tidy/requirements.txt
.venv-tidy/bin/python -m pip install --quiet -r .venv-tidy/requirements.txt
wheel=$(basename build/ci/*.whl .whl)
# The compile commands name GCC; clang-tidy takes its flags and includes, and knows a few warnings fewer.
git ls-files 'csrc/**.cpp' ':!csrc/python' |
  xargs -P "$(nproc)" -n 1 .venv-tidy/bin/clang-tidy --quiet -p "build/${wheel#*-*-}" --extra-arg=-Wno-unknown-warning-option
