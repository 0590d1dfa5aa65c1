#!/usr/bin/env bash
# Run a part of the tests with the oldest versions that pyproject.toml allows (tests/oldest.lock), in .venv-oldest.
# The part: layers, checkpoints, mixing, data, identities, layouts and resume. Arguments go to pytest in its place.
# Left out are tests that say what transformers 5 itself writes; what 4.57 makes of our folders, tests/run.sh compares.
#
# To renew the lock: uv pip compile --resolution lowest-direct --extra hf --no-header --no-annotate
#     --no-emit-index-url pyproject.toml -o tests/oldest.lock
set -euo pipefail
unset CDPATH # with it, cd would look for the folder elsewhere first
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
bash tools/environment.sh --tests
unset UV_PYTHON VIRTUAL_ENV UV_PROJECT_ENVIRONMENT PYTHONHOME PYTHONPATH || true
uv="$(command -v uv || echo "$PWD/.bootstrap/bin/uv")"

# The tools of the tests themselves are those of .venv.
tools="pytest pytest-timeout pytest-xdist hypothesis"
wanted="$(cat tests/oldest.lock requirements.lock | sha256sum | cut -d' ' -f1)"
if [ "$(cat .venv-oldest/ready 2>/dev/null || true)" != "$wanted" ]; then
    echo "setting up .venv-oldest ..."
    rm -rf .venv-oldest
    "$uv" venv --quiet --python .venv/bin/python .venv-oldest
    # shellcheck disable=SC2086
    "$uv" pip install --quiet --python .venv-oldest/bin/python --requirement tests/oldest.lock \
        $(for tool in $tools; do grep "^$tool==" requirements.lock; done)
    "$uv" pip install --quiet --python .venv-oldest/bin/python --no-deps --no-build-isolation --editable .
    echo "$wanted" >.venv-oldest/ready
fi
export PATH="$PWD/.venv-oldest/bin:$PATH" OMP_NUM_THREADS=1 MPLBACKEND=Agg
if [ $# -eq 0 ]; then
    set -- --numprocesses 2 --dist loadfile tests/unit/model/test_layers.py tests/unit/engine/test_adam.py tests/unit/engine/test_cpu.py \
        tests/unit/model tests/unit/checkpoint tests/unit/data/test_preprocess.py tests/unit/mixing/test_algebra.py \
        tests/distributed/test_identities.py tests/distributed/test_layouts.py tests/distributed/test_resume.py \
        --ignore tests/unit/checkpoint/test_hf_config.py
fi
exec python -m pytest "$@"
