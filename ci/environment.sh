# Sourced by the scripts of this folder: the Python to use, and environments of their own.
# shellcheck shell=bash

# The interpreter to make environments with: $PYTHON, or python3.
python_command() {
  local python=${PYTHON:-python3}
  if ! command -v "$python" >/dev/null; then
    echo "ci: no $python on this machine; install Python 3.11 or later, or name one: PYTHON=/path/to/python $0" >&2
    return 1
  fi
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "ci: building needs Python 3.11 or later (Triton 3.9 has no build for 3.10), got $("$python" --version 2>&1) ($python); name another: PYTHON=... $0" >&2
    return 1
  fi
  echo "$python"
}

# make_environment FOLDER: a virtual environment of that Python; the one that is there already, if it is of the same.
make_environment() {
  local folder=$1 python version
  python=$(python_command)
  version=$("$python" -c 'import sys; print(sys.base_prefix, sys.version)')
  if [[ -x $folder/bin/pip && $("$folder/bin/python" -c 'import sys; print(sys.base_prefix, sys.version)') == "$version" ]]; then
    return
  fi
  rm -rf "$folder"
  if ! "$python" -m venv "$folder"; then
    echo "ci: $python cannot make a virtual environment; its venv module is missing (Debian: python3-venv)" >&2
    return 1
  fi
}

# unchanged STAMP FILE_OR_FOLDER...: whether the files are those that the stamp was made of by remember.
fingerprint() { find "$@" -type f -not -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum; }
unchanged() { [[ -f $1 && $(<"$1") == "$(fingerprint "${@:2}")" ]]; }
remember() { fingerprint "${@:2}" >"$1"; }
