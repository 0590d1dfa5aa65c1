#!/usr/bin/env bash
# Train a mixture of four tiny experts for one step, on a GPU or on the CPU: whether what is installed can train at all.
#
#     bash tools/first_step.sh DIR [FLAGS...]     # DIR must not exist; half a minute; FLAGS go to Megatron last
set -euo pipefail

[ $# -gt 0 ] || { echo "error: no DIR: give a folder that is to be made" >&2; exit 2; }
folder="$1"
shift
mkdir -- "$folder"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
for count in {1..40}; do
    echo "{\"text\": \"$(seq -s ' ' "$count" "$((count + 40))")\"}"
done >"$folder/texts.jsonl"
tokenizer=(--tokenizer-type NullTokenizer --vocab-size 96)
btx preprocess --input "$folder/texts.jsonl" --output-prefix "$folder/texts" "${tokenizer[@]}" --append-eod
python -m megatron_btx.pretrain "${tokenizer[@]}" --padded-vocab-size 128 \
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --seq-length 32 \
    --max-position-embeddings 32 --swiglu --normalization RMSNorm --position-embedding-type rope \
    --untie-embeddings-and-output-weights --disable-bias-linear --attention-dropout 0 --hidden-dropout 0 \
    --num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 48 --moe-token-dispatcher-type alltoall \
    --micro-batch-size 1 --global-batch-size 4 --lr 1e-2 --lr-decay-style constant --eval-iters 0 --log-interval 1 \
    --train-iters 1 --train-data-path "$folder/texts_text_document" --data-cache-path "$folder/cache" \
    --save "$folder/checkpoint" --save-interval 1000 --ckpt-format torch_dist "$@"
test -e "$folder/checkpoint/latest_checkpointed_iteration.txt"
