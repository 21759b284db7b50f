#!/usr/bin/env bash
# The lint set: every check, or those named, with the tools of the `lint` extra from the environment on PATH.
#
#     ci/lint.sh [CHECK ...]     checks: versions ruff format mypy clang_format cmake_format spelling words workflows
#     ci/lint.sh fix             rewrites what the formatters would have
#
# .pre-commit-config.yaml calls these same checks. A tool that is absent or of another version than pyproject.toml pins
# is a failure.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

checks=(versions ruff format mypy clang_format cmake_format spelling words workflows)

files() { git ls-files --cached --others --exclude-standard -- "$@"; }
cpp_files() { files 'csrc/**.cpp' 'csrc/**.h' 'csrc/**.hpp' 'csrc/**.cu' 'csrc/**.cuh' 'tests/cpp/**.cpp' 'tests/cpp/**.h' 'tests/package/**.c'; }
cmake_files() { files '**CMakeLists.txt' '**.cmake'; }

versions() { python ci/pins.py check lint; }
ruff() { command ruff check --output-format concise .; }
format() { command ruff format --check --output-format concise .; }
mypy() { command mypy; }
clang_format() { cpp_files | xargs clang-format --dry-run -Werror; }
cmake_format() { cmake_files | xargs gersemi --check --diff --warnings-as-errors; }
spelling() { files ':!LICENSE' | xargs codespell; }
words() { files ':!*.json' | xargs python ci/words.py; }
# Syntax by GitHub's schema; what can go wrong with permissions, pins and injected text by zizmor; and that cibuildwheel
# would make a wheel for each of five Pythons on either machine, in the version that is checked here.
workflows() {
  check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
  zizmor --offline --no-progress .github/workflows
  local machine pin
  for machine in x86_64 aarch64; do
    (($(cibuildwheel --print-build-identifiers --platform linux --archs "$machine" | grep -c "^cp31[0-4]-manylinux_$machine$") == 5))
  done
  pin=$(python ci/pins.py extra lint | grep '^cibuildwheel==')
  grep -q "pipx run $pin " .github/workflows/release.yml
}

fix() {
  command ruff check --fix .
  command ruff format .
  cpp_files | xargs clang-format -i
  cmake_files | xargs gersemi --in-place
}

main() {
  local failed=() check
  for check in "$@"; do
    # A subshell of its own, so that a command that fails ends the check and not the script.
    echo "lint: $check"
    if ! bash -c "source ci/lint.sh; set -euo pipefail; $check"; then failed+=("$check"); fi
  done
  if ((${#failed[@]})); then
    echo "lint: failed: ${failed[*]}" >&2
    return 1
  fi
}

# Sourced: only the functions are wanted.
if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  if [[ ${1-} == fix ]]; then
    fix
  else
    (($#)) || set -- "${checks[@]}"
    main "$@"
  fi
fi
