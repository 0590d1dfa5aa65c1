# shellcheck shell=bash
# What the launchers share; sourced by them, not run. Every variable below can be set from outside (value = default).
# Lists of words may stand on several lines.
#
# What to train on, with which tokenizer
#   DATA=                  training data in Megatron's form: one prefix, or "weight prefix weight prefix ..." (required)
#   VALID_DATA=            validation data, likewise; without it no validation while training
#   DATA_CACHE=            folder for Megatron's indices of the data; default: beside each dataset
#   TOKENIZER_TYPE=SentencePieceTokenizer    TOKENIZER_MODEL=    the tokenizer and its file (a NullTokenizer has none)
#   VOCAB=                 tokens of a tokenizer that has no file
# From where to where
#   START=                 checkpoint whose weights the run starts from (required)
#   RUN=                   folder of this run's checkpoints; started again, the run goes on from its latest one (required)
#   METRICS=$RUN/metrics.jsonl    every scalar of every logged step, one JSON object a line
# The model: Llama-2 7B. It has to be the model of START; a difference is refused.
#   LAYERS=32  HIDDEN=4096  FFN=11008  HEADS=32  KV_GROUPS=$HEADS (key-value heads)  PADDED_VOCAB=32000 (rows)
#   SEQ_LENGTH=4096 (tokens)  MAX_POSITIONS=$SEQ_LENGTH (tokens)  NORM_EPSILON=1e-5  ROTARY_BASE=10000
# The optimizer: AdamW as in the paper. A batch is 1024 x 4096 = 4,194,304 tokens.
#   GLOBAL_BATCH=1024  MICRO_BATCH=1 (sequences)  STEPS (see the launcher)  WARMUP=100 (steps)  LR=1e-4 (peak)
#   MIN_LR=LR/10  WEIGHT_DECAY=0.1  BETA1=0.9  BETA2=0.95  CLIP=1.0  SEED=1234
#   PRECISION=bf16         bf16 or fp32
# Layout: TP tensor, PP pipeline parallel size, defaults per launcher; what is left of the GPUs is data parallel.
#   DISTRIBUTED_OPTIMIZER=1    1 (yes, true, on): optimizer state spread over the data-parallel ranks; 0 (no, false,
#                          off): a copy on each
# How often (steps)
#   SAVE_INTERVAL=500  LOG_INTERVAL=10  EVAL_INTERVAL=1000  EVAL_STEPS=20 (batches per validation)
# Processes, when the launcher starts torchrun itself
#   NPROC (processes on this machine; default: its GPUs, or 1)
#   NNODES=1  NODE_RANK=0  MASTER_ADDR (required with more than one node)  MASTER_PORT=29500
#   PYTHON                 the interpreter; default: this checkout's .venv, or python3
# Arguments after the launcher's name go to Megatron last, where the last one wins. With --btx-check the job is checked
# for NPROC x NNODES processes, and not started. --help prints this.

# --help: what stands at the top of the launcher and of this file. $* are the launcher's arguments.
case " $* " in
    *" --help "* | *" -h "*)
        for file in "$0" "${BASH_SOURCE[0]}"; do
            awk '/^#!|^# shellcheck/ { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$file"
            echo
        done
        exit 0
        ;;
esac

unset CDPATH # with it, cd would look for this folder elsewhere first, and print what it found
repository="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
given_python="${PYTHON:-}"
if [ -z "$given_python" ]; then
    PYTHON=python3
    [ ! -x "$repository/.venv/bin/python" ] || PYTHON="$repository/.venv/bin/python"
fi
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}"
# The folder in which this is called holds data, and may come from somebody else: no module of it may run.
export PYTHONSAFEPATH=1
# With more than one thread per process the ranks of a node fight for its cores.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

fail() {
    # Of many ranks, the first speaks for all.
    [ "${RANK:-${SLURM_PROCID:-0}}" != 0 ] || echo "error: ${*//$'\n'/ }" >&2
    exit 2
}

require() { # require NAME 'what it is'
    [ -n "${!1:-}" ] || fail "no $1: give $2"
}

# PYTHON may be in the environment for another purpose: say so, instead of "No module named torch".
check_python() {
    local remedy="run bash tools/environment.sh, or name an interpreter that has it"
    [ -z "$given_python" ] || remedy="unset PYTHON, or name an interpreter that has it"
    "$PYTHON" -c 'import importlib.util as i, sys; sys.exit(i.find_spec("torch") is None)' >/dev/null 2>&1 ||
        fail "PYTHON=$PYTHON does not run or has no torch: $remedy"
}

