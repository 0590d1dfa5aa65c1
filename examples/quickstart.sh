#!/usr/bin/env bash
# Branch-Train-MiX end to end on whatever machine this is: text, seed, experts, mixture, finetuning, report.
# Arguments go to `btx run` (--dry-run shows the commands).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/environment.sh
exec .venv/bin/btx run examples/recipes/quickstart.yaml "$@"
