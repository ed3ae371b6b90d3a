#!/usr/bin/env bash
# GAN on comic faces, from the run of vae_faces: `bash jobs/gan_faces.sh`, or on a cluster
# `sbatch jobs/gan_faces.sh` with its partition, account and GPU line on the command line. Arguments go to
# vaedist-train: train.steps=100 --workers 2. The same command continues a run that was stopped; 3 minutes before the
# time limit it is asked to save and stop.
#SBATCH --job-name=gan_faces
#SBATCH --cpus-per-task=2
#SBATCH --time=01:30:00
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$PWD}" # sbatch runs a copy of this file: its own place says nothing
[ ! -d .venv ] || PATH="$PWD/.venv/bin:$PATH"
jobs=jobs
[ -f jobs/gan_faces.yaml ] || jobs=$(python -c 'import pathlib, vaedist; print(pathlib.Path(vaedist.__file__).parents[1] / "jobs")')
source "$jobs/start" gan_faces shards/faces "FOLDER_OF_FACES --size 32 --rgb" "$@"
