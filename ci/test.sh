#!/usr/bin/env bash
# Builds wheel (ci/build.sh) and sdist of this checkout, installs the wheel into an environment of its own (.venv-test),
# and runs the lint set and tests against the installed package. Fails if anything does.
#
#     ci/test.sh                     a representative set of the tests: about ten minutes on two cores
#     ci/test.sh --all               every test: about half an hour
#     ci/test.sh ARGUMENT ...        arguments of pytest instead, such as tests/router or -k hash
#
# The representative set emulates one architecture of three and leaves out the tests that are marked `thorough`.
#
# Needs what ci/demo.sh needs. The build requirements live in a second environment (.venv-build), so that the package is
# tested where no compiler, Triton or CuTe DSL can be imported; the tests of the build itself use that one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ci/environment.sh

root=$PWD
build=$root/.venv-build
environment=$root/.venv-test
output=$root/build/ci

ci/build.sh
wheel=$(echo "$output"/*.whl)

echo "test: sdist"
rm -f "$output"/*.tar.gz "$output"/*.xml
PATH=$build/bin:$PATH "$build/bin/python" -m build --no-isolation --sdist --outdir "$output" >"$output/sdist.log" 2>&1 ||
  { cat "$output/sdist.log"; exit 1; }

echo "test: environment of the tests"
make_environment "$environment"
"$environment/bin/python" -m pip install --quiet -c ci/constraints.txt "$wheel[test,lint]"
# A wheel of the same version is not installed over the last one unless told to.
"$environment/bin/python" -m pip install --quiet --force-reinstall --no-deps "$wheel"

export PATH=$environment/bin:$PATH
failed=()
ci/lint.sh || failed+=(lint)
# What CMake left in the build folder: the PTX that the images were assembled from, which the emulator of the tests runs,
# and the output of the aot step, from which the tests of that step start.
tag=$(basename "$wheel" .whl)
folder=$root/build/${tag#*-*-}

# The program pytest, and not `python -m pytest`, which would put the checkout on sys.path.
run_tests() {
  local report=$1
  shift
  DSV4_TEST_DIST=$output DSV4_TEST_BUILD_PYTHON=$build/bin/python DSV4_TEST_PTX=$folder/images/ptx DSV4_TEST_AOT=$folder/aot \
    pytest --junitxml="$output/$report.xml" "$@"
}
if (($#)) && [[ $* != --all ]]; then
  run_tests tests "$@" || failed+=(tests)
else
  set_of_tests=()
  (($#)) || set_of_tests=(--representative)
  # First what measures time and builds, alone; then the rest, a process per processor.
  run_tests package "${set_of_tests[@]}" tests/package tests/cpp || failed+=(package)
  run_tests tests "${set_of_tests[@]}" -n "$(nproc)" tests --ignore tests/package --ignore tests/cpp || failed+=(tests)
  JUNIT=$output/engines.xml ci/engines.sh || failed+=(engines)
  (($#)) || echo "test: a representative set ran (what it left out is counted above as deselected); ci/test.sh --all runs every test"
fi
python ci/count_skipped.py "$output"/*.xml
if ((${#failed[@]})); then
  echo "test: FAILED: ${failed[*]}" >&2
  exit 1
fi
