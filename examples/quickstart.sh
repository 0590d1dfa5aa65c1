#!/usr/bin/env bash
# Branch-Train-MiX end to end on whatever machine this is: text, seed, experts, mixture, finetuning, report.
# Arguments go to `btx run` (--dry-run shows the commands).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/environment.sh

# Some stages are two processes, and NCCL wants a GPU for each: with a single one the CPU does it.
where=()
if [ "$(nvidia-smi --list-gpus 2>/dev/null | wc -l)" -eq 1 ]; then
    echo "one GPU found, two needed: running on the CPU"
    where=(--cpu)
fi
exec .venv/bin/btx run examples/recipes/quickstart.yaml "${where[@]}" "$@"
