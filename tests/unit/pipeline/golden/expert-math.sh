#!/usr/bin/env bash
#SBATCH --job-name=expert-math.btx-411fbe47f3ff
#SBATCH --chdir=/runs/example
#SBATCH --output=slurm/expert-math.log
#SBATCH --open-mode=append
#SBATCH --account=science
#SBATCH --partition=spare
#SBATCH --qos=long
#SBATCH --constraint=a100&nvlink
#SBATCH --time=1-12:00:00
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --gpus-per-node=1
#SBATCH --signal=TERM@120
#SBATCH --comment=0123456789abcdef
#SBATCH --requeue
#SBATCH --dependency=singleton
# Stage expert-math, which needs data, seed. Submit it by hand with: sbatch THIS_FILE
set -uo pipefail

cd -- /runs/example
export OMP_NUM_THREADS=1
export NCCL_DEBUG=WARN
export NOTE='it'"'"'s $(here)'

# At the end of its time, or before other jobs take its nodes, Slurm tells the steps of this job: the program saves and
# leaves. This shell goes on, so that the job starts again.
trap : TERM

stage() { # stage begin|end [STATUS]: what is written before and after the program
    "${BTX_PYTHON:-/opt/btx/bin/python}" -m megatron_btx.pipeline.slurm.job \
        "$1" expert-math \
        --fingerprint 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef --retries 5 "${@:2}"
}

status=0
stage begin || status=$?
if [ "$status" -eq 10 ]; then exit 0; fi
if [ "$status" -ne 0 ]; then exit "$status"; fi

BTX_STAGE="slurm-$SLURM_JOB_ID:" srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=1 --kill-on-bad-exit=1 \
    "${BTX_PYTHON:-/opt/btx/bin/python}" -m megatron_btx.pretrain \
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
    --micro-batch-size 2 \
    --global-batch-size 4 \
    --lr 0.0001 \
    --lr-decay-style constant \
    --clip-grad 1.0 \
    --save-interval 10 \
    --log-interval 1 \
    --tensorboard-log-interval 1 \
    --eval-iters 0 \
    --distributed-timeout-minutes 2 \
    --seed 1234 \
    --train-iters 60 \
    --lr-decay-iters 60 \
    --lr-warmup-fraction 0.05 \
    --train-data-path 1 data/math.train \
    --data-cache-path expert-math/data-cache \
    --save expert-math/checkpoint \
    --load expert-math/checkpoint \
    --pretrained-checkpoint seed/checkpoint \
    --btx-metrics expert-math/metrics.jsonl \
    --exit-signal-handler \
    >>expert-math/log.txt 2>&1 </dev/null || status=$?

stage end --status "$status" && status=0 || status=$?
if [ "$status" -eq 75 ] && [ "$(squeue --noheader --job="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    # Nothing else asks for it: one request per job. Dependent jobs go on waiting for this one.
    scontrol requeue "$SLURM_JOB_ID" || echo "Slurm starts it not again; btx submit goes on from its last step" >&2
fi
exit "$status"
