#!/usr/bin/env bash
# Prints the path of a Python 3.12 or newer: $PYTHON, then PATH, then pyenv's versions. Fails with one line.
set -u

new_enough() {
  "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ]; then
  if new_enough "$PYTHON"; then command -v "$PYTHON"; exit 0; fi
  echo "error: PYTHON=$PYTHON is not a Python 3.12 or newer with venv" >&2
  exit 1
fi

shopt -s nullglob
for candidate in python3.12 python3.13 python3.14 python3 python \
  "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3; do
  if new_enough "$candidate"; then command -v "$candidate"; exit 0; fi
done
echo "error: no Python 3.12 or newer found on PATH or under pyenv; install one (apt install python3.12-venv, or" \
  "pyenv install 3.12) or name it: make PYTHON=/path/to/python3.12" >&2
exit 1
