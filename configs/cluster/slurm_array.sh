#!/bin/bash
# A sweep as an array of Slurm jobs, which share nothing but this folder; each takes its part of the runs.
#
#   sbatch --array=0-7 configs/cluster/slurm_array.sh --config configs/cluster/week.txt
#
# Submit it in the repository's folder; what follows the script's name goes to run.py (with several GPUs a job, give
# --gpus all there). Two minutes before a job's time is up, Slurm sends USR1: its runs save a checkpoint, run.py ends
# with 75, and the job goes back into the queue, to go on. NERF_PYTHON, set where you submit, is the Python that runs it
# (default: .venv/bin/python).
#SBATCH --job-name=nerf
#SBATCH --array=0-3
#SBATCH --time=12:00:00
#SBATCH --ntasks=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%A_%a.out

: "${SLURM_ARRAY_TASK_ID:?submit this with sbatch --array=0-7 (each job takes one of as many parts)}"
python=${NERF_PYTHON:-.venv/bin/python}
# Parts count from 0; the jobs of the array may have any consecutive or evenly stepped numbers.
part=$(((SLURM_ARRAY_TASK_ID - SLURM_ARRAY_TASK_MIN) / ${SLURM_ARRAY_TASK_STEP:-1}))

srun --cpus-per-task="$SLURM_CPUS_PER_TASK" "$python" run.py "$@" --shard "$part/$SLURM_ARRAY_TASK_COUNT"
code=$?
if [[ $code -eq 75 ]]; then
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}"
fi
exit $code
