#!/usr/bin/env bash
# Branch-Train-MiX end to end on whatever machine this is: text, seed, experts, mixture, finetuning, report.
# Arguments go to `btx run` (--dry-run shows the commands). TEXT_SCALE is the share of the texts that is made (default 1).
set -euo pipefail
unset CDPATH # with it, cd would look for the folder elsewhere first
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
bash tools/environment.sh

# The recipe reads texts as anybody's. These come from what this machine has; made once, and checked afterwards.
.venv/bin/python examples/quickstart/make_texts.py --output runs/quickstart-texts --scale "${TEXT_SCALE:-1}"

# Some stages are two processes, and NCCL wants a GPU for each. With a single GPU every stage is one process; what the
# two would have taken at once it takes as one batch.
one_process=()
if [ "$(nvidia-smi --list-gpus 2>/dev/null | wc -l)" -eq 1 ]; then
    echo "one GPU found: every stage is one process"
    one_process=(--set finetune.layout.expert-model-parallel-size=1)
    for stage in seed finetune baselines.dense.mixture; do
        one_process+=("$stage.layout.processes=1" "$stage.megatron.micro-batch-size=4")
    done
fi
exec .venv/bin/btx run examples/recipes/quickstart.yaml "${one_process[@]}" "$@"
