#!/usr/bin/env bash
# Train one domain expert from the seed, with the recipe of Branch-Train-MiX at the size of Llama-2 7B.
#
#     START=checkpoints/seed RUN=checkpoints/math TOKENIZER_MODEL=tokenizer.model \
#     DATA="0.95 data/math_text_document 0.05 data/general_text_document" bash examples/train_expert.sh
#
# Called by hand it starts torchrun; called by torchrun (torchrun --no-python examples/train_expert.sh) or by srun
# with one task per GPU, it runs its rank. Experts know nothing of each other: start each where and when there is room.
#
# Variables: those at the top of examples/common.sh, and
#   STEPS=48000    the paper's math expert; code 50000, Wikipedia 10000
#   TP=2  PP=1     for nodes of 8 GPUs with 80 GB: 4 data-parallel replicas a node
set -euo pipefail
# shellcheck source=examples/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

TP="${TP:-2}" PP="${PP:-1}"
common_flags 48000
launch "${FLAGS[@]}" "$@"
