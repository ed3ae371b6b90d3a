#!/usr/bin/env bash
# MMD-VAE on OASIS slices: `bash jobs/mmdvae_oasis.sh`, or on a cluster
# `sbatch [--nodes=2] jobs/mmdvae_oasis.sh`, after
#     eval "$(vaedist-launch --site FILE --print-env)" # partition, account and GPUs of your site
# Arguments go to vaedist-train: train.steps=100 --run-dir runs/short. The same command continues a run. Three minutes
# before the time limit, and when preempted, it saves, and the job goes on by itself.
#SBATCH --job-name=mmdvae_oasis
#SBATCH --cpus-per-task=2
#SBATCH --time=02:00:00
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
set -eo pipefail
trap '' USR1 # nothing to save yet: this must not end the script
cd "${SLURM_SUBMIT_DIR:-$PWD}" # sbatch runs a copy of this file: its own place says nothing
eval "${VAEDIST_SETUP:-}" # modules and such of the site file
# The project: here; where Slurm was given this file; where the package was installed from.
project=$PWD
[ -f jobs/mmdvae_oasis.yaml ] || [ -z "${SLURM_JOB_ID:-}" ] || project=$(scontrol show job -o "$SLURM_JOB_ID" 2>/dev/null |
    sed -n 's|.* Command=\(/.*\)/jobs/mmdvae_oasis\.sh.* WorkDir=.*|\1|p' || true)
[ ! -d "$project/.venv" ] || PATH="$project/.venv/bin:$PATH"
[ -f "$project/jobs/mmdvae_oasis.yaml" ] ||
    project=$(python -c 'import pathlib, vaedist; print(pathlib.Path(vaedist.__file__).parents[1])' 2>/dev/null) ||
    { echo "vaedist is not installed here: run tools/quickstart once, or activate its environment" >&2; exit 2; }
set -u
jobs="$project/jobs"
source "$jobs/start" mmdvae_oasis shards/oasis64 "FOLDER_THAT_HOLDS_keras_png_slices_train --size 64" "$@"