# Whether all words are numbers above zero, which awk and Megatron can add up.
positive() {
    local word
    for word; do
        [[ "$word" =~ ^([0-9]{1,18}\.?[0-9]{0,18}|\.[0-9]{1,18})([eE][-+]?[0-9]{1,2})?$ ]] || return 1
        [[ "${word%%[eE]*}" =~ [1-9] ]] || return 1
    done
}

# Whether it is such a number, or zero.
not_negative() {
    [[ "$1" =~ ^0{1,18}(\.0{0,18})?$ ]] || positive "$1"
}

# Whether the value means yes (or nothing is set), or no; anything else is refused.
is_on() { # is_on NAME
    local word="${!1:-1}"
    case "${word,,}" in
        1 | yes | true | on) return 0 ;;
        0 | no | false | off) return 1 ;;
    esac
    fail "$1=$word: expected 1, yes, true, on, or 0, no, false, off"
}

# The words of a variable, over all its lines, into the array WORDS.
words_of() { # words_of NAME
    local IFS=$' \t\r\n'
    read -r -d '' -a WORDS <<<"${!1:-}" || true # the end of the text is no failure
    local word
    for word in "${WORDS[@]}"; do
        [[ "$word" != --* ]] || fail "$1: found $word, which is a flag; give it behind the name of the launcher"
    done
}

sizes() { # sizes NAME...: those that are set are whole numbers above zero
    local name
    for name; do
        [[ "${!name:-1}" =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name}: expected a whole number above zero"
    done
}

# The flags of every run, into the array FLAGS.
common_flags() {
    sizes TP PP NPROC NNODES LAYERS HIDDEN FFN HEADS KV_GROUPS PADDED_VOCAB VOCAB SEQ_LENGTH MAX_POSITIONS \
        GLOBAL_BATCH MICRO_BATCH SAVE_INTERVAL LOG_INTERVAL EVAL_INTERVAL EVAL_STEPS MASTER_PORT
    require DATA 'the training data, as DATA="0.9 data/math_text_document 0.1 data/general_text_document"'
    require START 'the checkpoint to start from, as START=checkpoints/seed'
    require RUN "the folder for this run's checkpoints, as RUN=runs/math"
    [ -e "$START" ] || fail "START=$START does not exist: give a checkpoint's folder"
    [ "${TOKENIZER_TYPE:=SentencePieceTokenizer}" = NullTokenizer ] ||
        require TOKENIZER_MODEL 'the file of the tokenizer, as TOKENIZER_MODEL=tokenizer.model'
    local heads="${HEADS:-32}" seq_length="${SEQ_LENGTH:-4096}" lr="${LR:-1e-4}"
    local -a data valid
    words_of DATA && data=("${WORDS[@]}")
    words_of VALID_DATA && valid=("${WORDS[@]}")
    [ "${#data[@]}" -gt 0 ] || fail "DATA holds no word: give the training data"
    positive "$lr" || fail "LR=$lr: expected a number above zero"
    not_negative "${MIN_LR:-0}" || fail "MIN_LR=$MIN_LR: expected zero or a number above it"
    FLAGS=(
        --num-layers "${LAYERS:-32}" --hidden-size "${HIDDEN:-4096}" --ffn-hidden-size "${FFN:-11008}"
        --num-attention-heads "$heads" --seq-length "$seq_length"
        --max-position-embeddings "${MAX_POSITIONS:-$seq_length}"
        --normalization RMSNorm --norm-epsilon "${NORM_EPSILON:-1e-5}" --swiglu
        --position-embedding-type rope --rotary-base "${ROTARY_BASE:-10000}"
        --untie-embeddings-and-output-weights --disable-bias-linear --attention-dropout 0 --hidden-dropout 0
        # Fixed, because Megatron would pad by the tensor parallel size, and the padding enters the softmax.
        --padded-vocab-size "${PADDED_VOCAB:-32000}"

        --micro-batch-size "${MICRO_BATCH:-1}" --global-batch-size "${GLOBAL_BATCH:-1024}"
        --train-iters "${STEPS:-$1}" --optimizer adam --weight-decay "${WEIGHT_DECAY:-0.1}"
        --adam-beta1 "${BETA1:-0.9}" --adam-beta2 "${BETA2:-0.95}" --clip-grad "${CLIP:-1.0}"
        --lr "$lr" --min-lr "${MIN_LR:-$(awk -v lr="$lr" 'BEGIN { print lr / 10 }')}"
        --lr-decay-style cosine --lr-warmup-iters "${WARMUP:-100}" --seed "${SEED:-1234}"

        --tokenizer-type "$TOKENIZER_TYPE" --train-data-path "${data[@]}"
        # Weights come from START once; from then on the run resumes from its own checkpoints.
        --pretrained-checkpoint "$START" --load "$RUN" --save "$RUN" --save-interval "${SAVE_INTERVAL:-500}"
        --ckpt-format torch_dist --btx-metrics "${METRICS:-$RUN/metrics.jsonl}"
        --log-interval "${LOG_INTERVAL:-10}" --tensorboard-log-interval "${LOG_INTERVAL:-10}"
        --eval-interval "${EVAL_INTERVAL:-1000}"
        --tensor-model-parallel-size "$TP" --pipeline-model-parallel-size "$PP"
    )
    local groups="${KV_GROUPS:-$heads}"
    [ "$groups" = "$heads" ] || FLAGS+=(--group-query-attention --num-query-groups "$groups")
    case "${PRECISION:=bf16}" in
        bf16) FLAGS+=(--bf16) ;;
        fp32) ;;
        *) fail "PRECISION=$PRECISION: expected bf16 or fp32" ;;
    esac
    [ -z "${TOKENIZER_MODEL:-}" ] || FLAGS+=(--tokenizer-model "$TOKENIZER_MODEL")
    [ -z "${VOCAB:-}" ] || FLAGS+=(--vocab-size "$VOCAB")
    [ -z "${DATA_CACHE:-}" ] || FLAGS+=(--data-cache-path "$DATA_CACHE")
    if [ "${#valid[@]}" -gt 0 ]; then
        FLAGS+=(--valid-data-path "${valid[@]}" --eval-iters "${EVAL_STEPS:-20}")
    else
        FLAGS+=(--eval-iters 0)
    fi
    [ "$TP" -eq 1 ] || FLAGS+=(--sequence-parallel)
    if is_on DISTRIBUTED_OPTIMIZER; then FLAGS+=(--use-distributed-optimizer); fi
}

