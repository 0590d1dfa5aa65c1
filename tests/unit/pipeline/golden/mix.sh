#!/usr/bin/env bash
#SBATCH --job-name=mix.btx-411fbe47f3ff
#SBATCH --chdir=/runs/example
#SBATCH --output=slurm/mix.log
#SBATCH --open-mode=append
#SBATCH --account=science
#SBATCH --partition=cpu
#SBATCH --qos=long
#SBATCH --constraint=a100&nvlink
#SBATCH --time=2:00:00
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=1
#SBATCH --comment=0123456789abcdef
#SBATCH --requeue
#SBATCH --dependency=singleton
# Stage mix, which needs expert-math, seed. Submit it by hand with: sbatch THIS_FILE
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
        "$1" mix \
        --fingerprint 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef --retries 3 "${@:2}"
}

status=0
stage begin || status=$?
if [ "$status" -eq 10 ]; then exit 0; fi
if [ "$status" -ne 0 ]; then exit "$status"; fi

BTX_STAGE="slurm-$SLURM_JOB_ID:" srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=1 --kill-on-bad-exit=1 \
    "${BTX_PYTHON:-/opt/btx/bin/python}" -m megatron_btx.mixing.cli \
    --expert math=expert-math/checkpoint \
    --expert seed=seed/checkpoint \
    --output mix/checkpoint \
    --router-seed 1234 \
    --moe-router-topk 2 \
    --verify \
    >>mix/log.txt 2>&1 </dev/null || status=$?

stage end --status "$status" && status=0 || status=$?
if [ "$status" -eq 75 ] && [ "$(squeue --noheader --job="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
    # Nothing else asks for it: one request per job. Dependent jobs go on waiting for this one.
    scontrol requeue "$SLURM_JOB_ID" || echo "Slurm starts it not again; btx submit goes on from its last step" >&2
fi
exit "$status"
