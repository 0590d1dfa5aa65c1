#!/usr/bin/env bash
# Finetune a mixture of experts made by tools/convert_experts.py, with the recipe of Branch-Train-MiX at the size of
# four experts of Llama-2 7B: 80 billion tokens, top-2 routing, all parameters trained.
#
#     START=checkpoints/mix RUN=runs/btx TOKENIZER_MODEL=tokenizer.model MATH_DATA=data/math_text_document \
#     CODE_DATA=data/code_text_document WIKI_DATA=data/wiki_text_document GENERAL_DATA=data/general_text_document \
#     bash examples/btx_finetune.sh
#
# Called by hand it starts torchrun; called by torchrun (torchrun --no-python examples/btx_finetune.sh) or by srun with
# one task per GPU, it runs its rank.
#
# Variables: those at the top of examples/common.sh, and
#   MATH_DATA= CODE_DATA= WIKI_DATA= GENERAL_DATA=    the four domains' data, mixed as in the paper; or DATA, any blend
#   BLEND="30.16 40.31 10.30 19.23"                   the weights of math, code, wiki and general
#   STEPS=19000
#   EXPERTS=4  TOPK=2  AUX_LOSS=0.01 (coefficient of Megatron's load-balancing loss)
#   DISPATCHER=alltoall    how tokens reach their experts: alltoall, allgather or flex
#   TP=2  PP=1  EP=4       for nodes of 8 GPUs with 80 GB; EP: ranks over which the experts are spread
#   ETP=$TP                tensor parallel size within an expert
set -euo pipefail
# shellcheck source=examples/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [ -z "${DATA:-}" ]; then
    for domain in MATH CODE WIKI GENERAL; do
        require "${domain}_DATA" "the prefix of that domain's dataset, or the whole blend as DATA"
    done
    read -r math code wiki general <<<"${BLEND:-30.16 40.31 10.30 19.23}"
    DATA="$math $MATH_DATA $code $CODE_DATA $wiki $WIKI_DATA $general $GENERAL_DATA"
fi

TP="${TP:-2}" PP="${PP:-1}"
common_flags 19000
FLAGS+=(
    --num-experts "${EXPERTS:-4}" --moe-router-topk "${TOPK:-2}" --moe-ffn-hidden-size "${FFN:-11008}"
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff "${AUX_LOSS:-0.01}" --moe-router-dtype fp32
    --moe-token-dispatcher-type "${DISPATCHER:-alltoall}"
    --expert-model-parallel-size "${EP:-4}" --expert-tensor-parallel-size "${ETP:-$TP}"
)
launch "${FLAGS[@]}" "$@"
