#!/usr/bin/env bash
# InfoVAE on OASIS slices: `bash jobs/infovae_oasis.sh`, or on a cluster
# `sbatch jobs/infovae_oasis.sh` with its partition, account and GPU line on the command line. Arguments go to
# vaedist-train: train.steps=100 --workers 2. The same command continues a run that was stopped; 3 minutes before the
# time limit it is asked to save and stop.
#SBATCH --job-name=infovae_oasis
#SBATCH --cpus-per-task=2
#SBATCH --time=02:00:00
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$PWD}" # sbatch runs a copy of this file: its own place says nothing
[ ! -d .venv ] || PATH="$PWD/.venv/bin:$PATH"
jobs=jobs
[ -f jobs/infovae_oasis.yaml ] || jobs=$(python -c 'import pathlib, vaedist; print(pathlib.Path(vaedist.__file__).parents[1] / "jobs")')
source "$jobs/start" infovae_oasis shards/oasis128 "FOLDER_THAT_HOLDS_keras_png_slices_train --size 128" "$@"
