#!/usr/bin/env bash
# Tests the plugins of vLLM and SGLang against the engines' own modules, from their wheels, on the CPU. Needs what
# ci/test.sh leaves behind: the package in .venv-test, Triton in .venv-build.
#
#     ci/engines.sh [ARGUMENT ...]     arguments of pytest, after tests/engines
#
# The engines' sources are unpacked into build/engines, what they import is installed into an environment of its own,
# .venv-engines, on top of .venv-test: no engine, nor what it brings along, is seen by the other tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ci/environment.sh

root=$PWD
environment=$root/.venv-engines
make_environment "$environment"
python=$environment/bin/python
"$python" ci/unpack_engines.py build/engines
if ! unchanged "$environment/stamp" ci/engines.txt; then
  "$python" -m pip install --quiet --no-deps -r ci/engines.txt
  remember "$environment/stamp" ci/engines.txt
fi

site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
of() { "$root/$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
printf '%s\n' "$root/build/engines/vllm" "$root/build/engines/sglang" "$(of .venv-test)" >"$site/engines.pth"
ln -sfn "$(of .venv-build)/triton" "$site/triton"

# JUNIT: the file to write a report to, if any.
# SGLang warns at import that there is no GPU.
exec "$python" -m pytest -p no:cacheprovider -W "ignore:Only CUDA:UserWarning" ${JUNIT:+--junitxml="$JUNIT"} tests/engines "$@"
