#!/usr/bin/env bash
# Set up what is missing, then check style and types and run the tests. Arguments go to pytest.
set -euo pipefail
unset CDPATH # with it, cd would look for the folder elsewhere first
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
bash tools/environment.sh --tests
export PATH="$PWD/.venv/bin:$PATH" OMP_NUM_THREADS=1 MPLBACKEND=Agg
unset PYTHONDONTWRITEBYTECODE # every program that a test starts would compile what it imports
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi
ruff check .
ruff format --check .
codespell
# Most tests keep one core busy, and some wait for minutes: three processes take the files, on two cores too, the longest
# first (tests/conftest.py). Types are checked beside them, and told at the end.
said="$(mktemp)"
mypy >"$said" 2>&1 &
types=$!
status=0
python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder || status=$?
wait "$types" || status=1
cat "$said"
rm "$said"
exit "$status"
