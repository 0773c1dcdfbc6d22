#!/usr/bin/env bash
# A stage as a SLURM job that goes on by itself after a time limit, a preemption or a lost node:
#
#   sbatch --nodes 4 --time 12:00:00 tools/launch/slurm.sh grpo --out s3://bucket/run --model ... --mesh fsdp=32
#
# SLURM sends SIGUSR1 two minutes before the limit, and SIGTERM when it takes the nodes back. The stage then ends
# the step under way, saves, and exits with status 75, "not finished"; so does a process that has lost another.
# The job is queued again, under its own number, and goes on from the newest whole checkpoint. Any other status
# is final. Two minutes must suffice for a step and a save: --signal on sbatch's command line gives more.
#
# The run folder must be one that all nodes see: on a shared file system, or in an object store.
#SBATCH --job-name=rlhf
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=USR1@120
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

if [ $# -eq 0 ]; then
    echo "usage: sbatch [OPTIONS OF SBATCH] $0 STAGE --out FOLDER [OPTIONS]" >&2
    exit 2
fi

# One process a node, which drives all its devices; they find each other through SLURM's variables.
hosts=()
if [ "${SLURM_NNODES:-1}" -gt 1 ]; then hosts=(--coordinator auto); fi

# A process that is lost must not have the others killed before they have saved.
srun --kill-on-bad-exit=0 --wait=0 rlhf "$@" ${hosts[@]+"${hosts[@]}"} --resume auto
status=$?

# A mistake that shows in one process only ends the others with 75 too: hence the bound.
if [ "$status" -eq 75 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_RESTARTS:-100}" ]; then
    echo "Not finished: job $SLURM_JOB_ID is queued again, and goes on from its newest checkpoint."
    scontrol requeue "$SLURM_JOB_ID" || exit 75
    exit 0
fi
exit "$status"
