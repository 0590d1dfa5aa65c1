#!/usr/bin/env bash
# Correctness and speed on a GPU, in one command and under ten minutes:
#
#     bash benchmarks/gpu_suite.sh [WHEELS [OUT]]
#
# For a bare machine: a GPU, Python 3.12, a CUDA torch, no network. Packages that do not import are installed from the
# wheels in the folder WHEELS into a temporary folder (benchmarks/README.md says which are needed). OUT gets the record
# and every step's log; default benchmarks/records/DATE-GPU. A failed step does not stop the others; then the exit code
# is 1. Without a GPU the same steps run at pico size on the CPU, to test this script, and the record says so.
set -uo pipefail
unset CDPATH # with it, cd would look for the folder elsewhere first, and print it
repository="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
wheels="${1:-}"
[ -z "$wheels" ] || wheels="$(realpath "$wheels")"
out="$(realpath -m "${2:-.}")"
cd "$repository" || exit 2

fail() {
    echo "error: $*" >&2
    exit 2
}

python="$repository/.venv/bin/python"
[ -x "$python" ] || python=python3
command -v "$python" >/dev/null || fail "no python3 found: install Python 3.12"
"$python" -c 'import torch' 2>/dev/null || fail "$python has no torch: install a CUDA build of it"

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$repository:$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 OMP_NUM_THREADS=1
export PYTHONDONTWRITEBYTECODE=1 PYTHONWARNINGS=ignore

read -r gpus name < <("$python" - <<'PY'
import torch
count = torch.cuda.device_count()
print(count, torch.cuda.get_device_name(0).replace(" ", "-") if count else "cpu-dry-run")
PY
)
[ $# -ge 2 ] || out="$repository/benchmarks/records/$(date -u +%Y-%m-%d)-$name"
mkdir -p "$out" || fail "$out cannot be made: name a folder that can be written"
rm -f "$out"/*.log "$out"/*.xml "$out"/steps.tsv "$out"/training.json "$out"/record.*
echo "$gpus GPUs ($name), records in $out"

failed=0
step() { # step NAME SECONDS COMMAND...: run it with a limit, its output in a log
    local title="$1" limit="$2" begin=$SECONDS code=0
    shift 2
    timeout --kill-after=20 "$limit" "$@" >"$out/$title.log" 2>&1 || code=$?
    [ "$code" -eq 0 ] || failed=1
    printf '%s\t%s\t%s\n' "$title" "$code" "$((SECONDS - begin))" >>"$out/steps.tsv"
    echo "$title: $([ "$code" -eq 0 ] && echo ok || echo "FAILED with $code, see $out/$title.log"), $((SECONDS - begin)) s"
}

# The wheels of which this machine lacks a package. Packages are the outermost folders with an __init__.py, because of
# namespaces: a machine can have google and lack google.protobuf.
missing_wheels() {
    "$python" - "$1" <<'PY'
import importlib.util, pathlib, sys, zipfile


def found(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


for wheel in sorted(pathlib.Path(sys.argv[1]).glob("*.whl")):
    files = [pathlib.PurePosixPath(name) for name in zipfile.ZipFile(wheel).namelist()]
    folders = {file.parent for file in files if file.name == "__init__.py"}
    packages = [folder for folder in folders if not folders & set(folder.parents)]
    modules = [file.with_suffix("") for file in files if len(file.parts) == 1 and file.suffix == ".py"]
    names = [".".join(path.parts) for path in packages + modules if path.parts]
    if not all(map(found, names)) or not names:
        print(wheel)
PY
}

if [ -n "$wheels" ]; then
    ls "$wheels"/*.whl >/dev/null 2>&1 || fail "$wheels holds no wheels"
    mapfile -t missing < <(missing_wheels "$wheels")
    if [ "${#missing[@]}" -gt 0 ]; then
        step wheels 60 "$python" -m pip install --no-index --no-deps --no-compile --target "$work/site" "${missing[@]}"
    fi
fi
"$python" -c 'import megatron.core' 2>"$work/import" ||
    fail "megatron.core does not import ($(tail -n 1 "$work/import")): give the folder of the missing wheels"

pytest=("$python" -m pytest -p no:cacheprovider -o "junit_family=xunit2")
benchmark=("$python" benchmarks/training.py --output "$out" --timeout-seconds 100)
[ "$gpus" -gt 0 ] || benchmark+=(--pico --steps 10)
step gpu_tests 290 "${pytest[@]}" -v -m gpu tests/gpu --junit-xml "$out/gpu_tests.xml"
step training 220 "${benchmark[@]}"
if [ "$gpus" -ge 2 ]; then
    # What is left of the nine minutes.
    step distributed_tests "$((515 - SECONDS > 60 ? 515 - SECONDS : 60))" "${pytest[@]}" tests/distributed \
        --deselect tests/distributed/test_launchers.py --junit-xml "$out/distributed_tests.xml"
fi
"$python" benchmarks/record.py "$out" || failed=1
grep -hE '^(SKIPPED|FAILED|ERROR)' "$out"/*_tests.log
cat "$out/record.md"
echo "$([ "$failed" -eq 0 ] && echo "all steps passed" || echo "some steps failed"), $SECONDS s, $out/record.md"
exit "$failed"