# Run the training program with the given flags: as one rank when somebody has started one process per rank already,
# and it finds its place itself; else with torchrun.
launch() {
    check_python
    # The shell of a batch script has a SLURM_PROCID, too, but belongs to no step.
    local in_step="${SLURM_STEP_ID:-}"
    [ -n "${SLURM_JOB_ID:-}" ] || in_step="${SLURM_PROCID:-}"
    if [ -n "${RANK:-$in_step}" ]; then
        exec "$PYTHON" -m megatron_btx.pretrain "$@"
    fi
    local nproc="${NPROC:-$(gpus_or_one)}"
    # Bad input is one line of one process here, instead of one of every rank within torchrun's report.
    WORLD_SIZE=$((nproc * ${NNODES:-1})) LOCAL_WORLD_SIZE="$nproc" RANK=0 LOCAL_RANK=0 \
        "$PYTHON" -m megatron_btx.pretrain --btx-check "$@" || exit
    [[ " $* " != *" --btx-check "* ]] || exit 0
    local -a rendezvous=(--standalone)
    if [ "${NNODES:-1}" -gt 1 ]; then
        require MASTER_ADDR 'the host name of the first node'
        [[ "${NODE_RANK:-0}" =~ ^(0|[1-9][0-9]*)$ && "${NODE_RANK:-0}" -lt "$NNODES" ]] ||
            fail "NODE_RANK=$NODE_RANK: expected a whole number below NNODES=$NNODES"
        rendezvous=(--nnodes "$NNODES" --node-rank "${NODE_RANK:-0}"
            --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
    fi
    exec "$PYTHON" -m torch.distributed.run --nproc-per-node "$nproc" "${rendezvous[@]}" \
        -m megatron_btx.pretrain "$@"
}

gpus_or_one() {
    local count=0
    if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then
        count="$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cvE '^[[:space:]]*(-1)?$' || true)"
    elif [ -z "${CUDA_VISIBLE_DEVICES+set}" ] && command -v nvidia-smi >/dev/null; then
        count="$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)"
    fi
    echo "$((count > 0 ? count : 1))"
}
