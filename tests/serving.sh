#!/usr/bin/env bash
# Serve what is written: mixtures of all three families and a finetuned export, by vLLM on the CPU and by llama.cpp, each
# in an environment of its own, and compare log-probabilities and greedy tokens with transformers 4.57 and 5.
#     bash tests/serving.sh [--where-available]
# With --where-available a server that cannot be installed here (no package index, no compiler) is named with the reason
# and left out. No step can hang: each has a limit, and whatever it started ends with it. See docs/formats.md.
set -euo pipefail
unset CDPATH # with it, cd would look for the folder elsewhere first
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
where_available=0
case "$*" in
"") ;;
--where-available) where_available=1 ;;
*) echo "error: $*: expected nothing, or --where-available" >&2 && exit 2 ;;
esac

bash tools/environment.sh --tests
unset UV_PYTHON VIRTUAL_ENV UV_PROJECT_ENVIRONMENT PYTHONHOME PYTHONPATH || true
uv="$(command -v uv || echo "$PWD/.bootstrap/bin/uv")"
export OMP_NUM_THREADS=1 MPLBACKEND=Agg HF_HUB_OFFLINE=1 CUDA_VISIBLE_DEVICES="" PYTHONPATH="$PWD"
root="$PWD/runs/serving"
mkdir -p "$root"

# Run a command for at most so many seconds, in a process group that ends with this script. Its words go to a log.
running=""
trap '[ -z "$running" ] || kill "$running" 2>/dev/null || true' EXIT
trap 'exit 143' TERM INT HUP
limited() {
    local seconds="$1" log="$2" code=0
    shift 2
    timeout --kill-after=10 "$seconds" "$@" >"$root/$log.log" 2>&1 &
    running=$!
    wait "$running" || code=$?
    running=""
    return "$code"
}
reason() { grep -v '^[[:space:]]*$' "$root/$1.log" | tail -1 | cut -c1-300 || true; }
must() {
    local seconds="$1" log="$2" code=0
    limited "$@" || code=$?
    if [ "$code" -ne 0 ]; then
        echo "FAILED: $log ended with $code, limit $seconds s; $root/$log.log ends with:" >&2
        tail -25 "$root/$log.log" >&2
        exit 1
    fi
}

# --- The servers' environments -------------------------------------------------------------------------------------
make_environment() {
    local name="$1" lock="tests/serving/$1.lock"
    rm -rf ".venv-$name"
    # A lock is complete: without --no-deps vLLM's own pins would ask for a torch that only another index has.
    limited 60 "$name-environment" "$uv" venv --quiet --python .venv/bin/python ".venv-$name" &&
        limited 400 "$name-environment" "$uv" pip install --quiet --no-deps --python ".venv-$name/bin/python" --requirement "$lock"
}
build_llama() {
    local source=".venv-llama/source" build=".venv-llama/build"
    local -x PATH="$PWD/.venv-llama/bin:$PATH"
    mkdir -p "$source"
    limited 120 llama-source python -m pip download --quiet --no-deps --no-build-isolation --no-binary llama-cpp-python \
        --dest .venv-llama "llama-cpp-python==$(sed -n 's/^# llama-cpp-python==//p' tests/serving/llama.lock)" &&
        tar --extract --gzip --strip-components=1 --directory "$source" --file .venv-llama/llama_cpp_python-*.tar.gz &&
        limited 120 llama-configure cmake -S "$source/vendor/llama.cpp" -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
            -DBUILD_SHARED_LIBS=ON -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF \
            -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_OPENSSL=OFF \
            -DGGML_LLAMAFILE=OFF -DGGML_OPENMP=OFF &&
        limited 600 llama-build cmake --build "$build" --target llama --parallel 2
}
set_up() {
    local name="$1" wanted
    wanted="$(cat "tests/serving/$name.lock" tests/serving.sh | sha256sum | cut -d' ' -f1) $PWD"
    [ "$(cat ".venv-$name/ready" 2>/dev/null || true)" != "$wanted" ] || return 0
    echo "setting up .venv-$name ..."
    make_environment "$name" || { why="its packages cannot be installed ($(reason "$name-environment"))" && return 1; }
    if [ "$name" = llama ]; then
        command -v c++ >/dev/null || { why="there is no C++ compiler" && return 1; }
        build_llama || { why="llama.cpp cannot be built ($(reason llama-source) $(reason llama-build))" && return 1; }
    fi
    echo "$wanted" >".venv-$name/ready"
}
served=()
for name in vllm llama; do
    why=""
    if set_up "$name"; then
        served+=("$name")
    elif [ "$where_available" = 1 ]; then
        echo "not served by $name: $why"
    else
        echo "FAILED: not served by $name: $why" >&2
        exit 1
    fi
done
[ "${#served[@]}" -gt 0 ] || exit 0

# --- The models, and what transformers computes --------------------------------------------------------------------
rm -rf "$root"/models "$root"/sources "$root"/gguf "$root"/*.npz "$root"/*.json
must 300 texts .venv/bin/python examples/quickstart/make_texts.py --output "$root/texts" --scale 0.1
must 900 run .venv/bin/btx run tests/serving/recipe.yaml --cpu --output "$root/run"
must 300 models .venv/bin/python -W ignore -m tests.serving.models "$root" "$root/run"
must 300 reference .venv/bin/python -W ignore -m tests.serving.reference "$root" fp64
must 300 transformers-5 .venv/bin/python -W ignore -m tests.serving.reference "$root"
PYTHONPATH="$PWD/.venv/transformers-4:$PWD" must 300 transformers-4 .venv/bin/python -W ignore -m tests.serving.reference "$root"

# --- The servers ---------------------------------------------------------------------------------------------------
failed=0
for name in "${served[@]}"; do
    if [ "$name" = vllm ]; then
        must 900 vllm env VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_ENABLE_V1_MULTIPROCESSING=0 \
            VLLM_NO_USAGE_STATS=1 .venv-vllm/bin/python -W ignore -m tests.serving.served_by_vllm "$root"
    else
        must 300 llama-convert .venv-llama/bin/python -W ignore -m tests.serving.convert_for_llama "$root" \
            "$PWD/.venv-llama/source/vendor/llama.cpp/convert_hf_to_gguf.py"
        must 300 llama env LLAMA_CPP_LIB_PATH="$PWD/.venv-llama/build/bin" PYTHONPATH="$PWD:$PWD/.venv-llama/source" \
            .venv-llama/bin/python -W ignore -m tests.serving.served_by_llama "$root"
    fi
done
for name in transformers-5 transformers-4 "${served[@]}"; do
    code=0
    limited 120 "compare-$name" .venv/bin/python -W ignore -m tests.serving.compare "$root" "$name" || code=$?
    cat "$root/compare-$name.log"
    [ "$code" = 0 ] || failed=1
done
exit "$failed"
