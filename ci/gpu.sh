#!/usr/bin/env bash
# What a machine with a GPU checks of an installed wheel, and the evidence that it leaves:
#
#     ci/gpu.sh OUT        selftest.json, bench.json, bench.png, moe_layers.json, and the log of each check
#
# Run from the checkout, with dsv4_kernels (the wheel), torch, pytest, hypothesis and numpy importable by $PYTHON.
# The checks run as users do: Triton and the CuTe DSL cannot be imported, nvcc is off the PATH, HOME is read-only. The
# benchmark alone may import Triton: torch.compile, a baseline, needs it.
set -euo pipefail

out=$(realpath -m "${1:?usage: ci/gpu.sh OUT}")
python=${PYTHON:-python3}
commit=${COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}
mkdir -p "$out"

no_jit=$(mktemp -d)
trap 'chmod -R u+w "$no_jit"; rm -rf "$no_jit"' EXIT
cat >"$no_jit/sitecustomize.py" <<'PYTHON_END'
import sys

for name in ("triton", "cutlass"):
    sys.modules[name] = None  # importing it now fails
PYTHON_END
mkdir "$no_jit/home" && chmod a-w "$no_jit/home"
path_without_nvcc=$(tr ':' '\n' <<<"$PATH" | while read -r folder; do [ -x "$folder/nvcc" ] || echo "$folder"; done | paste -sd:)
python=$(command -v "$python")
user() { env HOME="$no_jit/home" PATH="$path_without_nvcc" PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$no_jit:${PYTHONPATH:-}" "$@"; }

user "$python" -c 'import importlib.util, shutil, sys; assert shutil.which("nvcc") is None; assert sys.modules["triton"] is None'
user "$python" -m dsv4_kernels info | tee "$out/info.log"
user "$python" -m dsv4_kernels selftest --json "$out/selftest.json" | tee "$out/selftest.log"
user "$python" -m dsv4_kernels demo --preset v4-flash | tee "$out/demo.log"
user "$python" -m pytest -m gpu -p no:cacheprovider -q tests 2>&1 | tee "$out/pytest.log"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    # racecheck reports hazards in cuBLAS, and leaving its kernels out makes them fail: so none of them may run. It warns
    # of hash_router_fused, whose blocks are ordered by asynchronous stores that count at a barrier; the tests' emulator
    # knows those. Errors count.
    user "$(command -v compute-sanitizer)" --tool "$tool" "$python" -m dsv4_kernels selftest --check-on-cpu 2>&1 |
      tee "$out/$tool.log"
    grep -Eq 'ERROR SUMMARY: 0 errors|\(0 errors, ' "$out/$tool.log"
  done
fi
"$python" -m dsv4_kernels bench --json "$out/bench.json" --plot "$out/bench.png" | tee "$out/bench.log"
"$python" -m tests.bench.moe_layers "$out/moe_layers.json" | tee "$out/moe_layers.log"
"$python" - "$out" "$commit" <<'PYTHON_END'
import json, pathlib, sys

for name in ("selftest.json", "bench.json", "moe_layers.json"):
    path = pathlib.Path(sys.argv[1]) / name
    report = json.loads(path.read_text())
    report["machine"]["commit"] = sys.argv[2]
    path.write_text(json.dumps(report, indent=1) + "\n")
PYTHON_END
