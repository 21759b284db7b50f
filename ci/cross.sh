#!/usr/bin/env bash
# Cross-compiles the library for aarch64 on an x86-64 machine, and runs the engine of tests/cpp with it under qemu:
#
#     ci/cross.sh OUT [-DDSV4_...=... ...]      leaves libdsv4_kernels.so and images.json in OUT
#
# Releases compile for aarch64 on aarch64 (.github/workflows/release.yml). This shows on any machine that they can: the
# host code is portable, and the images are those of an x86-64 build, hash by hash (compare OUT/images.json).
#
# Needs what ci/native.sh needs, aarch64-linux-gnu-g++ and qemu-aarch64-static (Debian: g++-aarch64-linux-gnu,
# qemu-user-static).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ci/environment.sh

out=$(realpath -m "${1:?usage: ci/cross.sh OUT [-DDSV4_...=...]}")
shift
compiler=aarch64-linux-gnu-g++
sysroot=/usr/aarch64-linux-gnu
for program in "$compiler" qemu-aarch64-static; do
  if ! command -v "$program" >/dev/null; then
    echo "cross: no $program on this machine (Debian: apt install g++-aarch64-linux-gnu qemu-user-static)" >&2
    exit 1
  fi
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
make_environment "$work/environment"
python=$work/environment/bin/python
"$python" ci/pins.py build >"$work/requirements.txt"
"$python" -m pip install --quiet -r "$work/requirements.txt"
# The CUDA runtime that is linked is the host's: aarch64's, of the same version.
"$python" -m pip download --quiet --no-deps --only-binary :all: --platform manylinux2014_aarch64 --dest "$work" \
  "$(grep '^nvidia-cuda-runtime==' "$work/requirements.txt")"
"$python" -m zipfile -e "$work"/nvidia_cuda_runtime-*.whl "$work/runtime"

PATH=$work/environment/bin:$PATH
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
cmake -S . -B "$work/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$python" \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER="$compiler" \
  -DCMAKE_CUDA_HOST_COMPILER="$compiler" -DCMAKE_CUDA_FLAGS="-L$work/runtime/nvidia/cu13/lib" \
  -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" -DSKBUILD_PROJECT_VERSION="$version" "$@"
cmake --build "$work/build" --target dsv4_kernels
mkdir -p "$out"
cp "$work"/build/libdsv4_kernels.so "$work"/build/images/images.json "$out"

"$compiler" -std=c++17 -Icsrc/include tests/cpp/engine.cpp -o "$work/engine" "$out/libdsv4_kernels.so" -ldl
status=0
LD_LIBRARY_PATH=$out qemu-aarch64-static -L "$sysroot" "$work/engine" 2>"$work/errors" || status=$?
cat "$work/errors"
# There is no driver for it: it must say so. 13: see tests/cpp/engine.cpp.
if ((status != 13)) || ! grep -q '^preload: needs a CUDA ' "$work/errors"; then
  echo "cross: the engine exited with $status, expected a refusal for want of a driver" >&2
  exit 1
fi
echo "cross: $(file -b "$out/libdsv4_kernels.so" 2>/dev/null || echo "$out/libdsv4_kernels.so")"
