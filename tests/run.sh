#!/usr/bin/env bash
# Set up what is missing, then check style and types and run the tests. Arguments go to pytest.
set -euo pipefail
unset CDPATH # with it, cd would look for the folder elsewhere first
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
bash tools/environment.sh --tests
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1 MPLBACKEND=Agg
if [ $# -eq 0 ]; then
    ruff check .
    ruff format --check .
    codespell
    mypy
fi
# Many tests keep one core busy, and some wait: two processes take the files, each with fixtures of its own.
[ $# -gt 0 ] || set -- --numprocesses 2 --dist loadfile
exec python -m pytest "$@"
