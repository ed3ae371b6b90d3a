#!/usr/bin/env bash
# MMD-VAE on MNIST: `bash jobs/mmdvae_mnist.sh`, or on a cluster
# `sbatch jobs/mmdvae_mnist.sh` with its partition, account and GPU line on the command line. Arguments go to
# vaedist-train: train.steps=100 --workers 2. The same command continues a run that was stopped; 3 minutes before the
# time limit it is asked to save and stop.
#SBATCH --job-name=mmdvae_mnist
#SBATCH --cpus-per-task=2
#SBATCH --time=00:30:00
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$PWD}" # sbatch runs a copy of this file: its own place says nothing
[ ! -d .venv ] || PATH="$PWD/.venv/bin:$PATH"
jobs=jobs
[ -f jobs/mmdvae_mnist.yaml ] || jobs=$(python -c 'import pathlib, vaedist; print(pathlib.Path(vaedist.__file__).parents[1] / "jobs")')
source "$jobs/start" mmdvae_mnist shards/mnist "FOLDER_OF_IDX_FILES" "$@"
