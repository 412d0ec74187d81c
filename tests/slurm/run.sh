#!/usr/bin/env bash
# Starts a real Slurm on this machine, runs the tests that need one, and stops it again. Arguments go to pytest:
# files and options instead of the whole of tests/slurm.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 1
python=${PYTHON:-.venv/bin/python}
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "SKIPPED: the Slurm tests need root and apt-get, to install and start Slurm. NOTHING ABOUT SLURM WAS TESTED." >&2
    exit 0
fi
[ $# -gt 0 ] || set -- tests/slurm
prefix=$(mktemp -d /tmp/slurm-test.XXXXXX)
# Jobs mostly wait, so more tests than cores run at a time. -v: a line with the share done for every test that ends.
"$python" tests/slurm/cluster.py "$prefix" --nodes 8 -- \
    "$python" -m pytest -m slurm --confcutdir tests/slurm -n 4 --dist worksteal --durations=8 -v \
    --basetemp "$prefix/runs" "$@"
code=$?
if [ "$code" = 0 ]; then rm -rf "$prefix"; else echo "logs and runs are in $prefix" >&2; fi
exit "$code"
