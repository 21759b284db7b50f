#!/usr/bin/env bash
# Tests the installed package where there is no torch, as a release does on every Python: what the wheel holds, the
# library's face to the linker, the C interface and its record, failures, engines in C and C++, import.
#
# With the tools of the extra `test-package` on PATH, and DSV4_TEST_DIST naming the folder of wheel and sdist.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# --confcutdir: the devices of tests/conftest.py are torch's.
exec pytest -q -p no:cacheprovider --confcutdir tests/package -m "not torch and not gpu" \
  tests/cpp tests/package/test_{abi,c_interface,failures,import,library,wheel}.py
