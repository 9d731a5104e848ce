#!/bin/bash
# sbatch docs/slurm.sh OVERRIDES: one run of nai_xl on the GPUs of SLURM, saved and queued again before the time limit.
# output_dir and the cache must be in a folder that all nodes see.
#SBATCH --job-name=nai_xl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE=$SLURM_NTASKS

# exec: SLURM's signals reach python. The first status that is not 0 is srun's
srun --kill-on-bad-exit=0 bash -c \
    'export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec python -m nai_xl.train "$@"' nai_xl "$@" &
srun_pid=$!
trap : USR1 # for the ranks, not for this script
trap 'kill -TERM $srun_pid' TERM
wait $srun_pid
status=$?
while kill -0 $srun_pid 2>/dev/null; do # a signal has ended the wait, not srun
    wait $srun_pid
    status=$?
done
if [ "$status" -eq 75 ]; then # stopped in order
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
