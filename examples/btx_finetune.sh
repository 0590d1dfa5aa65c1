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
#   EXPERTS=4
#   ROUTING=top-k          top-k, top-k-pre-softmax, switch, soft or sample-top1 (the paper's step count for it: 38000)
#   TOPK=2                 experts per token, of the two top-k methods
#   BALANCING=megatron     form of the load-balancing loss: megatron, paper or none (the default of soft, sample-top1)
#   AUX_LOSS=0.01          its coefficient
#   CAPACITY=1.5           capacity factor of switch routing
#   FREEZE=                groups that are not trained, as "experts" or "all-but:router"
#   VALID_DOMAINS=         "math=data/math_valid_text_document code=...": loss per domain at every EVAL_INTERVAL
#   EXPERT_LOSSES=         result of megatron_btx.evaluate for the experts on those domains: a mix that starts worse than
#                          the worst of them is refused at its first step
#   DISPATCHER=alltoall    how tokens reach their experts: alltoall, allgather or flex
#   TP=2  PP=1  EP=4       for nodes of 8 GPUs with 80 GB; EP: ranks over which the experts are spread
#   ETP=$TP                tensor parallel size within an expert
set -euo pipefail
# shellcheck source=examples/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

refuse_with() { # refuse_with WHY NAME...: none of the variables may be set
    local name
    for name in "${@:2}"; do
        [ -z "${!name:-}" ] || fail "$name=${!name} with $1; leave one of them out"
    done
}

if [ -n "${DATA:-}" ]; then
    refuse_with "DATA, which is the whole blend" BLEND MATH_DATA CODE_DATA WIKI_DATA GENERAL_DATA
else
    for domain in MATH CODE WIKI GENERAL; do
        require "${domain}_DATA" "the prefix of that domain's dataset, or the whole blend as DATA"
        words_of "${domain}_DATA"
        [ "${#WORDS[@]}" -eq 1 ] || fail "${domain}_DATA=${WORDS[*]}: expected one prefix; give several as DATA, with weights"
        printf -v "${domain}_DATA" %s "${WORDS[0]}"
    done
    : "${BLEND:=30.16 40.31 10.30 19.23}"
    words_of BLEND
    if [ "${#WORDS[@]}" -ne 4 ] || ! positive "${WORDS[@]}"; then
        fail "BLEND=${WORDS[*]}: expected four numbers above zero, the weights of math, code, wiki and general"
    fi
    math="${WORDS[0]}" code="${WORDS[1]}" wiki="${WORDS[2]}" general="${WORDS[3]}"
    # Megatron normalises the weights of a blend; say what they come to.
    [ "${RANK:-${SLURM_PROCID:-0}}" != 0 ] || awk -v m="$math" -v c="$code" -v w="$wiki" -v g="$general" 'BEGIN {
        sum = (m + c + w + g) / 100
        printf "blend: math %.2f %%, code %.2f %%, wiki %.2f %%, general %.2f %%\n", m / sum, c / sum, w / sum, g / sum }' >&2
    DATA="$math $MATH_DATA $code $CODE_DATA $wiki $WIKI_DATA $general $GENERAL_DATA"
fi

TP="${TP:-2}" PP="${PP:-1}"
sizes EXPERTS TOPK EP ETP
common_flags 19000
experts="${EXPERTS:-4}"
positive "${CAPACITY:-1.5}" || fail "CAPACITY=$CAPACITY: expected a number above zero"

# The ways to route, as in docs/routing.md. Soft and sampled routing have no balancing loss in the paper.
case "${ROUTING:=top-k}" in
    top-k) FLAGS+=(--moe-router-topk "${TOPK:-2}") ;;
    top-k-pre-softmax) FLAGS+=(--moe-router-topk "${TOPK:-2}" --moe-router-pre-softmax) ;;
    switch) FLAGS+=(--moe-router-topk 1 --moe-router-pre-softmax --moe-expert-capacity-factor "${CAPACITY:-1.5}") ;;
    soft) FLAGS+=(--moe-router-topk "$experts") ;;
    sample-top1) FLAGS+=(--moe-router-topk 1 --moe-router-pre-softmax --btx-sample-top1) ;;
    *) fail "ROUTING=$ROUTING: expected top-k, top-k-pre-softmax, switch, soft or sample-top1" ;;
esac
[[ "$ROUTING" = top-k* ]] || refuse_with "ROUTING=$ROUTING, which has its own k" TOPK
[ "$ROUTING" = switch ] || refuse_with "ROUTING=$ROUTING, which drops no token" CAPACITY
case "$ROUTING" in
    soft | sample-top1) : "${BALANCING:=none}" ;;
    *) : "${BALANCING:=megatron}" ;;
esac
case "$BALANCING" in
    none)
        refuse_with "BALANCING=none (the default of ROUTING=soft and sample-top1)" AUX_LOSS
        FLAGS+=(--moe-router-load-balancing-type none)
        ;;
    megatron | paper)
        [ "$BALANCING" = megatron ] || positive "${AUX_LOSS:-0.01}" ||
            fail "AUX_LOSS=$AUX_LOSS with BALANCING=paper: expected a number above zero (the paper's is 0.01)"
        not_negative "${AUX_LOSS:-0.01}" || fail "AUX_LOSS=$AUX_LOSS: expected zero or a number above it"
        FLAGS+=(--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff "${AUX_LOSS:-0.01}")
        FLAGS+=(--btx-load-balancing "$BALANCING")
        ;;
    *) fail "BALANCING=$BALANCING: expected megatron, paper or none" ;;
esac
words_of FREEZE
[ "${#WORDS[@]}" -eq 0 ] || FLAGS+=(--btx-freeze "${WORDS[@]}")
words_of VALID_DOMAINS
[ "${#WORDS[@]}" -eq 0 ] || FLAGS+=(--btx-valid-data "${WORDS[@]}")
[ -z "${EXPERT_LOSSES:-}" ] || FLAGS+=(--btx-first-loss-bound "$EXPERT_LOSSES")
FLAGS+=(
    --num-experts "$experts" --moe-ffn-hidden-size "${FFN:-11008}" --moe-router-dtype fp32 --moe-per-layer-logging
    --moe-token-dispatcher-type "${DISPATCHER:-alltoall}"
    --expert-model-parallel-size "${EP:-4}" --expert-tensor-parallel-size "${ETP:-$TP}"
)
launch "${FLAGS[@]}" "$@"
