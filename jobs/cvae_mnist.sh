#!/usr/bin/env bash
# Conditional VAE on MNIST: `bash jobs/cvae_mnist.sh`, or on a cluster
# `sbatch [--nodes=2] jobs/cvae_mnist.sh`, after
#     eval "$(vaedist-launch --site FILE --print-env)" # partition, account and GPUs of your site
# Arguments go to vaedist-train: train.steps=100 --run-dir runs/short. The same command continues a run. Three minutes
# before the time limit, and when preempted, it saves, and the job goes on by itself.
#SBATCH --job-name=cvae_mnist
#SBATCH --cpus-per-task=2
#SBATCH --time=00:30:00
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
set -eo pipefail
trap '' USR1 # nothing to save yet: this must not end the script
cd "${SLURM_SUBMIT_DIR:-$PWD}" # sbatch runs a copy of this file: its own place says nothing
eval "${VAEDIST_SETUP:-}" # modules and such of the site file
# The job file and jobs/start: here; where Slurm was given this file; where vaedist was installed from.
job=cvae_mnist jobs=${VAEDIST_SCRIPT_FOLDER:-$PWD/jobs}
[ -f "$jobs/$job.yaml" ] || [ -z "${SLURM_JOB_ID:-}" ] || jobs=$(scontrol show job -o "$SLURM_JOB_ID" 2>/dev/null |
    sed -n "s|.* Command=\(/.*\)/$job\.sh.* WorkDir=.*|\1|p" || true)
start=$jobs/start
[ -f "$start" ] || start=$(PATH="$jobs/../.venv/bin:$PWD/.venv/bin:$PATH" python -c \
    'import vaedist; print(vaedist.__path__[0] + "/../jobs/start")' 2>/dev/null) ||
    { echo "vaedist is not installed here: run tools/quickstart once, or activate its environment" >&2; exit 2; }
source "$start" shards/mnist "FOLDER_OF_IDX_FILES" "$@"
