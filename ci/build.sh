#!/usr/bin/env bash
# Builds the wheel of this checkout into build/ci, for ci/demo.sh and ci/test.sh: whichever runs first builds, the other
# takes what is there. Prints what is compiled; the whole log is build/ci/wheel.log.
#
# The build requirements live in .venv-build and the build folder in build/, so that after a change only what it touches
# is compiled again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ci/environment.sh

environment=$PWD/.venv-build
output=$PWD/build/ci
sources=(pyproject.toml CMakeLists.txt README.md LICENSE aot csrc python)

echo "build: environment of the build requirements, $environment"
make_environment "$environment"
"$environment/bin/python" ci/pins.py build >"$environment/requirements.txt"
"$environment/bin/python" -m pip install --quiet -r "$environment/requirements.txt" build

if [[ -n $(compgen -G "$output/*.whl") ]] && unchanged "$output/built" "${sources[@]}" "$environment/requirements.txt"; then
  echo "build: $(echo "$output"/*.whl) is of these sources"
  exit
fi
echo "build: wheel; the first time about 13 minutes on two cores"
rm -rf "$output"
mkdir -p "$output"
export PATH=$environment/bin:$PATH
python -m build --no-isolation --wheel --outdir "$output" 2>&1 | tee "$output/wheel.log" |
  sed -unE '/^(aot:|\[[0-9]+\/[0-9]+\] (Building|Linking|Compiling))/p' || { cat "$output/wheel.log"; exit 1; }
remember "$output/built" "${sources[@]}" "$environment/requirements.txt"
ls -l "$output"/*.whl
