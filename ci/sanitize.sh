#!/usr/bin/env bash
# Builds the host code with AddressSanitizer and UndefinedBehaviorSanitizer, for one architecture, and runs on it the
# tests that take it through its paths: every op's cases in the emulator, wrong arguments, aliases, the C interface.
#
#     ci/sanitize.sh                  those tests
#     ci/sanitize.sh ARGUMENT ...     arguments of pytest instead
#
# Needs what ci/demo.sh needs, and GCC (its libasan is preloaded into Python).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ci/environment.sh

architecture=sm_90a
build=$PWD/.venv-build
environment=$PWD/.venv-sanitize
folder=$PWD/build/sanitize

make_environment "$build"
"$build/bin/python" ci/pins.py build >"$build/requirements.txt"
"$build/bin/python" -m pip install --quiet -r "$build/requirements.txt"
echo "sanitize: wheel; a few minutes"
rm -rf "$folder/wheel"
PATH=$build/bin:$PATH "$build/bin/python" -m pip wheel . --no-build-isolation --no-deps --quiet --wheel-dir "$folder/wheel" \
  --config-settings "build-dir=$folder" --config-settings "cmake.define.DSV4_SANITIZE=ON" \
  --config-settings "cmake.define.DSV4_ARCHITECTURES=$architecture"
make_environment "$environment"
"$environment/bin/python" -m pip install --quiet -c ci/constraints.txt "$(echo "$folder"/wheel/*.whl)[test]"
"$environment/bin/python" -m pip install --quiet --force-reinstall --no-deps "$folder"/wheel/*.whl

(($#)) || set -- tests/test_every_op.py tests/package/test_errors.py tests/package/test_aliasing.py tests/package/test_c_interface.py
# Python and torch leak on purpose. A report of either sanitizer ends the process, and so the run.
PATH=$environment/bin:$PATH DSV4_TEST_PTX=$folder/images/ptx LD_PRELOAD=$(g++ -print-file-name=libasan.so) \
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
  pytest --representative -q -p no:cacheprovider "$@"
