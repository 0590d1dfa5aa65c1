#!/usr/bin/env bash
# Create .venv in this checkout, or reuse it: the one set-up that the quickstart and the tests share.
# Everything is installed inside the checkout. A second call takes a fraction of a second.
# With --tests, also what the tests alone need: an older transformers, in .venv/transformers-4.
# With --keep-torch, in a container whose Python has a torch of its own: .venv sees that Python's packages, and its
# torch, what was built against it, and CUDA's libraries stay (tools/kept_packages.py names them). The rest is the lock's.
set -euo pipefail
unset CDPATH # with it, cd would look for the folder elsewhere first
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

# An exported UV_PYTHON or VIRTUAL_ENV would make uv install somewhere else.
unset UV_PYTHON VIRTUAL_ENV UV_PROJECT_ENVIRONMENT PYTHONHOME || true

fail() {
    echo "error: $*" >&2
    exit 2
}
case "$*" in "" | --tests | --keep-torch) ;; *) fail "$*: expected nothing, --tests or --keep-torch" ;; esac
keep_torch=
[ "${1:-}" != --keep-torch ] || keep_torch=yes

wanted="$(cat requirements.lock pyproject.toml | sha256sum | cut -d' ' -f1) $PWD${keep_torch:+ keep-torch}"
is_ready() { [ "$(cat .venv/ready 2>/dev/null || true)" = "$wanted" ] && .venv/bin/python -c '' 2>/dev/null; }
older() { sha256sum <tests/transformers-4.lock; }
has_older() { [ "${1:-}" != --tests ] || [ "$(cat .venv/transformers-4/ready 2>/dev/null || true)" = "$(older)" ]; }
if is_ready && has_older "$@"; then
    exit 0
fi

# A Python that really runs: a pyenv shim can be on the PATH and fail when called.
runs() {
    "$1" -c 'import importlib.util, sys
sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13) or bool(sys.argv[1]) and not importlib.util.find_spec("torch"))
' "$keep_torch" >/dev/null 2>&1
}
find_python() {
    local candidate
    for candidate in python3.12 python3.13 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python3 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.13*/bin/python3; do
        if runs "$candidate"; then
            "$candidate" -c 'import os, sys; print(os.path.realpath(sys.executable))'
            return
        fi
    done
}

uv="$(command -v uv || true)"
if [ -z "$uv" ]; then
    if [ ! -x .bootstrap/bin/uv ]; then
        base="$(command -v python3 || true)"
        [ -n "$base" ] || base="$(find_python)"
        [ -n "$base" ] || fail "no python3 found; install Python 3.12 (Debian: apt-get install python3.12 python3.12-venv)"
        "$base" -m venv .bootstrap || fail "$base cannot make a virtual environment; install its venv module (Debian: apt-get install python3-venv)"
        .bootstrap/bin/python -m pip install --quiet --disable-pip-version-check uv 2>/dev/null ||
            fail "pip could not install uv; check that a package index can be reached"
    fi
    uv="$PWD/.bootstrap/bin/uv"
fi

# It lies apart, found through PYTHONPATH, and shares every other package with .venv.
install_older() {
    rm -rf .venv/transformers-4
    "$uv" pip install --quiet --python .venv/bin/python --no-deps --target .venv/transformers-4 \
        --requirement tests/transformers-4.lock ||
        fail "the older transformers of the tests could not be installed; check that a package index can be reached"
    older >.venv/transformers-4/ready
}
if is_ready; then
    install_older
    exit 0
fi

python="$(find_python)"
[ -n "$python" ] || [ -z "$keep_torch" ] || fail "no Python 3.12 or 3.13 with torch found; --keep-torch is for an image that has both"
if [ -z "$python" ]; then
    "$uv" python install --quiet --install-dir .bootstrap/python 3.12 2>/dev/null || true
    for candidate in .bootstrap/python/*/bin/python3.12; do
        if runs "$candidate"; then python="$PWD/$candidate"; fi
    done
fi
[ -n "$python" ] || fail "no working Python 3.12 or 3.13 found and uv could not fetch one; install it (Debian: apt-get install python3.12)"

echo "setting up .venv with $("$python" --version) ..."
rm -f .venv/ready
if [ -n "$keep_torch" ]; then
    "$uv" venv --quiet --allow-existing --system-site-packages --python "$python" .venv
    .venv/bin/python tools/kept_packages.py requirements.lock >.venv/requirements.txt
    "$uv" pip install --quiet --python .venv/bin/python --no-deps --requirement .venv/requirements.txt
else
    "$uv" venv --quiet --allow-existing --python "$python" .venv
    "$uv" pip install --quiet --python .venv/bin/python --requirement requirements.lock
fi
"$uv" pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
[ -z "$keep_torch" ] || .venv/bin/python tools/kept_packages.py --check
# Import once with bytecode written: it halves the start of every process, also where PYTHONDONTWRITEBYTECODE is set.
env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -W ignore -c "
import torch.distributed.run, matplotlib.pyplot, megatron.training.training, megatron_btx.evaluation.program, megatron_btx.mixing.cli
" 2>/dev/null || fail "the installed packages cannot be imported; see: .venv/bin/python -c 'import megatron.training.training'"
echo "$wanted" >.venv/ready
has_older "$@" || install_older
