#!/usr/bin/env bash
#SBATCH --job-name=finetune.btx-411fbe47f3ff
#SBATCH --chdir=/runs/example
#SBATCH --output=slurm/finetune.log
#SBATCH --open-mode=append
#SBATCH --account=science
#SBATCH --partition=gpu
#SBATCH --qos=long
#SBATCH --constraint=a100&nvlink
#SBATCH --time=1-12:00:00
#SBATCH --exclusive
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --gpus-per-node=1
#SBATCH --signal=TERM@90
#SBATCH --comment=0123456789abcdef
#SBATCH --requeue
#SBATCH --dependency=singleton
# Stage finetune, which needs data, mix, evaluate-experts. Submit it by hand with: sbatch THIS_FILE
set -uo pipefail

# What a caller exported for Slurm's commands would change what they do and answer here.
unset "${!SQUEUE_@}" "${!SBATCH_@}" "${!SCONTROL_@}" "${!SRUN_@}" SLURM_CLUSTERS SLURM_STD{IN,OUT,ERR}MODE
unset SLURM_LABELIO SLURM_TIMELIMIT SLURM_WORKING_DIR SLURM_REMOTE_CWD
[ -n "${SLURM_JOB_ID:-}" ] || { echo "error: this is no job of Slurm; submit it with sbatch" >&2; exit 2; }
cd -- /runs/example || exit 2
python=${BTX_PYTHON:-/opt/btx/bin/python}
for name in PATH PYTHONPATH; do
    kept=
    while IFS= read -r -d : entry; do [[ "$entry" != /* ]] || kept+="${kept:+:}$entry"; done <<<"${!name-}:"
    printf -v "$name" %s "$kept"
done
export PYTHONSAFEPATH=1
export OMP_NUM_THREADS=1
export NCCL_DEBUG=WARN
export NOTE='it'"'"'s $(here)'
in_container=(
    '--container-image=docker://nvcr.io#btx/btx:1'
    --container-mounts=/runs/example:/runs/example,/data:/data:ro
    --container-workdir=/runs/example
)

# Who works here holds a lock: one btx run the folder, or one script each stage. It ends with him, however he ends.
# flock leaves with 3 where another holds it, and with something else on a disk that has no locks.
refuse() {
    echo "error: stage "finetune": $*; wait for it, or end it first" >&2
    exit 2
}
exec 8<>.lock 9<>.finetune.lock
flock -s -n -E 3 8 || [ $? -ne 3 ] || refuse "a btx run is at work in $PWD"
flock -n -E 3 9 || [ $? -ne 3 ] || refuse "somebody else makes it"

# At the end of its time, or before other jobs take its nodes, Slurm tells the steps of this job: the program saves and
# leaves. This shell goes on, so that the job starts again.
trap : TERM

stage() { # stage begin|end [STATUS]: what is written before and after the program
    srun --nodes=1 --ntasks=1 --export=ALL "${in_container[@]}" "$python" -m megatron_btx.slurm.job \
        "$1" finetune \
        --fingerprint 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef --retries 3 "${@:2}"
}

# Nothing else asks for it: one request per job. Dependent jobs go on waiting for this one. The controller may be away
# for minutes. A task of an array is named as squeue names it: its number can be that of the whole array.
start_again() {
    local job state said="squeue or scontrol does not answer, or is missing"
    while type -P squeue scontrol >/dev/null && [ "$SECONDS" -lt "$1" ]; do
        read -r _ job state <<<"$(timeout 20 squeue --noheader --array --jobs="$SLURM_JOB_ID" --format="%A %i %T" |
            grep "^$SLURM_JOB_ID ")"
        case "$state" in
            RUNNING)
                said=$(timeout 20 scontrol requeue "$job" 2>&1) && return
                [[ "$said" != *disabled* ]] || break # for good: it was submitted with --no-requeue
                ;;
            "" | SIGNALING | STOPPED | SUSPENDED) ;;
            *) return ;; # cancelled, or taken back by Slurm itself
        esac
        sleep 5
    done
    echo "Slurm starts it not again ($said); btx submit goes on from its last step" >&2
}

# A begin or an end that was killed had no bad input. A begin counts the starts before it, and Slurm those without one.
leave() { # leave STATUS STARTS
    case "$1" in
        10) exit 0 ;;
        76) exit 1 ;;
        0 | 2 | 126 | 127) exit "$1" ;;
    esac
    if [ "$2" -ge 3 ]; then echo "not started again after $2 starts; btx submit goes on" >&2
    else start_again "$((SECONDS + 600))"; fi
    exit 75
}

status=0
stage begin || status=$?
if [ "$status" -ne 0 ]; then leave "$status" "${SLURM_RESTART_COUNT:-0}"; fi

BTX_STAGE="slurm-$SLURM_JOB_ID:" srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=1 --export=ALL --kill-on-bad-exit=1 \
    "${in_container[@]}" \
    "$python" -m megatron_btx.pretrain \
    --num-layers 2 \
    --hidden-size 32 \
    --ffn-hidden-size 48 \
    --num-attention-heads 4 \
    --seq-length 32 \
    --max-position-embeddings 32 \
    --position-embedding-type rope \
    --normalization RMSNorm \
    --swiglu \
    --disable-bias-linear \
    --untie-embeddings-and-output-weights \
    --attention-dropout 0 \
    --hidden-dropout 0 \
    --tokenizer-type SentencePieceTokenizer \
    --tokenizer-model /inputs/tokenizer.model \
    --moe-token-dispatcher-type alltoall \
    --moe-router-load-balancing-type aux_loss \
    --moe-aux-loss-coeff 0.01 \
    --moe-router-dtype fp32 \
    --num-experts 2 \
    --moe-router-topk 2 \
    --btx-valid-data general=data/general.valid math=data/math.valid \
    --btx-valid-tokens 256 \
    --btx-first-loss-bound evaluate-experts/evaluation.json \
    --micro-batch-size 2 \
    --global-batch-size 4 \
    --lr 0.01 \
    --lr-decay-style constant \
    --clip-grad 1.0 \
    --save-interval 10 \
    --log-interval 1 \
    --tensorboard-log-interval 1 \
    --eval-iters 0 \
    --distributed-timeout-minutes 2 \
    --expert-model-parallel-size 2 \
    --seed 1234 \
    --train-iters 4 \
    --lr-decay-iters 4 \
    --lr-warmup-fraction 0.05 \
    --train-data-path 0.5 data/general.train 0.5 data/math.train \
    --data-cache-path finetune/data-cache \
    --save finetune/checkpoint \
    --load finetune/checkpoint \
    --pretrained-checkpoint mix/checkpoint \
    --btx-metrics finetune/metrics.jsonl \
    --exit-signal-handler \
    --data-cache-path /fast/cache \
    >>finetune/log.txt 2>&1 </dev/null || status=$?

stage end --status "$status" && status=0 || status=$?
leave "$status" -1
